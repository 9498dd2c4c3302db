"""Triton: one launch for up to three matrices whose neurons have rows of one size, as gate, up and down have."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.triton_launch import Launcher, aligned, cdiv, launching, planned
from ..common.triton_tasks import DTYPES
from .kernels import write_kernel

_TILE = {"NEURONS": 16, "NUMBERS": 128, "num_warps": 4}
_MOST = 3


def supports(
    weights: Sequence[Tensor], rows: Sequence[Tensor], index: Sequence[Tensor], columns: Sequence[bool]
) -> str | None:
    """None, or why these arguments are not taken."""
    for weight, mine, at in zip(weights, rows, index):
        for t in (weight, mine):
            if t.dtype not in DTYPES:
                return f"a dtype is {t.dtype}; it takes float32, bfloat16 and float16"
            if t.device.type == "cpu" and t.dtype == torch.bfloat16:
                return "Triton's interpreter rounds bfloat16 in another way"
        if weight.stride(1) != 1 or weight.layout is not torch.strided:
            return "the elements of a weight's row do not follow one another"
        if mine.device != weight.device or at.device != weight.device:
            return f"rows are on {mine.device} and an index on {at.device}, the weight on {weight.device}"
    return None


@planned
def _plan(device: torch.device, columns: tuple[bool, ...], *alike: Any) -> Launcher:
    return Launcher(write_kernel, {f"COLUMNS{i}": one for i, one in enumerate(columns)} | _TILE)


def write(weights: Sequence[Tensor], rows: Sequence[Tensor], index: Sequence[Tensor], columns: Sequence[bool]) -> None:
    """As the reference."""
    entries = [entry for entry in zip(weights, rows, index, columns) if entry[1].numel()]
    # Matrices of one launch have rows of one size and dtype.
    for _, group in itertools.groupby(entries, key=lambda entry: (entry[1].shape, entry[0].device)):
        some = list(group)
        for start in range(0, len(some), _MOST):
            _launch(some[start : start + _MOST])


def _launch(some: list[Any]) -> None:
    count = len(some)
    some += [some[0]] * (_MOST - count)  # pointers that no program takes
    weights = [weight for weight, _, _, _ in some]
    rows = [mine.contiguous() for _, mine, _, _ in some]
    index = [at.contiguous() for _, _, at, _ in some]
    neurons, numbers = rows[0].shape
    heights = [weight.shape[1 if transposed else 0] for weight, _, _, transposed in some]
    strides = [weight.stride(0) for weight in weights]
    alike = (
        *[t.dtype for t in (*weights, *rows)],
        *aligned(*weights, *rows, *index),
        *[(n % 16 == 0, n == 1, n >= 2**31) for n in (numbers, *strides)],
    )
    device = weights[0].device
    plan = _plan(device, tuple([bool(one) for _, _, _, one in some]), *alike)
    grid = (cdiv(neurons, _TILE["NEURONS"]), cdiv(numbers, _TILE["NUMBERS"]), count)
    launching(device, plan, grid, *weights, *rows, *index, neurons, numbers, *heights, *strides)
