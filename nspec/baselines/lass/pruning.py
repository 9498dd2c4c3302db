"""Which weights LaSS keeps: in each matrix by itself, all but those of the lowest magnitude."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor, nn

from nspec.specialization.layers import find_blocks, nearest

from ..structure import layer_around, within


def prunable_layers(model: nn.Module) -> list[str]:
    """The linear layers that LaSS prunes: attention and feed-forward matrices of every encoder and decoder layer.

    They are found by structure: every ``nn.Linear`` inside a module that holds a feed-forward block as its own attributes
    (``fc1`` and ``fc2``, see ``nspec.specialization.layers``). Embeddings and the output projection lie outside.

    Returns:
        Qualified names, in the order of the model's modules.

    Raises:
        ValueError: no feed-forward block; a block in a module of its own inside a larger layer (as in T5), whose attention
            would be missed; or ``nn.MultiheadAttention``, whose fused projection is no ``nn.Linear`` and cannot be masked.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    parents = dict.fromkeys(names[id(block.parent)] for block in find_blocks(model))
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    for parent in parents:
        if fused := [name for name in within(parent, modules) if isinstance(modules[name], nn.MultiheadAttention)]:
            raise ValueError(
                f"{fused[0]} is nn.MultiheadAttention, whose fused projection cannot be masked: expected attention made of "
                "nn.Linear layers; name the layers to prune with layers=[...]"
            )
        if whole := layer_around(parent, modules):
            raise ValueError(
                f"{parent or 'the model'} holds a feed-forward block alone, and {whole} around it more linear layers: "
                "expected both in one module; name the layers to prune with layers=[...]"
            )
    inside = {name for parent in parents for name in within(parent, linears)}
    return [name for name in modules if name in inside]


def magnitude_masks(model: nn.Module, alpha: float, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Masks that drop, in each weight matrix by itself, the weights of the lowest magnitude.

    Of a matrix of n weights exactly ``floor(alpha * n)`` are dropped, with ``alpha`` the decimal number as it is written
    (0.29 of 100 is 29). Among equal magnitudes the one with the lower index, row by row, goes first; so the masks depend
    on the weights alone, not on the device.

    Args:
        model: fine-tuned on one task.
        alpha: share of the weights to drop, at least 0 and below 1.
        layers: qualified names of linear layers; None: :func:`prunable_layers`.

    Returns:
        By layer, a bool tensor ``[out, in]`` on the CPU, True for the weights that are kept.

    Raises:
        ValueError: ``alpha`` out of range, a name that is no linear layer, no layers, or a weight that is not finite.
    """
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha is {alpha}, expected a share of weights of at least 0 and below 1")
    names = prunable_layers(model) if layers is None else list(layers)
    if not names:
        raise ValueError("layers is empty, expected the names of linear layers")
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    masks = {}
    for name in names:
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name!r} is not a linear layer of the model; {nearest(name, linears)}")
        check_own_weight(name, module)
        if not bool(module.weight.isfinite().all()):
            raise ValueError(f"{name}.weight has values that are not finite: their order by magnitude says nothing")
        masks[name] = _lowest_dropped(module.weight.detach(), math.floor(Fraction(str(alpha)) * module.weight.numel()))
    return masks


def check_own_weight(name: str, module: nn.Linear) -> None:
    """ValueError where the weight is made of others before each pass, and is an old one until then, or is not there."""
    if "weight" in vars(module):  # by a hook; that of a parametrised layer is made when it is asked for
        raise ValueError(
            f"{name}.weight is no parameter but is made by a hook from {', '.join(module._parameters)} (pruning, "
            "weight_norm, spectral_norm): make it one first, with torch.nn.utils.prune.remove or remove_weight_norm"
        )
    if module.weight.is_meta:
        raise ValueError(
            f"{name}.weight is on the meta device: its values are elsewhere (offloaded, or not loaded yet); load the model "
            "whole, without device_map and offloading"
        )


def _lowest_dropped(weight: Tensor, drop: int) -> Tensor:
    """True but for the ``drop`` lowest magnitudes; of equal ones the first go."""
    kept = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    if drop:
        magnitude = weight.abs().flatten()
        threshold = magnitude.kthvalue(drop).values
        kept = magnitude >= threshold
        equal = (magnitude == threshold).nonzero().squeeze(1)
        kept[equal[: drop - int((~kept).sum())]] = False
    return kept.view(weight.shape).cpu()
