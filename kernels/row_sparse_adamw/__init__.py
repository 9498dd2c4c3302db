"""See ``op.py`` for the definition."""

from .op import row_sparse_adamw_

__all__ = ["row_sparse_adamw_"]
