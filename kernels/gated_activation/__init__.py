"""See ``op.py`` for the definition."""

from .op import KINDS, gated_activation, gated_gradients

__all__ = ["KINDS", "gated_activation", "gated_gradients"]
