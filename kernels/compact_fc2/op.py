"""The operator ``nspec::compact_fc2``: the second layer of a feed-forward block over the active neurons."""

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
    args = make(1024, 1024), make(2048), make(512, 2048), make(512), active
    choice: Any = compact_fc2(*args, explain=True)  # type: ignore[call-arg]
    return choice


_compact_fc2 = torch_operator(
    "compact_fc2",
    "(Tensor h, Tensor? constant, Tensor w, Tensor? b, Tensor index, Tensor? task_offsets) -> Tensor",
    lambda *args: choose("compact_fc2", BACKENDS, *args).forward(*args),
    lambda h, constant, w, b, index, task_offsets: h.new_empty((h.shape[0], w.shape[0])),
)
_compact_fc2_backward = torch_operator(
    "compact_fc2_backward",
    "(Tensor dy, Tensor h, Tensor? constant, Tensor w, Tensor index, Tensor? task_offsets, bool has_b)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda dy, h, constant, w, index, task_offsets, has_b: (
        choose("compact_fc2", BACKENDS, h, constant, w, None, index, task_offsets)
    ).backward(dy, h, constant, w, index, task_offsets, has_b),
    lambda dy, h, constant, w, index, task_offsets, has_b: (
        h.new_empty(h.shape),
        w.new_empty(0 if constant is None else constant.shape),
        w.new_empty(w.shape),
        w.new_empty(w.shape[:1] if has_b else 0),
    ),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, constant, w, b, index, task_offsets = inputs
    ctx.given = (constant is not None, b is not None)
    ctx.save_for_backward(h, constant, w, index, task_offsets)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    has_constant, has_b = ctx.given
    dh, dc, dw, db = _compact_fc2_backward(dy, *ctx.saved_tensors, has_b)
    return dh, dc if has_constant else None, dw, db if has_b else None, None, None


_compact_fc2.register_autograd(_gradient, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The same for eager calls: a custom operator costs the host as much as ten launches."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Any,
        h: Tensor,
        constant: Tensor | None,
        w: Tensor,
        b: Tensor | None,
        index: Tensor,
        task_offsets: Tensor | None,
        places: Tensor | None,
    ) -> Tensor:
        ctx.backend, ctx.given = backend, (constant is not None, b is not None)
        ctx.save_for_backward(h, constant, w, index, task_offsets, places)
        y: Tensor = backend.forward(h, constant, w, b, index, task_offsets, places)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, constant, w, index, task_offsets, places = ctx.saved_tensors
        has_constant, has_b = ctx.given
        dh, dc, dw, db = ctx.backend.backward(dy, h, constant, w, index, task_offsets, has_b, places)
        return None, dh, dc if has_constant else None, dw, db if has_b else None, None, None, None


def _prepare(
    h: Tensor,
    constant: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    active: Tensor,
    *,
    task_offsets: Tensor | None = None,
    index: Tensor | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]:
    if w.dim() != 2:
        raise ValueError(f"w has shape {list(w.shape)}, expected [d_out, d_ff]")
    d_out, d_ff = w.shape
    checks.active_sets(active, d_ff, task_offsets)
    if b is not None:
        checks.shape("b", b, [d_out])
    tasks = active.shape[0] if active.dim() == 2 else 1
    if constant is not None:
        if constant.dim() == 2:
            checks.shape("constant", constant, [tasks, d_ff])
        elif constant.dim() == 1:
            checks.shape("constant", constant, [d_ff])
        elif constant.dim() > 2:
            raise ValueError(f"constant has shape {list(constant.shape)}, expected [], [{d_ff}] or [{tasks}, {d_ff}]")
    if index is None:
        index = active_index(active)
    checks.shape("index", index, [tasks, None])
    checks.shape("h", h, [*h.shape[:-1], index.shape[1]])
    h, constant, w, b = cast_inputs(h, constant, w, b)
    if constant is not None and constant.dim() < 2:
        constant = constant.expand(1, d_ff)
    flat = h if h.dim() == 2 else h.reshape(h.shape[:-1].numel(), index.shape[1])
    return flat, constant, w, b, index, task_offsets


@explainable("compact_fc2", BACKENDS, _prepare)
def compact_fc2(
    h: Tensor,
    constant: Tensor | None,
    w: Tensor,
    b: Tensor | None,
    active: Tensor,
    *,
    task_offsets: Tensor | None = None,
    index: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Second layer of a feed-forward block, ``h wᵀ + b``, in which inactive neurons have constant outputs.

    Args:
        h: what an elementwise function made of ``compact_fc1``'s output, ``[..., width]`` in the layout of the index.
            Positions without an active neuron are ignored and get the gradient zero; they must be finite. In place, too:
            what an inactive neuron gives is ``constant`` alone.
        constant: the output of each inactive neuron: of no dimension, ``[d_ff]`` or ``[tasks, d_ff]``; entries of active
            neurons are not read, and their gradient is zero. With fc1's rows masked and its bias kept it is the
            activation of the bias. None: zero, with no work for inactive neurons at all.
        w: fc2.weight, ``[d_out, d_ff]``.
        b: fc2.bias, ``[d_out]`` or None.
        active: bool ``[d_ff]``; ``[tasks, d_ff]`` with ``task_offsets``.
        task_offsets: as for ``compact_fc1``.
        index: ``active_index(active)``, for callers that keep it; computed when None.
        places: ``places_of(index, d_ff)``, likewise; computed where it is needed.

    Returns:
        ``y [..., d_out]``. Differentiable once in h, constant, w and b; columns of the gradient of ``w`` that no task
        has active are ``s constantᵀ`` with s the sum of the gradient of y over tokens, or zero without a constant.

    With ``explain=True`` it computes nothing and returns the :class:`Choice` of the backend for these arguments.

    Raises:
        ValueError: shapes that do not fit, offsets that do not cover the tokens.
        TypeError: ``active`` that is not bool, inputs of different dtypes outside autocast.

    Example:
        >>> h, active = torch.tensor([[2.0, 9.0]]), torch.tensor([True, False])
        >>> compact_fc2(h, torch.tensor(0.5), torch.ones(1, 2), None, active).item()
        2.5
    """
    args = _prepare(h, constant, w, b, active, task_offsets=task_offsets, index=index)
    y: Tensor
    if by_torch("compact_fc2"):
        y = reference.forward(*args)
    elif opaque(*args):
        y = _compact_fc2(*args)
    else:
        module = choose("compact_fc2", BACKENDS, *args)
        eager = torch.is_grad_enabled() or transformed()
        y = _Eager.apply(module, *args, places) if eager else module.forward(*args, places)
    return y if h.dim() == 2 else y.view(*h.shape[:-1], w.shape[0])
