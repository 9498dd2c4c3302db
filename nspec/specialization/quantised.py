"""Linear layers whose weight is quantised (bitsandbytes, torchao): it cannot be read and written as a matrix.

What such a layer computes is seen by running it, whatever the library and its format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .feed_forward import features

# What a layer of bitsandbytes chooses by the first input that it gets.
_CHOSEN = ("compute_dtype", "compute_type_is_set")

PACKS = "support_avx512bf16_for_cpu"
"""An attribute of 4-bit layers of bitsandbytes, True on some CPUs.

The first pass without gradients then packs the weight for inference for good, and no gradient goes through it any more,
which is no error there: what lies below would be trained on a part of its gradient.
"""


def is_packed(layer: Any) -> bool:
    """Whether a layer's weight cannot be read and written as a matrix: it is quantised."""
    weight = layer.weight
    plain = type(weight) is nn.Parameter or type(weight) is Tensor
    return not (plain and weight.is_floating_point() and weight.dim() == 2)


def computes_itself(tensor: Tensor) -> bool:
    """Whether a tensor is of a class that does what operators do, as those of torchao, which call themselves floating."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_differentiable(model: nn.Module) -> None:
    """Raises ValueError where a weight is packed such that no gradient goes through it; see ``PACKS``."""
    for name, module in model.named_modules():
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"the weight of {name} was packed by bitsandbytes for inference on this CPU, in an evaluation before, and "
                "no gradient goes through it any more: load the base anew, and call nspec.finetune before it is evaluated "
                "(nspec.profile leaves it as it is)"
            )


def kind_of(layer: Any) -> str:
    """What a layer's weight is, for messages."""
    weight = layer.weight
    named = type(weight).__name__ if type(weight) is not nn.Parameter else "packed"
    return f"quantised ({named}, {str(weight.dtype).removeprefix('torch.')})"


def packed_rows(layer: Any, index: Tensor, outputs: bool) -> Tensor:
    """Rows ``[k, d_in]`` of a packed weight, or columns as ``[k, d_out]``, by what the layer gives for unit vectors.

    Args:
        layer: with a packed weight.
        index: int64 ``[k]``.
        outputs: whether they are rows.
    """
    d_in, _ = features(layer)
    with _without_bias(layer) as (device, dtype):
        if not outputs:
            units = torch.zeros(len(index), d_in, device=device, dtype=dtype)
            units[torch.arange(len(index)), index.to(device)] = 1
            columns: Tensor = layer(units).detach()
            return columns
        found = []
        for start in range(0, d_in, 256):
            unit = torch.eye(d_in, device=device, dtype=dtype)[start : start + 256]
            found.append(layer(unit).detach().index_select(1, index.to(device)))
        return torch.cat(found).t().contiguous()


def computes_affine(layer: Any) -> str | None:
    """Why a layer with a packed weight is none that multiplies and adds; None where it is.

    Its matrix is not known, so that it is run on random numbers, their negatives and their doubles.
    """
    d_in, width = features(layer)
    training = layer.training
    try:
        with _without_bias(layer) as (device, dtype):
            layer.eval()
            x = torch.randn(3, d_in, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            y, turned, doubled = (layer(each).float() for each in (x, -x, 2 * x))
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"it does not run on a tensor of {d_in} numbers ({str(error).splitlines()[0]})"
    finally:
        layer.train(training)
    if list(y.shape) != [3, width]:
        return "its output has another shape than that of nn.Linear"
    most = 0.05 * float(y.abs().max())  # inputs may be quantised too
    if float((y + turned).abs().max()) > most or float((doubled - 2 * y).abs().max()) > 2 * most:
        return "it computes something else than a product with its weight"
    return None


@contextlib.contextmanager
def _without_bias(layer: Any) -> Iterator[tuple[torch.device, torch.dtype]]:
    """The layer without its bias and without gradients; gives the device and the dtype of inputs."""
    bias, layer.bias = layer.bias, None
    chosen = {name: layer.__dict__[name] for name in (*_CHOSEN, PACKS) if name in layer.__dict__}
    layer.__dict__.update(dict.fromkeys([PACKS] if PACKS in chosen else [], False))
    weight = layer.weight
    dtype = weight.dtype if weight.is_floating_point() and weight.dtype.itemsize > 1 else None
    dtype = dtype or (None if bias is None else bias.dtype) or chosen.get("compute_dtype") or torch.get_default_dtype()
    try:
        with torch.no_grad():
            yield weight.device, dtype
    finally:
        layer.bias = bias
        layer.__dict__.update(chosen)
