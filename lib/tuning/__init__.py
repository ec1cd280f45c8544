"""Compares many short runs: sweeps, pages that compare runs, and the winner's settings."""
