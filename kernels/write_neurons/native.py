"""On the CPU, in C++ (``kernels/csrc/write_neurons.cpp``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import native


def supports(
    weights: Sequence[Tensor], rows: Sequence[Tensor], index: Sequence[Tensor], columns: Sequence[bool]
) -> str | None:
    """Why these arguments are not taken; None where they are: float32, bfloat16, float16 on the CPU."""
    if any(weight.stride(1) != 1 for weight in weights):
        return "the elements of a weight's row do not follow one another"
    return native.refuses_tensors(*weights, *rows)


def write(weights: Sequence[Tensor], rows: Sequence[Tensor], index: Sequence[Tensor], columns: Sequence[bool]) -> None:
    """As the reference."""
    for weight, mine, at, transposed in zip(weights, rows, index, columns):
        if mine.numel():
            torch.ops.nspec_native.write_neurons_(weight, mine.contiguous(), at.contiguous(), transposed)
