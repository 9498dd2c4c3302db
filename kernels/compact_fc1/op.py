"""The operator ``nspec::compact_fc1``: the first layer of a feed-forward block over the active neurons."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..common import checks
from ..common.active import active_index
from ..common.autocast import cast_inputs
from ..common.backend import Choice, by_torch, choose, explainable, opaque, standard, torch_operator
from ..common.derivatives import once, transformed
from . import reference

BACKENDS = standard(__package__)


def example(device: torch.device, dtype: torch.dtype) -> Choice:
    """What an ordinary call on that device takes."""
    make = functools.partial(torch.empty, device=device, dtype=dtype)
    active = torch.arange(2048, device=device) < 1024
    choice: Any = compact_fc1(make(1024, 512), make(2048, 512), make(2048), active, explain=True)  # type: ignore[call-arg]
    return choice


_compact_fc1 = torch_operator(
    "compact_fc1",
    "(Tensor x, Tensor w, Tensor? b, Tensor index, Tensor? task_offsets) -> Tensor",
    lambda *args: choose("compact_fc1", BACKENDS, *args).forward(*args),
    lambda x, w, b, index, task_offsets: x.new_empty((x.shape[0], index.shape[1])),
)
_compact_fc1_backward = torch_operator(
    "compact_fc1_backward",
    "(Tensor dz, Tensor x, Tensor w, Tensor index, Tensor? task_offsets, bool has_b) -> (Tensor, Tensor, Tensor)",
    lambda dz, x, w, index, task_offsets, has_b: (
        choose("compact_fc1", BACKENDS, x, w, None, index, task_offsets)
    ).backward(dz, x, w, index, task_offsets, has_b),
    lambda dz, x, w, index, task_offsets, has_b: (
        (x.new_empty(x.shape), w.new_empty(w.shape), w.new_empty(w.shape[:1] if has_b else 0))
    ),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, b, index, task_offsets = inputs
    ctx.has_b = b is not None
    ctx.save_for_backward(x, w, index, task_offsets)


def _gradient(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw, db = _compact_fc1_backward(dz, *ctx.saved_tensors, ctx.has_b)
    return dx, dw, db if ctx.has_b else None, None, None


_compact_fc1.register_autograd(_gradient, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same for eager calls: a custom operator costs the host as much as ten launches."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        index: Tensor,
        task_offsets: Tensor | None,
        places: Tensor | None,
    ) -> Tensor:
        ctx.backend, ctx.has_b = backend, b is not None
        ctx.save_for_backward(x, w, index, task_offsets, places)
        z: Tensor = backend.forward(x, w, b, index, task_offsets)
        return z

    @staticmethod
    @once
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, w, index, task_offsets, places = ctx.saved_tensors
        dx, dw, db = ctx.backend.backward(dz, x, w, index, task_offsets, ctx.has_b, places)
        return None, dx, dw, db if ctx.has_b else None, None, None, None


def _prepare(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    active: Tensor,
    *,
    task_offsets: Tensor | None = None,
    index: Tensor | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    if w.dim() != 2:
        raise ValueError(f"w has shape {list(w.shape)}, expected [d_ff, d_in]")
    d_ff, d_in = w.shape
    checks.shape("x", x, [*x.shape[:-1], d_in])
    if b is not None:
        checks.shape("b", b, [d_ff])
    checks.active_sets(active, d_ff, task_offsets)
    x, w, b = cast_inputs(x, w, b)
    if index is None:
        index = active_index(active)
    checks.shape("index", index, [active.shape[0] if active.dim() == 2 else 1, None])
    return x if x.dim() == 2 else x.reshape(-1, d_in), w, b, index, task_offsets


@explainable("compact_fc1", BACKENDS, _prepare)
def compact_fc1(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    active: Tensor,
    *,
    task_offsets: Tensor | None = None,
    index: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """First layer of a feed-forward block, ``x wᵀ + b``, of the active neurons only, before the activation.

    Made for elementwise functions and :func:`compact_fc2` behind it: together they are the block in which the rows of
    ``w`` of inactive neurons are zero, for any activation. A gated block calls it twice, for gate and up.

    Args:
        x: ``[..., d_in]``, any floating dtype.
        w: fc1.weight, ``[d_ff, d_in]``.
        b: fc1.bias, ``[d_ff]`` or None.
        active: bool ``[d_ff]``; ``[tasks, d_ff]`` with ``task_offsets``.
        task_offsets: int32 or int64 ``[tasks + 1]``, for tokens sorted by task: those of task t are
            ``offsets[t]:offsets[t + 1]`` of the flattened leading dimensions.
        index: ``active_index(active)``, for callers that keep it; computed when None.
        places: ``places_of(index, d_ff)``, likewise; computed where it is needed.

    Returns:
        ``z [..., width]`` in the layout of the index (``kernels/common/active.py``). Compact, its padding repeats an
        active neuron; in place, an inactive neuron has its bias, or 0. Differentiable once in x, w and b; the rows of
        inactive neurons in the gradients of ``w`` and ``b`` are exactly zero, and the gradient of z at positions without
        an active neuron is ignored; it must be finite.

    With ``explain=True`` it computes nothing and returns the :class:`Choice` of the backend for these arguments.

    Raises:
        ValueError: shapes that do not fit, offsets that do not cover the tokens.
        TypeError: ``active`` that is not bool, inputs of different dtypes outside autocast.

    Example:
        >>> compact_fc1(torch.ones(1, 1), torch.ones(2, 1), torch.ones(2), torch.tensor([True, False])).tolist()
        [[2.0, 1.0]]
    """
    args = _prepare(x, w, b, active, task_offsets=task_offsets, index=index)
    z: Tensor
    if by_torch("compact_fc1"):
        z = reference.forward(*args)
    elif opaque(*args):
        z = _compact_fc1(*args)
    else:
        module = choose("compact_fc1", BACKENDS, *args)
        z = _Eager.apply(module, *args, places) if torch.is_grad_enabled() or transformed() else module.forward(*args)
    return z if x.dim() == 2 else z.view(*x.shape[:-1], z.shape[1])
