"""Gradients of the operators as plain functions: what happens around a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradient = Callable[..., tuple[Tensor | None, ...]]


class _NotTwice(torch.autograd.Function):
    """Gradients, tied to what they were made of; a derivative of them is an error."""

    @staticmethod
    def forward(ctx: Any, number: int, *tensors: Tensor) -> Any:
        return tuple([gradient.detach() for gradient in tensors[:number]])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            "a compact operator of nspec was differentiated twice, and it has no second derivative: leave create_graph=True"
            " out, or compute this block densely (nspec.task(model, None), nspec.merge(model, task))"
        )


def once(gradient: Gradient) -> Gradient:
    """A backward pass that can be differentiated once: a second derivative through it is an error, never left out.

    PyTorch's ``once_differentiable`` leaves it out where only the saved tensors need it, as behind a sum. It runs outside
    autocast, which would round what is summed in float32: the forward pass has chosen the dtypes.
    """

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        device = next((g.device.type for g in grads if g is not None), "cpu")
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return gradient(ctx, *grads)
        with torch.no_grad():
            found = gradient(ctx, *grads)
        made_of = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        tied = iter(_NotTwice.apply(sum(t is not None for t in found), *[t for t in found if t is not None], *made_of))
        return tuple([t if t is None else next(tied) for t in found]) if made_of else found

    return backward


def batched(gradient: Tensor) -> bool:
    """Whether an incoming gradient stands for a batch of them (``is_grads_batched``, ``jacobian(vectorize=True)``)."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation runs, which know PyTorch's operations only."""
    return torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0
