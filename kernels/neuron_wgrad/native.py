"""On the CPU: columns are taken out in C++; 16-bit operands are widened in steps of tokens and summed in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import native
from ..common.columns import take_columns

_STEP = 1024
"""Tokens that are widened together, so that no copy of all of them is made."""


def supports(dz: Tensor, x: Tensor, index: Tensor | None, dtype: torch.dtype, add_to: Tensor | None) -> str | None:
    """Why these arguments are not taken; None where they are: float32, bfloat16, float16 on the CPU."""
    return native.refuses_tensors(dz, x, add_to)


def forward(dz: Tensor, x: Tensor, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As the reference."""
    columns = _taken(dz, index)
    if dz.dtype == torch.float32:
        return (columns.t() @ x).to(dtype)
    dw = torch.zeros((columns.shape[1], x.shape[1]), dtype=torch.float32)
    return _add(dw, columns, x).to(dtype)


def accumulate(total: Tensor, dz: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """As the reference; the product's own sums go on from what is there."""
    columns = _taken(dz, index)
    if total.dtype == torch.float32:
        return _add(total, columns, x)
    return total.copy_(_add(total.float(), columns, x))


def _add(total: Tensor, columns: Tensor, x: Tensor) -> Tensor:
    """Adds ``columnsᵀ x`` to a total in float32."""
    if x.dtype == torch.float32:
        return total.addmm_(columns.t(), x)
    for start in range(0, len(x), _STEP):
        total.addmm_(columns[start : start + _STEP].t().float(), x[start : start + _STEP].float())
    return total


def _taken(dz: Tensor, index: Tensor | None) -> Tensor:
    return dz if index is None else take_columns(dz, index)
