"""The parts of the training loop: state, steps, checkpoints, progress."""
