"""Many short runs side by side: a sweep of settings, the comparison of runs, and the winner's settings."""
