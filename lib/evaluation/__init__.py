"""Measures how well a model tells people apart."""
