"""Training of one system: loop, checkpoints, validation."""
