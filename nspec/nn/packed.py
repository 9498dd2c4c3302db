"""Weights of the active neurons, packed and kept between passes without gradients: else decoding were mostly packing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from nspec.kernels.common.autocast import cast_inputs

from .active import ActiveSet
from .captured import capturing, keep
from .steps import optimizer_steps


class _Kept(NamedTuple):
    """Packed weights, and what they were made of."""

    of: tuple[Any, ...]
    weights: list[weakref.ref[Tensor]]
    packed: list[Any]


class PackedWeights:
    """The packed weights of one layer, by what they are for. A copy begins with none."""

    def __init__(self) -> None:
        self._kept: dict[Any, _Kept] = {}

    def __reduce__(self) -> Any:
        return PackedWeights, ()

    def clear(self) -> None:
        """Drops them: the task is another, or the weights will be."""
        if self._kept:
            self._kept = {}

    def of(
        self,
        purpose: str,
        x: Tensor,
        weights: tuple[Tensor | None, ...],
        active: ActiveSet,
        make: Callable[..., Any],
        lasting: bool,
    ) -> list[Any]:
        """What ``make(*weights, row)`` gives for each row of the set's index, made anew where anything has changed.

        Args:
            purpose: what they are for.
            x: the layer's input; its dtype and autocast decide in which dtype they are.
            weights: parameters, or views of them.
            active: the set, on their device.
            make: packs the weights of one task.
            lasting: whether they may be kept.

        Raises:
            RuntimeError: a CUDA graph is being captured, and the weights as they are now have not been packed.
        """
        device, given = x.device.type, [w for w in weights if w is not None]
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # A version counts in-place changes, a pointer changes with .data, and fused optimisers tell of themselves alone. A
        # task switch drops the packed weights too.
        versions = (None if w.is_inference() else w._version for w in given)
        of = (active, x.dtype, autocast, optimizer_steps(), *zip((w.data_ptr() for w in given), versions))
        key, tracing = (purpose, given[0].data_ptr()), torch.jit.is_tracing()
        known = None if tracing else self._kept.get(key)
        parameters = [_parameter(w) for w in given]
        if known is not None and known.of == of and all(ref() is p for ref, p in zip(known.weights, parameters)):
            keep(x.device, known.packed)
            return known.packed
        if capturing(x.device):
            refuse_capture()  # packing reads the sizes of the active sets on the host
        _, *cast = cast_inputs(x, *weights)
        packed = [make(*cast, row) for row in active.index]
        # Only parameters last from pass to pass: what a hook makes anew may come to lie where the last one lay.
        if lasting and not tracing and all(p is not None and not p.is_inference() for p in parameters):
            self._kept[key] = _Kept(of, [weakref.ref(p) for p in parameters if p is not None], packed)
        keep(x.device, packed)
        return packed


def _parameter(weight: Tensor) -> Tensor | None:
    """The parameter that a weight is, or views."""
    if isinstance(weight, nn.Parameter):
        return weight
    base = None if weight.is_inference() else weight._base
    return base if isinstance(base, nn.Parameter) else None


def pack_first(w: Tensor, b: Tensor | None, index: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a first layer in the layout of ``index``, int64 ``[width]``; padding repeats an active neuron."""
    inactive = index < 0
    if len(index) == w.shape[0]:
        return w.masked_fill(inactive[:, None], 0), b
    rows = torch.where(inactive, index[:1].clamp(min=0), index)
    w, b = w.index_select(0, rows), None if b is None else b.index_select(0, rows)
    return (w, b) if len(index) and int(index[0]) >= 0 else (w.zero_(), b)


def pack_second(w: Tensor, index: Tensor) -> Tensor:
    """The weight of a second layer in that layout; padding columns are zero."""
    inactive = index < 0
    if len(index) == w.shape[1]:
        return w.masked_fill(inactive, 0)
    return w.gather(1, index.clamp(min=0).expand(w.shape[0], -1)).masked_fill_(inactive, 0)


def refuse_capture() -> NoReturn:
    """Raises RuntimeError: a CUDA graph is being captured too early."""
    raise RuntimeError(
        "a CUDA graph is being captured with a layer that has not run with this task and these weights: run it once "
        "before the capture, within the same nspec.task block"
    )
