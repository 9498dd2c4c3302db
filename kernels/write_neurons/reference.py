"""Plain PyTorch; defines what the operator means, on every device and dtype."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def write(weights: Sequence[Tensor], rows: Sequence[Tensor], index: Sequence[Tensor], columns: Sequence[bool]) -> None:
    """``W[index] = rows``, or ``W[:, index] = rowsᵀ``, in the dtype of ``W``."""
    for weight, mine, at, transposed in zip(weights, rows, index, columns):
        cast = mine if mine.dtype == weight.dtype else mine.to(weight.dtype)
        weight.index_copy_(int(transposed), at, cast.t() if transposed else cast)
