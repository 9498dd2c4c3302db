"""See ``op.py`` for the definition."""

from .layout import index_for
from .op import compact_fc1

__all__ = ["compact_fc1", "index_for"]
