"""Which rows of a specialised layer the gradient that waits for an optimiser step is made of.

A forward pass does not tell: it may be an evaluation, its loss may be thrown away, the step may be skipped (a loss scaler
that found an infinity). So the rows are noted in the backward pass, by a node that stands before the weight in the graph,
and what was noted is forgotten with the gradient, in ``zero_grad`` or where ``.grad`` is None when the next one arrives.
Nothing here waits for a device, and a compiled graph or a captured CUDA graph holds the notes too.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from .captured import capturing
from .transforms import in_transform, outside_transforms


class TouchedRows:
    """The rows of one weight, bool ``[out_features]`` each. They change in place: CUDA graphs hold their addresses.

    A gradient may be put back by hand after it was zeroed, as methods do that compare the gradients of tasks. Rows whose
    notes were dropped therefore count where their gradient is not zero.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.device = device
        # Of backward passes: since the last gradient arrived; before that; before the gradient was dropped.
        with torch.inference_mode(False):  # training passes write into them
            empty = [torch.zeros(rows, dtype=torch.bool, device=device) for _ in range(3)]
        self.noted, self._touched, self._dropped = empty
        self._arrived = False  # a gradient, since the last step
        self._apart = False  # whether there may be dropped ones

    def note(self, weight: Tensor, used: Tensor | None) -> Tensor:
        """The weight with which a forward pass goes on, so that its backward pass notes the rows ``used`` (None: all)."""
        if in_transform():
            with outside_transforms():  # which gives gradients to its caller, who may set them
                self._dropped.logical_or_(torch.ones_like(self.noted) if used is None else used)
            self._apart = True
            return weight
        noting: Tensor = _Note.apply(weight, self.noted, torch.ones_like(self.noted) if used is None else used)
        return noting

    def arrive(self, parameter: Tensor) -> None:
        """A backward pass is about to add to ``parameter.grad``."""
        if capturing(self.device):
            return  # a replay would not look whether there is a gradient
        if parameter.grad is None and self._arrived:
            self._drop()
        self._touched.logical_or_(self.noted)
        self.noted.zero_()
        self._arrived = True

    def drop(self) -> None:
        """The gradient is zeroed."""
        self._touched.logical_or_(self.noted)
        self.noted.zero_()
        self._drop()

    def _drop(self) -> None:
        self._dropped.logical_or_(self._touched)
        self._touched.zero_()
        self._apart |= self._arrived
        self._arrived = False

    def take(self) -> tuple[Tensor, Tensor, bool]:
        """The rows of the gradient; those that were dropped, and whether there may be any; starts over."""
        touched, dropped, apart = self._touched | self.noted, self._dropped.clone(), self._apart
        for rows in (self.noted, self._touched, self._dropped):
            rows.zero_()
        self._arrived = self._apart = False
        return touched, dropped, apart


class _Note(torch.autograd.Function):
    """The identity on a weight; its backward pass notes the rows."""

    # With a setup_context apart PyTorch would look up the signature of forward in each call, 40 us of Python.
    @staticmethod
    def forward(ctx: Any, weight: Tensor, noted: Tensor, used: Tensor) -> Tensor:
        ctx.noted, ctx.used = noted, used
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> tuple[Tensor, None, None]:
        ctx.noted.logical_or_(ctx.used)
        return dw, None, None


class Arrivals:
    """Tells a layer when a gradient of the parameter that an optimiser steps arrives; of one parameter at a time."""

    def __init__(self) -> None:
        self._parameter: weakref.ref[Tensor] | None = None
        self._handle: Any = None

    def follow(self, parameter: Tensor, layer: Any) -> None:
        """From now on ``layer.gradient_arrives(parameter)`` is called before each addition to ``parameter.grad``."""
        if not parameter.requires_grad or (self._parameter is not None and self._parameter() is parameter):
            return
        if self._handle is not None:
            self._handle.remove()
        self._parameter = weakref.ref(parameter)
        known, owner = self._parameter, weakref.ref(layer)

        def arrives(gradient: Tensor) -> None:
            p, layer = known(), owner()
            if p is not None and layer is not None:
                layer.gradient_arrives(p)

        self._handle = parameter.register_hook(arrives)
