"""Which neurons a task keeps: the smallest set that covers a share k of its activations."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor

from .counts import ActivationCounts, total
from .masks import NeuronMasks


def select(counts: ActivationCounts, k: float = 0.95) -> NeuronMasks:
    """Keeps, per task and layer, the most active neurons that together hold a share ``k`` of all activations.

    Counts are sorted in descending order, ties by the lower index, and the smallest prefix whose sum is at least k of
    the layer's total is kept; the neuron that crosses the line is kept, and a total reached exactly adds nobody. So
    k = 1 keeps every neuron that fired at all (Tan et al. 2024, section 3; their EC30 runs use k = 0.95).

    The line is computed in integers from the decimal digits of ``k``: 0.95 of 100 is 95, not 95 and a bit.

    Args:
        counts: activation counts of each task.
        k: in (0, 1].

    Raises:
        ValueError: k outside (0, 1], or a layer in which nothing fired for a task; the message names both.
        TypeError: k is no number.

    Example:
        >>> counts = ActivationCounts({"en-de": {"fc1": torch.tensor([1, 6, 3])}})
        >>> select(counts, k=0.9)["en-de"]["fc1"].tolist()
        [False, True, True]
    """
    if not isinstance(k, (int, float)) or isinstance(k, bool):
        raise TypeError(f"k is {k!r}, expected a number in (0, 1]")
    if not 0 < k <= 1:
        raise ValueError(f"k is {k}, expected a number in (0, 1]")
    share = Fraction(repr(float(k)))
    return NeuronMasks(
        {t: {layer: _keep(count, share, t, layer) for layer, count in layers.items()} for t, layers in counts.items()}
    )


def _keep(count: Tensor, share: Fraction, task: str, layer: str) -> Tensor:
    fired = total(count)
    if fired == 0:
        raise ValueError(
            f"nothing fired in layer {layer} for task {task}: every count is 0. Profile it on text that is not empty, "
            "leave out a layer that got no tokens (counts.only(...)), or check the model (a dead layer, weights that are "
            "not trained or not finite)"
        )
    line = -(-share.numerator * fired // share.denominator)  # the smallest integer >= share * fired
    order = torch.sort(count, descending=True, stable=True).indices
    if fired < 2**63:
        kept = int((count[order].cumsum(0) < line).sum()) + 1
    else:
        kept = sum(reached < line for reached in accumulate(count[order].tolist())) + 1
    return torch.zeros_like(count, dtype=torch.bool).index_fill_(0, order[:kept], True)


def random_masks(masks: NeuronMasks, seed: int) -> NeuronMasks:
    """Masks that keep as many neurons of each task and layer as ``masks`` does, drawn uniformly.

    Args:
        masks: whose sizes are taken.
        seed: the same seed gives the same masks.

    Example:
        >>> masks = NeuronMasks({"en-de": {"fc1": torch.tensor([True, True, False, False])}})
        >>> drawn = random_masks(masks, seed=1)
        >>> int(drawn["en-de"]["fc1"].sum()), drawn.layers
        (2, ['fc1'])
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(mask: Tensor) -> Tensor:
        chosen = torch.randperm(len(mask), generator=generator)[: int(mask.sum())]
        return torch.zeros_like(mask).index_fill_(0, chosen, True)

    return NeuronMasks({task: {layer: draw(mask) for layer, mask in layers.items()} for task, layers in masks.items()})
