"""Training, evaluation and sweeps. Run from a checkout; not installed."""
