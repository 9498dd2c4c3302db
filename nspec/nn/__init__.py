"""Modules over the operators: a masked linear layer, the specialised feed-forward block, an optimiser."""
