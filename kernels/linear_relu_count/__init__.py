"""See ``op.py`` for the definition."""

from .op import linear_relu_count

__all__ = ["linear_relu_count"]
