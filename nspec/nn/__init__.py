"""Modules over the operators: a masked linear layer, the specialised feed-forward pair, an optimiser."""
