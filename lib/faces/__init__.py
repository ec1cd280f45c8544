"""Photos become aligned faces."""
