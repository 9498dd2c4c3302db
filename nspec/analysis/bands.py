"""The order of directions in a figure, in bands of related languages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nspec.analysis.languages import Grouping, known_group, language
from nspec.analysis.lineages import EC30_GROUPS
from nspec.mt.languages import languages_of_task

OTHER = "other"


@dataclass(frozen=True)
class Band:
    """Directions that stand together."""

    name: str  # of the group of languages
    part: int  # 0 from the pivot, 1 to it, 2 without it
    first: int  # place of its first direction
    size: int  # number of its directions


def grouping_of(codes: Iterable[str]) -> Grouping:
    """EC30's own groups where all languages are of EC30, else branches."""
    return "ec30" if all(known_group(code, "ec30") for code in codes) else "branch"


def families_of(tasks: Iterable[str], pivot: str) -> Callable[[str], str]:
    """What names the family of a language wherever a run shows families: the groups of :func:`grouping_of`.

    Args:
        tasks: the directions of the run, whose languages beside the pivot decide on the grouping.
        pivot: see :func:`band_order`.

    Returns:
        A function from a language to the name of its group, empty where it is not known.
    """
    grouping = grouping_of({code for task in tasks for code in languages_of_task(task)} - {pivot})
    return functools.partial(known_group, grouping=grouping)


def _place(code: str, grouping: Grouping) -> tuple[int, str, str]:
    """Sorts groups, and names the group: EC30's in its order, branches by their families, unknown languages last."""
    name = known_group(code, grouping)
    if not name:
        return len(EC30_GROUPS), "", OTHER
    return (list(EC30_GROUPS).index(name), "", name) if grouping == "ec30" else (0, language(code).family, name)


def band_order(tasks: Iterable[str], pivot: str) -> tuple[list[str], list[Band]]:
    """Directions from the pivot, to it, then others, each by the groups of their languages.

    A direction without the pivot stands in the group of its source.

    Args:
        tasks: such as ``en-de``.
        pivot: the language that most directions share; empty: none.

    Returns:
        The directions in their order, and the bands from first to last.
    """
    tasks = list(tasks)
    grouping = grouping_of({code for task in tasks for code in languages_of_task(task)} - {pivot})

    def key(task: str) -> tuple[int, tuple[int, str, str], str, str]:
        source, target = languages_of_task(task)
        part = 0 if pivot and source == pivot else 1 if pivot and target == pivot else 2
        mine, other = (target, source) if part == 0 else (source, target)
        return part, _place(mine, grouping), mine, other

    keyed = sorted((key(task), task) for task in tasks)
    bands: list[Band] = []
    for number, ((part, (_, _, name), _, _), _) in enumerate(keyed):
        if bands and (bands[-1].part, bands[-1].name) == (part, name):
            last = bands.pop()
            bands.append(Band(name, part, last.first, last.size + 1))
        else:
            bands.append(Band(name, part, number, 1))
    return [task for _, task in keyed], bands
