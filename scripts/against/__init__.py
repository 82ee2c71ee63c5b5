"""What `scripts/bench_against.py` measures, and how."""
