"""Faces become vectors."""
