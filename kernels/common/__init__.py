"""What the operators share: argument checks, active sets as index tensors, and the choice of a backend."""
