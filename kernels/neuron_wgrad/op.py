"""The operator ``neuron_wgrad``: the weight gradient of some neurons of a linear layer, and of nothing else, compact."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..common import checks, native
from ..common.backend import Backend, Choice, choose, explainable

BACKENDS = (
    Backend("native", f"{__package__}.native", native.why_not),
    Backend("reference", f"{__package__}.reference"),
)


def example(device: torch.device, dtype: torch.dtype) -> Choice:
    """What an ordinary call on that device takes."""
    make = functools.partial(torch.empty, device=device, dtype=dtype)
    index = torch.arange(64, device=device)
    choice: Any = neuron_wgrad(make(1024, 2048), make(1024, 512), index, explain=True)  # type: ignore[call-arg]
    return choice


@explainable
def neuron_wgrad(dz: Tensor, x: Tensor, index: Tensor | None, *, dtype: torch.dtype | None = None) -> Tensor:
    """Weight gradient of the neurons ``index`` of a linear layer, and of no other: ``dz[:, index]ᵀ x``.

    Of a last layer, whose neurons are its inputs, it is called with what these were and the gradient of the output, and
    gives the gradient of the columns transposed.

    Args:
        dz: gradient of the layer's output, ``[tokens, n]``.
        x: the layer's input, ``[tokens, d]``, same dtype.
        index: int64 ``[k]``, k from 0 on; None: all columns of dz, where they have been taken out before.
        dtype: of the result, in place of that of ``dz``; sums are in float32 anyway (float64 in float64).

    Returns:
        ``[k, d]``, in the order of ``index``. Not differentiable: it is called in backward passes.

    With ``explain=True`` it computes nothing and returns the :class:`Choice` of the backend for these arguments.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> neuron_wgrad(torch.tensor([[1.0, 2.0]]), torch.ones(1, 3), torch.tensor([1])).tolist()
        [[2.0, 2.0, 2.0]]
    """
    checks.shape("dz", dz, [None, None])
    checks.shape("x", x, [dz.shape[0], None])
    if x.dtype != dz.dtype:  # a layer that autocast has cast to 16 bits for
        x = x.to(dz.dtype)
    dtype = dz.dtype if dtype is None else dtype
    dw: Tensor = choose("neuron_wgrad", BACKENDS, dz, x, index, dtype).forward(dz, x, index, dtype)
    return dw
