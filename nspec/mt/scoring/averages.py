"""Groups of directions that a run averages apart: by how much training text they have, and by family of language.

A group is called ``level:high`` or ``family:Germanic``; :func:`nspec.mt.scoring.scores.average_groups` adds its halves
``level:high/from_en`` and ``level:high/to_en``. Importing this module loads nothing heavy.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from nspec.mt.languages import languages_of_task

FACTOR = 2.0
"""Levels differ by more than this factor in training sentences."""

LEVEL, FAMILY = "level", "family"
AVERAGED_BY = (LEVEL, FAMILY)


def resource_levels(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Directions by level of training sentences, the largest first.

    Where data come in steps, as in EC30 (5M, 1M, 100k), levels are these: sizes are cut at the two widest gaps of more
    than :data:`FACTOR`; one such gap gives ``high`` and ``low``. Without gaps distinct sizes are cut in three equal parts,
    if the geometric means of neighbouring parts differ by more than the factor.

    Args:
        sizes: training sentences of each direction, positive.

    Returns:
        ``high``, ``medium`` and ``low``, or ``high`` and ``low``, each with its directions in the order given; empty where
        sizes differ too little.
    """
    distinct = sorted(set(sizes.values()), reverse=True)
    ratios = {place: distinct[place - 1] / distinct[place] for place in range(1, len(distinct))}
    gaps = sorted((place for place, ratio in ratios.items() if ratio > FACTOR), key=lambda place: -ratios[place])
    cuts = sorted(gaps[:2])
    if not cuts and len(distinct) >= 3:
        thirds = [round(len(distinct) / 3), round(2 * len(distinct) / 3)]
        means = [statistics.geometric_mean(part) for part in _parts(distinct, thirds)]
        if all(larger / smaller > FACTOR for larger, smaller in zip(means, means[1:])):
            cuts = thirds
    if not cuts:
        return {}
    names = ["high", "medium", "low"] if len(cuts) == 2 else ["high", "low"]
    return {
        name: [task for task, size in sizes.items() if size in part]
        for name, part in zip(names, _parts(distinct, cuts))
    }


def _parts(distinct: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    ends = [0, *cuts, len(distinct)]
    return [distinct[start:end] for start, end in zip(ends, ends[1:])]


def families(tasks: Iterable[str], pivot: str, family_of: Callable[[str], str]) -> dict[str, list[str]]:
    """Directions by family of their languages, the families in order of their names.

    The pivot says nothing of a direction, which belongs to the family of its other language; a direction without the
    pivot belongs to the families of both its languages.

    Args:
        tasks: such as ``en-de``.
        pivot: the language that directions go from and to; empty: none.
        family_of: the name of a language's family, empty where it is not known; such a language is in none.

    Returns:
        The families of two languages or more, each with its directions in the order given. Empty where all known
        languages are of one family: it would say what the average of all does.
    """
    tasks = list(tasks)
    languages = sorted({code for task in tasks for code in languages_of_task(task)} - {pivot})
    named = {code: name for code in languages if (name := family_of(code))}
    if len(set(named.values())) < 2:
        return {}
    found = {}
    for family in sorted(set(named.values())):
        members = {code for code, name in named.items() if name == family}
        if len(members) > 1:
            found[family] = [task for task in tasks if members.intersection(languages_of_task(task))]
    return found


def run_groups(
    tasks: Iterable[str], sizes: Mapping[str, int], pivot: str, family_of: Callable[[str], str]
) -> dict[str, list[str]]:
    """The groups that a run averages beside all directions and those from and to the pivot.

    Args:
        tasks: the directions that are scored.
        sizes: training sentences of each; a direction without any is in no level.
        pivot: see :func:`families`.
        family_of: see :func:`families`.

    Returns:
        ``level:<name>``, then ``family:<name>``, with their directions.
    """
    tasks = list(tasks)
    levels = resource_levels({task: sizes[task] for task in tasks if sizes.get(task, 0) > 0})
    found = {f"{LEVEL}:{name}": members for name, members in levels.items()}
    return found | {f"{FAMILY}:{name}": members for name, members in families(tasks, pivot, family_of).items()}


def kind_of_group(average: str) -> tuple[str, str, str]:
    """The parts of an average's name: ``level:high/from_en`` is ``("level", "high", "from_en")``.

    Returns:
        Kind, name and half; kind is empty for ``all``, ``from_en`` and names of other making, half for a whole group.
    """
    kind, colon, rest = average.partition(":")
    if not colon or kind not in AVERAGED_BY:
        return "", average, ""
    name, _, half = rest.partition("/")
    return kind, name, half
