"""See ``op.py`` for the definition."""

from .op import compact_ffn

__all__ = ["compact_ffn"]
