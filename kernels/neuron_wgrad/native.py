"""On the CPU: columns are taken out in C++; 16-bit operands are widened in steps of tokens and summed in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import native
from ..common.columns import take_columns

_STEP = 1024
"""Tokens that are widened together, so that no copy of all of them is made."""


def supports(dz: Tensor, x: Tensor, index: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why these arguments are not taken; None where they are: float32, bfloat16, float16 on the CPU."""
    return native.refuses_tensors(dz, x)


def forward(dz: Tensor, x: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As the reference."""
    columns = dz if index is None else take_columns(dz, index)
    if dz.dtype == torch.float32:
        return (columns.t() @ x).to(dtype)
    dw = torch.zeros((columns.shape[1], x.shape[1]), dtype=torch.float32)
    for start in range(0, len(x), _STEP):
        dw.addmm_(columns[start : start + _STEP].t().float(), x[start : start + _STEP].float())
    return dw.to(dtype)
