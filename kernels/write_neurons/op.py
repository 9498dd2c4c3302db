"""The operator ``write_neurons_``: the rows of some neurons put into the weights in which they lie."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import checks, gpu, native
from ..common.backend import Backend, Choice, choose, explainable

BACKENDS = (
    Backend("triton", f"{__package__}.triton", lambda weights, *_: gpu.why_not(*weights)),
    Backend("native", f"{__package__}.native", native.why_not),
    Backend("reference", f"{__package__}.reference"),
)


def example(device: torch.device, dtype: torch.dtype) -> Choice:
    """What an ordinary call on that device takes."""
    make = functools.partial(torch.empty, device=device, dtype=dtype)
    index = torch.arange(64, device=device)
    asked: Any = write_neurons_
    choice: Choice = asked([make(2048, 512)], [make(64, 512)], [index], [False], explain=True)
    return choice


_Args = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[bool]]


def _prepare(
    weights: Sequence[Tensor], rows: Sequence[Tensor], index: Sequence[Tensor], columns: Sequence[bool]
) -> _Args:
    if not len(weights) == len(rows) == len(index) == len(columns):
        raise ValueError(
            f"there are {len(weights)} weights, {len(rows)} rows, {len(index)} index, {len(columns)} columns"
        )
    for weight, mine, at, transposed in zip(weights, rows, index, columns):
        checks.shape("weight", weight, [None, None])
        if not (weight.is_floating_point() and mine.is_floating_point()):
            raise TypeError(f"weight has dtype {weight.dtype} and rows {mine.dtype}, expected floating ones")
        checks.numbers("index", at, weight.shape[1 if transposed else 0])
        checks.shape("rows", mine, [at.shape[0], weight.shape[0 if transposed else 1]])
    return weights, rows, index, columns


@explainable("write_neurons", BACKENDS, _prepare, composed=None)
def write_neurons_(
    weights: Sequence[Tensor], rows: Sequence[Tensor], index: Sequence[Tensor], columns: Sequence[bool]
) -> None:
    """Puts rows of neurons into weights, in place, in one launch where they are of one size: ``W[index] = rows``.

    Nothing of it is recorded for gradients, and the versions of the weights do not rise where a kernel writes.

    Args:
        weights: matrices ``[n, d]``, or ``[d, n]`` where neurons are columns.
        rows: of each, ``[k, d]``, any floating dtype; rounded to that of the weight.
        index: of each, int64 ``[k]``, no number twice. On a GPU one that is no neuron's is passed over.
        columns: of each, whether its neurons are columns.

    With ``explain=True`` it computes nothing and returns the :class:`Choice` of the backend for these arguments.

    Raises:
        ValueError: shapes that do not fit, lists of different lengths, an index on the CPU that holds other numbers than
            those of neurons.
        TypeError: an index that is not int64 ``[k]``, weights or rows that are not floating.

    Example:
        >>> weight = torch.zeros(2, 3)
        >>> write_neurons_([weight], [torch.ones(1, 2)], [torch.tensor([2])], [True])
        >>> weight.tolist()
        [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    """
    args = _prepare(weights, rows, index, columns)
    with torch.no_grad():
        choose("write_neurons", BACKENDS, *args).write(*args)
