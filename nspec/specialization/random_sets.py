"""Neurons drawn at random: the control of every selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from .masks import NeuronMasks
from .ranking import number_of


def random_masks(masks: NeuronMasks, seed: int, *, by_layer: bool = True) -> NeuronMasks:
    """Masks that keep as many neurons of each task as ``masks`` does, drawn uniformly.

    Args:
        masks: whose sizes are taken.
        seed: the same seed gives the same masks.
        by_layer: whether each layer keeps as many as in ``masks``; else the whole model does, and a layer as many as
            chance gives it.

    Example:
        >>> masks = NeuronMasks({"en-de": {"fc1": torch.tensor([True, True, False, False])}})
        >>> int(random_masks(masks, seed=1)["en-de"]["fc1"].sum())
        2
    """
    generator = _generator(seed)
    drawn = {}
    for task, layers in masks.items():
        sizes = {layer: int(mask.sum()) for layer, mask in layers.items()}
        widths = {layer: len(mask) for layer, mask in layers.items()}
        drawn[task] = _drawn(widths, sizes if by_layer else sum(sizes.values()), generator)
    return NeuronMasks(drawn)


def random_share(
    tasks: Sequence[str], widths: Mapping[str, int], share: Fraction, seed: int, *, by_layer: bool
) -> NeuronMasks:
    """Masks of that share of each layer, or of the whole model, drawn uniformly for each task.

    Args:
        tasks: their names.
        widths: number of neurons of each layer.
        share: in (0, 1], rounded as in :func:`nspec.specialization.ranking.number_of`.
        seed: the same seed gives the same masks.
        by_layer: whether the share is of each layer.
    """
    generator = _generator(seed)
    by_width = {layer: number_of(share, width) for layer, width in widths.items()}
    sizes = by_width if by_layer else number_of(share, sum(widths.values()))
    return NeuronMasks({task: _drawn(widths, sizes, generator) for task in tasks})


def _generator(seed: int) -> torch.Generator:
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed is {seed!r}, expected a whole number")
    return torch.Generator().manual_seed(seed)


def _drawn(widths: Mapping[str, int], sizes: Mapping[str, int] | int, generator: torch.Generator) -> dict[str, Tensor]:
    """So many neurons of each layer; or so many of all layers together."""

    def draw(width: int, size: int) -> Tensor:
        chosen = torch.randperm(width, generator=generator)[:size]
        return torch.zeros(width, dtype=torch.bool).index_fill_(0, chosen, True)

    if isinstance(sizes, int):
        return dict(zip(widths, draw(sum(widths.values()), sizes).split([*widths.values()])))
    return {layer: draw(width, sizes[layer]) for layer, width in widths.items()}
