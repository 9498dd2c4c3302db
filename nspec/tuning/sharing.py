"""What shares a layer or its numbers with a block whose neurons get their own: it would compute with them too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nspec.kernels.common.checks import PLAIN
from nspec.specialization.feed_forward import FeedForward
from nspec.specialization.layers import is_within
from nspec.specialization.quantised import is_packed

from .layers import layer_of


def check_apart(model: nn.Module, blocks: Sequence[FeedForward], parts: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError where a layer of these parts of blocks, or what is written into, is part of something else too.

    A whole block may be in several places: its neurons are those of all of them. Parameters may be views of one memory
    where no number is of two.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, list[str]] = {}
    owners: dict[int, dict[int, str]] = {}  # of each parameter the modules that have it
    for name, module in modules.items():
        places.setdefault(id(module), []).append(name)
        for attribute, parameter in module._parameters.items():
            owners.setdefault(id(parameter), {}).setdefault(id(module), f"{name}.{attribute}")
    taken: dict[int, FeedForward] = {}
    written: set[int] = set()
    for block in blocks:
        for layer in dict.fromkeys(layer_of(block, part) for part in parts[block.name]):
            names = places[id(layer)]
            if other := next((name for name in names if not is_within(name, block.parent, modules)), None):
                raise ValueError(
                    f"{other} is a layer of {block.name}'s block too: its neurons would be those of something else. Give "
                    "each a layer of its own, or put the module that holds the whole block in both places"
                )
            if (before := taken.setdefault(id(layer), block)) is not block:
                raise ValueError(
                    f"{names[0]} is in two blocks, those of {before.name} and {block.name}: leave one of them out of the "
                    "masks"
                )
            for attribute in ("weight",) if layer is block.fc2 else ("weight", "bias"):
                parameter = layer._parameters.get(attribute)
                if parameter is None or is_packed(layer):
                    continue
                written.add(id(parameter))
                if len(shared := owners[id(parameter)]) > 1:
                    raise ValueError(
                        f"{' and '.join(shared.values())} are one parameter: neurons of one layer would change the other. "
                        "Give each one of its own, or put the module that holds the whole block in both places"
                    )
    _check_memory(model, written)


def _check_memory(model: nn.Module, mine: set[int]) -> None:
    """Raises ValueError where a parameter among ``mine`` and another one have numbers in the same place of memory."""
    spans = []
    for name, parameter in model.named_parameters():
        if type(parameter) in PLAIN and not parameter.is_meta and parameter.numel() and parameter.data_ptr():
            first, last = parameter.data_ptr(), parameter.data_ptr() + _extent(parameter) * parameter.itemsize
            spans.append((str(parameter.device), first, last, name, parameter))
    spans.sort(key=lambda span: span[:3])
    before: list[tuple[str, int, int, str, nn.Parameter]] = []  # those that reach into what follows
    for span in spans:
        before = [one for one in before if one[0] == span[0] and one[2] > span[1]]
        for one in before:
            if (id(one[4]) in mine or id(span[4]) in mine) and _meet(one[4], span[4]):
                raise ValueError(
                    f"{one[3]} and {span[3]} are two parameters on one memory: neurons of one would change the other. Give "
                    "one of them numbers of its own, as in nn.Parameter(weight.detach().clone())"
                )
        before.append(span)


def _extent(tensor: Tensor) -> int:
    """How many places of memory there are from its first number to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


def _meet(a: Tensor, b: Tensor) -> bool:
    """Whether tensors whose memory overlaps have a number in common; those of halves of a matrix, say, only interleave."""
    start = min(a.data_ptr(), b.data_ptr())
    offsets = [(tensor.data_ptr() - start) // tensor.itemsize for tensor in (a, b)]
    if a.itemsize != b.itemsize or (a.is_contiguous() and b.is_contiguous()):
        return True
    marks = torch.zeros(max(at + _extent(tensor) for at, tensor in zip(offsets, (a, b))), dtype=torch.bool)
    marks.as_strided(a.shape, a.stride(), offsets[0]).fill_(True)
    return bool(marks.as_strided(b.shape, b.stride(), offsets[1]).any())
