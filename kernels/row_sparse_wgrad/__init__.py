"""See ``op.py`` for the definition."""

from .op import row_sparse_wgrad

__all__ = ["row_sparse_wgrad"]
