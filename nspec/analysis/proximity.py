"""Whether the overlap of masks reflects how closely languages are related: a Mantel test for every layer.

In each layer, and for directions from the pivot and to the pivot apart, languages are compared by their masks (1 - IoU)
and by their place in the tree of languages. The pivot itself is in every direction, so it is no object of these tests.

IoU grows with density (:func:`nspec.analysis.overlap.chance_iou`), and densities of languages may differ, as between much
and little training data. So a second test holds density constant: a partial one whose control is the distance that
independent masks of the same densities would have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
from scipy import stats

from nspec.analysis import languages, mantel
from nspec.analysis.overlap import (
    Floats,
    Masks,
    Side,
    chance_iou,
    density,
    layer_iou,
    layer_side,
    sort_layers,
)
from nspec.mt.languages import languages_of_task

Direction = Literal["from", "to"]
FEWEST = 4  # languages of a test; three have six relabellings, so no p value below 1/6


@dataclass(frozen=True)
class LayerProximity:
    """One layer and direction type.

    Attributes:
        layer: qualified name of fc1.
        side: side of the model.
        direction: ``from`` the pivot (the other language is the target) or ``to`` it (it is the source).
        test: mask distance against genetic distance; None where no correlation is defined.
        reason: why there is no test; else empty.
        partial: the same with a control; None without one, or where it is not defined.
        p_holm: p of ``test`` adjusted over all tests of the answer by Holm's method; NaN without a test.
        p_bh: by Benjamini and Hochberg's.
        partial_p_holm: p of ``partial`` adjusted by Holm's method over all partial tests of the answer; NaN without one.
        within: mean IoU of two languages of one group; NaN where there are none.
        across: mean IoU of two languages of different groups; NaN likewise.
        beside: the two means by each other grouping that knows these languages and divides them differently.
        density: ``test`` with density held constant; None where that was not asked for, all have the same density, or it
            is not defined.
        density_p_holm: p of ``density`` adjusted by Holm's method over all such tests of the answer; NaN without one.
    """

    layer: str
    side: Side
    direction: Direction
    test: mantel.MantelResult | None
    reason: str
    partial: mantel.MantelResult | None
    p_holm: float
    p_bh: float
    partial_p_holm: float
    within: float
    across: float
    beside: dict[languages.Grouping, tuple[float, float]] = field(default_factory=dict)
    density: mantel.MantelResult | None = None
    density_p_holm: float = math.nan


@dataclass(frozen=True)
class Proximity:
    """All layers and direction types.

    Attributes:
        pivot: the language that directions come from and go to.
        grouping: what ``within`` and ``across`` mean; see :func:`nspec.analysis.languages.group_of`.
        languages: by direction type, the other languages as the tasks name them, sorted; a direction type that the masks
            do not have is not there.
        layers: the encoder from bottom to top, then the decoder; within a layer, from the pivot first.
    """

    pivot: str
    grouping: languages.Grouping
    languages: dict[Direction, tuple[str, ...]]
    layers: tuple[LayerProximity, ...]


def across_pivot(masks: Masks, pivot: str) -> dict[Direction, tuple[str, ...]]:
    """By direction type, the languages that the pivot is joined with; a type without tasks is not there.

    Raises:
        ValueError: no task has the pivot.
    """
    pairs = [languages_of_task(task) for task in masks.tasks]
    found: dict[Direction, tuple[str, ...]] = {
        "from": tuple(sorted(target for source, target in pairs if source == pivot)),
        "to": tuple(sorted(source for source, target in pairs if target == pivot)),
    }
    found = {direction: codes for direction, codes in found.items() if codes}
    if not found:
        raise ValueError(f"no direction is from or to {pivot!r}; the masks are of {', '.join(masks.tasks)}")
    return found


def task_name(direction: Direction, pivot: str, code: str) -> str:
    """``en-de`` for ``from``, ``en``, ``de``; ``de-en`` for ``to``."""
    return f"{pivot}-{code}" if direction == "from" else f"{code}-{pivot}"


def mask_iou(masks: Masks, layers: Sequence[str], direction: Direction, pivot: str, codes: Sequence[str]) -> Floats:
    """IoU of the masks of every two languages in each layer: float64 [layers, codes, codes]."""
    return layer_iou(masks, layers, [task_name(direction, pivot, code) for code in codes])


def mask_chance(masks: Masks, layers: Sequence[str], direction: Direction, pivot: str, codes: Sequence[str]) -> Floats:
    """What :func:`mask_iou` would be if neurons were drawn independently: by density alone."""
    shares = density(masks, layers, [task_name(direction, pivot, code) for code in codes])
    found = np.stack([chance_iou(column) for column in shares.T])
    found[:, range(len(codes)), range(len(codes))] = 1.0
    return found


Similarity = Callable[[Any, Sequence[str], Direction, str, Sequence[str]], Floats]
"""What :func:`mask_iou` is: how alike two languages are in each layer, float64 [layers, codes, codes], 1 for the same."""


def within_across(iou: Floats, groups: Sequence[str]) -> tuple[float, float]:
    """Mean IoU over the pairs of one group, and over those of two; NaN where there are none.

    Args:
        iou: float64 [n, n], symmetric.
        groups: name of the group of each language, n of them; empty where it is not known, which leaves its pairs out.
    """
    rows, columns = np.triu_indices(len(groups), 1)
    names = np.array(groups)
    grouped = (names[rows] != "") & (names[columns] != "")
    same = names[rows] == names[columns]
    pairs = iou[rows, columns]
    within, across = (
        float(pairs[chosen].mean()) if chosen.any() else math.nan for chosen in (grouped & same, grouped & ~same)
    )
    return within, across


def groups_of(codes: Sequence[str], grouping: languages.Grouping) -> list[str]:
    """The name of the group of each language; empty where it has none or is not known, as with distances of one's own."""
    return [languages.known_group(code, grouping) for code in codes]


def _other_groupings(codes: Sequence[str], grouping: languages.Grouping) -> dict[languages.Grouping, list[str]]:
    """Groupings that know all these languages, and divide them as neither the chosen one does nor one before it."""
    seen, found = {_partition(groups_of(codes, grouping))}, {}
    for other in get_args(languages.Grouping):
        groups = groups_of(codes, other)
        if all(groups) and len(set(groups)) > 1 and _partition(groups) not in seen:
            seen.add(_partition(groups))
            found[other] = groups
    return found


def _partition(groups: Sequence[str]) -> tuple[int, ...]:
    """Where each one's group is seen first: the same for two groupings that differ in names alone."""
    return tuple(groups.index(name) for name in groups)


def proximity(
    masks: Masks,
    pivot: str,
    *,
    similarity: Similarity = mask_iou,
    expected: Similarity | None = None,
    grouping: languages.Grouping = "branch",
    distances: Callable[[Sequence[str]], Floats] = languages.genetic_distances,
    control: Callable[[Sequence[str]], Floats | None] | None = None,
    method: mantel.Correlation = "spearman",
    alternative: mantel.Alternative = "greater",
    permutations: int = 9999,
    seed: int = 0,
    level: float = 0.95,
) -> Proximity:
    """Tests in every layer whether related languages keep the same neurons.

    Ranks are the default, for distances in a tree say which pair is closer rather than by how much. p values are
    adjusted over all layers and direction types at once.

    Args:
        masks: of tasks ``source-target``; or what ``similarity`` takes, such as
            :class:`~nspec.analysis.heads.HeadImportance`.
        pivot: the language that all of them share; tasks without it are left out.
        similarity: of every two languages in each layer; :func:`mask_iou` by default.
        expected: what ``similarity`` would be by density alone, :func:`mask_chance` of masks, for tests with that held
            constant; None: there are none.
        grouping: of languages, for the means within and across, in which languages that the tree lacks have no part.
        distances: distance of every two languages of a list, float [n, n]; in the tree of
            :mod:`nspec.analysis.lineages` by default.
        control: a third distance for partial tests, such as :func:`nspec.analysis.languages.script_distances`; it may
            answer None for languages that it cannot tell apart, and there is no partial test of those then.
        method: of correlation; see :func:`nspec.analysis.mantel.mantel`.
        alternative: ``greater``: languages that are far apart share fewer neurons.
        permutations: at most so many relabellings a test.
        seed: of the relabellings.
        level: confidence of the intervals.

    Raises:
        ValueError: no task has the pivot, a direction type has fewer than 4 languages, a language is not known, all
            languages are equally far apart, or an option is out of range.
    """
    codes = across_pivot(masks, pivot)
    for direction, names in codes.items():
        if len(names) < FEWEST:
            found = f"{len(names)} language{'s' if len(names) > 1 else ''} ({', '.join(names)}) {direction} {pivot}"
            raise ValueError(f"the masks are of {found}, expected {FEWEST} or more to test proximity")
    layers = sort_layers(masks.layers)
    found_by: dict[tuple[str, Direction], LayerProximity] = {}
    options = {"method": method, "alternative": alternative, "permutations": permutations, "seed": seed, "level": level}
    for direction, names in codes.items():
        genetic = distances(names)
        if mantel.constant(mantel.condensed(genetic)):
            raise ValueError(f"{', '.join(names)} are all equally far apart, so overlap cannot follow their proximity")
        third = control(names) if control else None
        groups = groups_of(names, grouping)
        others = _other_groupings(names, grouping)
        chances = expected(masks, layers, direction, pivot, names) if expected else [None] * len(layers)
        for layer, iou, chance in zip(layers, similarity(masks, layers, direction, pivot, names), chances):
            test, reason, partial, held = None, "", None, None
            if mantel.constant(mantel.condensed(1 - iou)):
                reason = "every two masks overlap alike"
            else:
                test = mantel.mantel(1 - iou, genetic, **options)  # type: ignore[arg-type]
                if third is not None and math.isfinite(mantel.correlation([1 - iou, genetic, third], method)):
                    partial = mantel.mantel(1 - iou, genetic, control=third, **options)  # type: ignore[arg-type]
                if chance is not None and math.isfinite(mantel.correlation([1 - iou, genetic, 1 - chance], method)):
                    held = mantel.mantel(1 - iou, genetic, control=1 - chance, **options)  # type: ignore[arg-type]
            nan = math.nan
            found_by[layer, direction] = LayerProximity(
                *(layer, layer_side(layer), direction, test, reason, partial, nan, nan, nan),
                *within_across(iou, groups),
                {name: within_across(iou, other) for name, other in others.items()},
                held,
            )
    rows = [found_by[layer, direction] for layer in layers for direction in codes]
    return Proximity(pivot, grouping, codes, tuple(_adjusted(rows)))


def _adjusted(rows: Sequence[LayerProximity]) -> list[LayerProximity]:
    p = [row.test.p for row in rows if row.test]
    adjusted = iter(zip(mantel.holm(p), stats.false_discovery_control(p)))
    partial = iter(mantel.holm([row.partial.p for row in rows if row.partial]))
    held = iter(mantel.holm([row.density.p for row in rows if row.density]))
    done = []
    for row in rows:
        strict, mild = next(adjusted) if row.test else (math.nan, math.nan)
        own = next(partial) if row.partial else math.nan
        adjusted_p = {"p_holm": strict, "p_bh": mild, "partial_p_holm": own}
        adjusted_p["density_p_holm"] = next(held) if row.density else math.nan
        done.append(replace(row, **{name: float(p) for name, p in adjusted_p.items()}))  # type: ignore[arg-type]
    return done
