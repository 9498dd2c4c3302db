"""See ``op.py`` for the definition."""

from .op import compact_fc2

__all__ = ["compact_fc2"]
