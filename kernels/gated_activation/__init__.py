"""See ``op.py`` for the definition."""

from .op import KINDS, gated_activation

__all__ = ["KINDS", "gated_activation"]
