"""What `experiments.benchmark` shows, and how."""
