"""Training: algorithms, the optimizer step, checkpoints and the trainer."""
