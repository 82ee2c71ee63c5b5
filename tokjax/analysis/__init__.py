"""What a model costs, what it gains, and what happened to its tokens."""
