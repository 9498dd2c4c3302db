"""How many neurons the tasks keep, and how far two tasks keep the same ones (IoU of their masks).

Masks are read through their mapping face only (``masks.tasks``, ``masks.layers``, ``masks[task][layer]`` bool [d_ff]),
so :class:`nspec.NeuronMasks` and anything shaped like it will do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from nspec.mt.languages import languages_of_task

Side = Literal["encoder", "decoder"]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Masks(Protocol):
    """What this module needs of :class:`nspec.NeuronMasks`."""

    @property
    def tasks(self) -> Sequence[str]: ...

    @property
    def layers(self) -> Sequence[str]: ...

    def __getitem__(self, task: str) -> Mapping[str, Any]: ...


def layer_side(layer: str) -> Side:
    """The side that a layer is on, by its qualified name (``model.encoder.layers.0.fc1``).

    Raises:
        ValueError: neither ``encoder`` nor ``decoder`` is a part of the name, or both are.

    Example:
        >>> layer_side("model.encoder.layers.0.fc1")
        'encoder'
    """
    parts = set(layer.split("."))
    sides: list[Side] = [side for side in ("encoder", "decoder") if side in parts]
    if len(sides) != 1:
        raise ValueError(f"layer {layer!r} names neither encoder nor decoder, unlike model.encoder.layers.0.fc1")
    return sides[0]


def sort_layers(layers: Iterable[str]) -> list[str]:
    """Layer names with numbers in numeric order (``layers.2`` before ``layers.10``), the encoder before the decoder.

    Example:
        >>> sort_layers(["decoder.0.fc1", "encoder.10.fc1", "encoder.2.fc1"])
        ['encoder.2.fc1', 'encoder.10.fc1', 'decoder.0.fc1']
    """

    def key(layer: str) -> tuple[bool, list[tuple[int, str]]]:
        parts = re.split(r"(\d+)", layer)
        return "decoder" in layer.split("."), [(int(p), "") if p.isdigit() else (-1, p) for p in parts]

    return sorted(layers, key=key)


def layer_numbers(layers: Sequence[str]) -> list[int]:
    """The number of each layer on its side, from 0: that in its name, so that it holds for a part of them.

    Args:
        layers: of one side, such as ``model.encoder.layers.3.fc1``, whose number is 3: the first after the side.
            Where names have no numbers or share them, the places in this list are taken.

    Example:
        >>> layer_numbers(["model.encoder.layers.3.fc1", "model.encoder.layers.5.fc1"])
        [3, 5]
    """
    found = [re.search(r"(?:^|\.)(?:encoder|decoder)\.(?:.*?\.)?(\d+)(?:\.|$)", layer) for layer in layers]
    numbers = [int(match[1]) for match in found if match]
    return numbers if len(set(numbers)) == len(layers) else list(range(len(layers)))


def side_layers(masks: Masks, side: Side) -> list[str]:
    """The layers of one side, from bottom to top; empty where there are none.

    Raises:
        ValueError: a layer whose side its name does not say.

    Example:
        >>> of_layers = {"encoder.0.fc1": torch.ones(2).bool(), "decoder.0.fc1": torch.ones(2).bool()}
        >>> side_layers(nspec.NeuronMasks({"en-de": of_layers}), "decoder")
        ['decoder.0.fc1']
    """
    return [layer for layer in sort_layers(masks.layers) if layer_side(layer) == side]


def layer_matrix(masks: Masks, layer: str, tasks: Sequence[str] | None = None) -> Bools:
    """The masks of one layer as rows: bool [tasks, d_ff], tasks in the order given (else that of the masks).

    Example:
        >>> masks = {"en-de": {"fc1": torch.tensor([True, False])}, "en-fr": {"fc1": torch.tensor([True, True])}}
        >>> layer_matrix(nspec.NeuronMasks(masks), "fc1").tolist()
        [[True, False], [True, True]]
    """
    return np.stack([np.asarray(masks[task][layer], dtype=np.bool_) for task in (tasks or masks.tasks)])


def density(masks: Masks, layers: Sequence[str] | None = None, tasks: Sequence[str] | None = None) -> Floats:
    """The share of neurons that a task keeps: float64 [tasks, layers], in [0, 1].

    Args:
        masks: the masks.
        layers: columns of the answer are in this order; all, as :func:`sort_layers` orders them, by default.
        tasks: rows likewise; by default those of the masks.

    Example:
        >>> masks = {"en-de": {"fc1": torch.tensor([True, False])}, "en-fr": {"fc1": torch.tensor([True, True])}}
        >>> density(nspec.NeuronMasks(masks)).tolist()
        [[0.5], [1.0]]
    """
    layers = sort_layers(masks.layers) if layers is None else layers
    return np.stack([layer_matrix(masks, layer, tasks).mean(1) for layer in layers], axis=1)


def pairwise_iou(matrix: Bools) -> Floats:
    """Intersection over union, |A and B| / |A or B|, of every two rows.

    Two empty masks are equal, so their IoU is 1.

    Args:
        matrix: bool [tasks, d_ff].

    Returns:
        float64 [tasks, tasks], symmetric, with ones on the diagonal.

    Example:
        >>> pairwise_iou(np.array([[True, True, False], [False, True, True]]))[0, 1].round(3).item()
        0.333
    """
    rows = matrix.astype(np.float64)  # a float product runs in BLAS; counts stay exact
    both = rows @ rows.T
    size = np.diag(both)
    either = size[:, None] + size[None, :] - both
    return np.where(either > 0, both / np.maximum(either, 1.0), 1.0)


def layer_iou(masks: Masks, layers: Sequence[str], tasks: Sequence[str] | None = None) -> Floats:
    """The pairwise IoU of tasks in each layer: float64 [layers, tasks, tasks].

    Example:
        >>> masks = {"en-de": {"fc1": torch.tensor([True, False])}, "en-fr": {"fc1": torch.tensor([True, True])}}
        >>> layer_iou(nspec.NeuronMasks(masks), ["fc1"]).tolist()
        [[[1.0, 0.5], [0.5, 1.0]]]
    """
    return np.stack([pairwise_iou(layer_matrix(masks, layer, tasks)) for layer in layers])


def mean_pairwise(iou: Floats) -> Floats:
    """The mean over all pairs of two different tasks.

    Args:
        iou: float64 [..., tasks, tasks], symmetric.

    Returns:
        float64 [...]; NaN where there is only one task.

    Example:
        >>> mean_pairwise(np.array([[1.0, 0.5, 0.25], [0.5, 1.0, 0.75], [0.25, 0.75, 1.0]])).item()
        0.5
    """
    tasks = iou.shape[-1]
    if tasks < 2:
        return np.full(iou.shape[:-1], np.nan)
    above = np.triu_indices(tasks, 1)
    return iou[..., above[0], above[1]].mean(-1)


def chance_iou(shares: Floats) -> Floats:
    """The IoU that masks of these densities have when their neurons are drawn independently, to first order.

    Dense masks overlap by chance alone: at a density of 0.78 about 0.64. An IoU says something about tasks only where
    it is above this.

    Args:
        shares: float64 [tasks], densities of one layer.

    Returns:
        float64 [tasks, tasks]: ab / (a + b - ab); 1 where both are empty. The diagonal means nothing.

    Example:
        >>> chance_iou(np.array([0.78, 0.78]))[0, 1].round(2).item()
        0.64
    """
    both = shares[:, None] * shares[None, :]
    either = shares[:, None] + shares[None, :] - both
    return np.where(either > 0, both / np.where(either > 0, either, 1.0), 1.0)


def order_tasks(tasks: Iterable[str], pivot: str) -> list[str]:
    """Tasks as figures show them: from the pivot by target language, to the pivot by source language, then others.

    Example:
        >>> order_tasks(["fr-en", "en-fr", "de-fr", "en-de"], pivot="en")
        ['en-de', 'en-fr', 'fr-en', 'de-fr']
    """

    def key(task: str) -> tuple[int, str, str]:
        source, target = languages_of_task(task)
        if pivot and source == pivot:
            return 0, target, source
        if pivot and target == pivot:
            return 1, source, target
        return 2, source, target

    return sorted(tasks, key=key)
