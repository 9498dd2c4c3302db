"""Neurons with parameters of their own beside a weight that is not written to: it is trained, packed, or of several tasks.

The outputs of the neurons are replaced; in a last layer their inputs are set to 0, and multiplied apart. Of PyTorch's
operations alone, so that compilation, ``torch.func`` and any derivative work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .batch import TaskBatch
from .neurons import NeuronSet

Part = tuple[NeuronSet | None, Any, Any]
"""The neurons of a task, the parameter of their rows, and that of their biases."""


def flat(x: Tensor) -> Tensor:
    """Tokens as rows."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself where it is of that dtype."""
    return x if x.dtype == dtype else x.to(dtype)


def with_outputs(
    x: Tensor, base: Callable[[Tensor], Tensor], parts: list[Part], batch: TaskBatch | None, bias_of_base: Tensor | None
) -> Tensor:
    """A layer whose neurons are its outputs: those of the tasks are replaced.

    Args:
        x: ``[..., d_in]``.
        base: the layer.
        parts: of each task.
        batch: of several tasks.
        bias_of_base: of the layer, for neurons without a bias of their own.
    """
    places = _places(x, batch, parts)
    y, tokens = base(x), flat(x)
    values = []
    for (one, rows, bias), at in zip(parts, places.tokens):
        if one is None:
            continue
        mine = tokens if at is None else tokens.index_select(0, at)
        index = one.on(x.device).index
        own = bias if bias is not None else None if bias_of_base is None else bias_of_base.index_select(0, index)
        value = F.linear(cast(mine, y.dtype), cast(rows, y.dtype), None if own is None else cast(own, y.dtype))
        values.append(cast(value, y.dtype))
    if places.whole is not None:
        return y.index_copy(y.dim() - 1, places.whole, values[0].view(*y.shape[:-1], -1))
    together = torch.cat([value.reshape(-1) for value in values])
    return flat(y).index_put((places.rows, places.columns), together).view(y.shape)


def with_inputs(
    x: Tensor, base: Callable[[Tensor], Tensor], parts: list[Part], batch: TaskBatch | None, bias_of_base: Tensor | None
) -> Tensor:
    """A layer whose neurons are its inputs: those of the tasks are taken out, and multiplied apart. See above."""
    places = _places(x, batch, parts)
    tokens = flat(x)
    if places.whole is not None:
        (_, rows, _), taken = parts[0], tokens.index_select(1, places.whole)
        y = base(x.index_fill(x.dim() - 1, places.whole, 0))
        return y + (cast(taken, y.dtype) @ cast(rows, y.dtype)).view(y.shape)
    zeros = tokens.new_zeros(())
    y = base(tokens.index_put((places.rows, places.columns), zeros).view(x.shape))
    added, where = [], []
    for (one, rows, _), at in zip(parts, places.tokens):
        if one is not None:
            index = one.on(x.device).index
            added.append(cast(tokens[at[:, None], index[None]], y.dtype) @ cast(rows, y.dtype))
            where.append(at)
    total = flat(y.new_zeros(y.shape)).index_copy(0, torch.cat(where), torch.cat(added))
    return y + total.view(y.shape)


class _Places:
    """Where the neurons of the tasks are in the tokens of a batch.

    Attributes:
        tokens: of each task, int64 ``[n]``; None: all.
        whole: the neurons, where all tokens are of one task.
        rows: int64, the token of each number that is replaced, tasks one after another; ``columns`` its neuron.
    """

    def __init__(self, tokens: list[Any], whole: Tensor | None, rows: Any = None, columns: Any = None) -> None:
        self.tokens, self.whole, self.rows, self.columns = tokens, whole, rows, columns


def _places(x: Tensor, batch: TaskBatch | None, parts: list[Part]) -> _Places:
    indices = [None if one is None else one.on(x.device).index for one, _, _ in parts]
    if batch is None:
        return _Places([None], indices[0])
    order, _, _ = batch.layout(x)
    bounds = batch.bounds(x)
    count = math.prod(x.shape[:-1])
    order = torch.arange(count, device=x.device) if order is None else order
    tokens: list[Any] = [order[start:stop] for start, stop in zip(bounds, bounds[1:])]
    mine = [(at, index) for at, index in zip(tokens, indices) if at is not None and index is not None]
    rows = torch.cat([at.repeat_interleave(len(index)) for at, index in mine])
    columns = torch.cat([index.repeat(len(at)) for at, index in mine])
    return _Places(tokens, None, rows, columns)
