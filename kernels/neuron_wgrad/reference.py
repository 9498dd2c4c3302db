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
    dw = columns.t() @ x if dz.dtype in (torch.float32, torch.float64) else mm_float32(columns.t(), x)
    return dw.to(dtype)
