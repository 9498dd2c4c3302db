"""Selection by rank: the neurons of a task with the largest numbers, in each layer or in the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from .counts import ActivationCounts
from .masks import NeuronMasks
from .scores import NeuronScores


def top(counts: ActivationCounts | NeuronScores, share: Fraction, by_layer: bool) -> NeuronMasks:
    """The most active neurons of each task, or those of the highest scores.

    Args:
        counts: or scores.
        share: of each layer, or of the whole model.
        by_layer: which of the two. Over the whole model frequencies, or mean scores, are compared.

    Raises:
        ValueError: nothing fired in any layer for a task; the number of tokens is needed, and is not known.
    """
    if by_layer:
        values: Mapping[str, Mapping[str, Tensor]] = counts  # of as many tokens each
    else:
        values = counts.rates() if isinstance(counts, ActivationCounts) else counts.means()
    return largest(values, share, by_layer)


def specific(counts: ActivationCounts, share: Fraction, by_layer: bool) -> NeuronMasks:
    """The neurons that fire for a task more often than for the others, by the ratio of the two frequencies.

    A frequency is (count + 1/2) / (tokens + 1), so that no ratio is infinite and a neuron that fired once is no specialist;
    that of the others is their mean, each task weighing the same. A neuron that did not fire for the task is not kept. A
    task of which a layer got no token has no frequency there, and is none of the others.

    Args:
        counts: of two tasks or more, with their numbers of tokens.
        share: of each layer, or of the whole model.
        by_layer: which of the two.

    Raises:
        ValueError: there is one task; a number of tokens is not known; a layer got tokens of one task alone; nothing fired
            in any layer for a task.
    """
    if len(counts.tasks) < 2:
        raise ValueError("rule 'specific' compares tasks, and the counts have one: profile several")
    counts.rates()  # raises where tokens are not known
    smoothed: dict[str, dict[str, Tensor]] = {task: {} for task in counts.tasks}
    for task, layers in counts.items():
        number = counts.tokens[task]
        for layer, count in layers.items():
            tokens = number[layer] if isinstance(number, dict) else number
            if tokens:
                smoothed[task][layer] = (count.double() + 0.5) / (tokens + 1)
    ratios: dict[str, dict[str, Tensor]] = {}
    for task, layers in counts.items():
        ratios[task] = {}
        for layer, count in layers.items():
            own = smoothed[task].get(layer)
            others = [of[layer] for other, of in smoothed.items() if other != task and layer in of]
            if own is None:
                ratios[task][layer] = torch.zeros(len(count), dtype=torch.float64)
                continue
            if not others:
                raise ValueError(
                    f"layer {layer} got tokens of task {task} alone, so there is no other to compare it with: leave the "
                    "layer out (counts.only(...)) or profile more text"
                )
            ratio = own / torch.stack(others).mean(0)
            ratios[task][layer] = ratio.masked_fill_(count == 0, 0)
    return largest(ratios, share, by_layer)


def number_of(share: Fraction, width: int) -> int:
    """A share of so many neurons: rounded, halves up, and at least 1."""
    return max(1, int(share * width + Fraction(1, 2)))


_SILENT = "profile it on text that is not empty, or check the model (weights that are not trained)"


def largest(
    values: Mapping[str, Mapping[str, Tensor]],
    share: Fraction,
    by_layer: bool,
    none: str = f"nothing fired in any layer for task {{}}: {_SILENT}",
) -> NeuronMasks:
    """For each task the largest values, of those above 0; ties go to the earlier layer, then to the lower index.

    Raises:
        ValueError: a task has none above 0: with the text ``none``, in which ``{}`` is the task.
    """
    masks = {}
    for task, layers in values.items():
        if by_layer:
            masks[task] = {layer: _first(value, number_of(share, len(value))) for layer, value in layers.items()}
        else:
            whole = torch.cat([*layers.values()])
            parts = _first(whole, number_of(share, len(whole))).split([len(value) for value in layers.values()])
            masks[task] = dict(zip(layers, parts))
        if not any(bool(mask.any()) for mask in masks[task].values()):
            raise ValueError(none.format(task))
    return NeuronMasks(masks)


def _first(values: Tensor, number: int) -> Tensor:
    order = torch.sort(values, descending=True, stable=True).indices[:number]
    return torch.zeros(len(values), dtype=torch.bool).index_fill_(0, order, True) & (values > 0)
