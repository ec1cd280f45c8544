"""Aligned faces train an embedding model."""
