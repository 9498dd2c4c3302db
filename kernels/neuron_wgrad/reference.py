"""Plain PyTorch; defines what the operator means, on every device and dtype: ``dw = dz[:, index]ᵀ x``.

Sums are in float32 (float64 in float64), whatever the dtype of the operands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.products import mm_float32


def forward(dz: Tensor, x: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``dz [tokens, n]``, ``x [tokens, d]``, int64 ``index [k]`` or None for all -> ``[k, d]``."""
    columns = dz if index is None else dz.index_select(1, index)
    if dz.dtype in (torch.float32, torch.float64):
        return (columns.t() @ x).to(dtype)
    if torch.version.hip is not None:  # which has no product with an output of another dtype
        return (columns.t().float() @ x.float()).to(dtype)
    return mm_float32(columns.t(), x).to(dtype)


def accumulate(total: Tensor, dz: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """Adds the gradient to ``total [k, d]``, in place; the sum is rounded once."""
    wide = torch.promote_types(torch.promote_types(total.dtype, dz.dtype), torch.float32)
    return total.copy_(forward(dz, x, index, wide).add_(total))
