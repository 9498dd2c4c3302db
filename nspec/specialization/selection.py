"""Which neurons a task keeps: the rules of ``select``, and the one of the paper, a share k of the activations."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from .counts import ActivationCounts, total
from .lape import lape
from .masks import NeuronMasks
from .random_sets import random_masks, random_share
from .ranking import specific, top
from .scores import NeuronScores

Rule = Literal["share", "lape", "top", "specific", "random"]
_TAKES: dict[str, tuple[str, ...]] = {
    "share": ("k",),
    "lape": ("rate",),
    "top": ("share", "by_layer"),
    "specific": ("share", "by_layer"),
    "random": ("share", "like", "by_layer", "seed"),
}
_OF_SCORES = ("top", "random")
_K = 0.95


def select(
    counts: ActivationCounts | NeuronScores,
    k: float = _K,
    *,
    rule: Rule = "share",
    rate: float | None = None,
    share: float | None = None,
    like: NeuronMasks | None = None,
    by_layer: bool | None = None,
    seed: int | None = None,
) -> NeuronMasks:
    """Chooses the neurons of each task.

    * ``share``: per task and layer, the most active neurons that together hold a share ``k`` of all activations (Tan et
      al. 2024, section 3; their EC30 runs use k = 0.95). Counts are sorted in descending order, ties by the lower index,
      and the smallest prefix whose sum is at least k of the layer's total is kept; the neuron that crosses the line is
      kept, and a total reached exactly adds nobody. So k = 1 keeps every neuron that fired at all. The line is computed in
      integers from the decimal digits of ``k``: 0.95 of 100 is 95, not 95 and a bit.
    * ``lape``: of the whole model the ``rate`` of neurons with the lowest entropy over tasks, each for all tasks that it
      fires often for (Tang et al. 2024; :func:`nspec.specialization.lape.lape` has it to the letter).
    * ``top``: per task and layer, the ``share`` of neurons that fire most often; of scores, those of the highest.
    * ``specific``: per task and layer, the ``share`` of neurons with the highest ratio of the task's frequency to the mean
      of the other tasks' (:func:`nspec.specialization.ranking.specific` has what is done about zeros).
    * ``random``: per task and layer, a ``share`` drawn uniformly, or as many neurons as the masks ``like`` keep.

    Of the last three ``by_layer=False`` takes the share, or the number, of the whole model instead. A share is rounded to
    whole neurons, halves up, and at least 1; ties go to the earlier layer, then to the lower index. What did not fire for a
    task is not kept by ``share``, ``top`` and ``specific``. All but ``share`` may leave a task without neurons in a layer,
    ``lape`` in all layers.

    Args:
        counts: activation counts of each task; of ``top`` and ``random`` also scores. ``lape``, ``specific`` and
            ``by_layer=False`` need the numbers of tokens.
        k: of ``share``: in (0, 1].
        rule: see above.
        rate: of ``lape``: in (0, 1]; None: 0.01.
        share: of ``top``, ``specific`` and ``random``: in (0, 1]; None: 0.01.
        like: of ``random``, in place of ``share``: masks of the same tasks and layers, whose sizes are taken.
        by_layer: of ``top``, ``specific`` and ``random``; None: True.
        seed: of ``random``: the same seed gives the same masks; None: 0.

    Raises:
        ValueError: an unknown rule, an option that is not of the rule, a number outside (0, 1], too few tasks, or numbers
            of tokens that are not known; a layer (``share``), or a task, for which nothing fired: the message names it.
        TypeError: a value of another type, or a rule of counts that is given scores.

    Warns:
        UserWarning: as in :func:`nspec.specialization.lape.lape`.

    Example:
        >>> counts = ActivationCounts({"en-de": {"fc1": torch.tensor([1, 6, 3])}})
        >>> select(counts, k=0.9)["en-de"]["fc1"].tolist()
        [False, True, True]
    """
    given = {"rate": rate, "share": share, "like": like, "by_layer": by_layer, "seed": seed}
    _check(counts, rule, {"k": None if k == _K else k, **given})
    by_layer = True if by_layer is None else by_layer
    if rule == "share":
        part = _fraction("k", k)
        keep = {t: {layer: _keep(c, part, t, layer) for layer, c in layers.items()} for t, layers in counts.items()}
        return NeuronMasks(keep)
    if rule == "lape":
        rate = 0.01 if rate is None else rate
        _fraction("rate", rate)
        return lape(counts, rate)  # type: ignore[arg-type]
    part = _fraction("share", 0.01 if share is None else share)
    if rule == "top":
        return top(counts, part, by_layer)
    if rule == "specific":
        return specific(counts, part, by_layer)  # type: ignore[arg-type]
    seed = 0 if seed is None else seed
    widths = {layer: len(value) for layer, value in counts[counts.tasks[0]].items()}
    if like is None:
        return random_share(counts.tasks, widths, part, seed, by_layer=by_layer)
    if like.tasks != counts.tasks or {layer: len(mask) for layer, mask in like[like.tasks[0]].items()} != widths:
        raise ValueError(
            f"like has {len(like.tasks)} tasks and {len(like.layers)} layers that are not those of the counts "
            f"({len(counts.tasks)} tasks, {len(widths)} layers): expected the same, in one order and of the same widths"
        )
    return random_masks(like, seed, by_layer=by_layer)


def _check(counts: Any, rule: Any, options: dict[str, Any]) -> None:
    if not isinstance(counts, (ActivationCounts, NeuronScores)):
        raise TypeError(f"counts is a {type(counts).__name__}, expected nspec.ActivationCounts or nspec.NeuronScores")
    if not isinstance(rule, str) or rule not in _TAKES:
        raise ValueError(f"rule is {rule!r}, expected one of {', '.join(map(repr, _TAKES))}")
    if other := [name for name, value in options.items() if value is not None and name not in _TAKES[rule]]:
        raise ValueError(f"{other[0]} is no option of rule {rule!r}, which takes {', '.join(_TAKES[rule])}")
    if isinstance(counts, NeuronScores) and rule not in _OF_SCORES:
        raise TypeError(
            f"rule {rule!r} is one of activation counts, and was given scores ({counts.score}): expected one of "
            f"{', '.join(map(repr, _OF_SCORES))}, or nspec.profile(...) without a score"
        )
    if not isinstance(options["by_layer"], (bool, type(None))):
        raise TypeError(f"by_layer is {options['by_layer']!r}, expected True or False")
    if options["like"] is not None:
        if not isinstance(options["like"], NeuronMasks):
            raise TypeError(f"like is a {type(options['like']).__name__}, expected nspec.NeuronMasks")
        if options["share"] is not None:
            raise ValueError(
                "share and like are both given, expected one of them: like says how many neurons are drawn"
            )


def _fraction(name: str, value: Any) -> Fraction:
    """The number that its decimal digits say."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected a number in (0, 1]")
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}, expected a number in (0, 1]")
    return Fraction(repr(float(value)))


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
