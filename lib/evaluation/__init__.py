"""A model's accuracy, measured so that it can be trusted."""
