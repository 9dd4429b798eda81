"""Training: checks before it starts, the loop, the optimizer, checkpoints, metrics and their tracking."""
