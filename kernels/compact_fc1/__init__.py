"""See ``op.py`` for the definition."""

from .op import compact_fc1

__all__ = ["compact_fc1"]
