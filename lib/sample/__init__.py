"""Draws people who do not exist, for a first try, for tests and for benches."""
