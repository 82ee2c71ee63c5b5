"""Commands of a checkout: benchmarks, checks and tables. Not installed."""
