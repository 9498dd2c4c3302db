"""Scores and tests of the groups that a run averages apart: levels of training data, families of languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nspec.analysis.blocks import families_of, grouping_of
from nspec.analysis.mantel import holm
from nspec.mt.groups import FAMILY, LEVEL, families, kind_of_group
from nspec.report import words
from nspec.report.cells import score_cell
from nspec.report.run_data import METRICS, RunData
from nspec.report.sections.relations import GROUPINGS

HOW_TO = (
    "the scores are of an older version, which did not test {what}; `nspec evaluate CONFIG --redo score` makes them anew "
    "from the same translations, in seconds"
)


def has_groups(data: RunData) -> bool:
    """Whether all scores of the run are of a version that averages levels and families."""
    return bool(data.scored) and all("groups" in scores for scores in data.scored.values())


def members(data: RunData, kind: str) -> dict[str, list[str]]:
    """The directions of each group of a kind that every scored system has; empty where there are none."""
    if not has_groups(data):
        return {}
    first, *others = (scores["groups"] for scores in data.scored.values())
    return {
        group: list(tasks)
        for group, tasks in first.items()
        if kind_of_group(group)[0] == kind and all(group in other for other in others)
    }


def group_tables(data: RunData, kind: str, heads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tables of all groups of a kind: first of whole groups, then of the directions from and to the pivot.

    Each table is of one metric, a row for each scored system, with p values adjusted by Holm's method over all tests of
    the table. Its arrows go by the adjusted values.

    Args:
        data: a run for which :func:`members` has groups.
        kind: ``level`` or ``family``.
        heads: of the columns: ``name``, as groups are called, ``title`` and whatever else the caller needs.

    Returns:
        ``heads``; ``parts``, each with ``side`` (such as ``en→x``, empty for whole groups), ``heads`` and ``tables``.
    """
    averages = [average for scores in data.scored.values() for average in scores["average"]]
    found = [kind_of_group(average) for average in dict.fromkeys(averages)]
    sides = dict.fromkeys(side for of, _, side in found if of == kind)
    parts = []
    for side in sides:
        there = {name for of, name, own in found if (of, own) == (kind, side)}
        columns = [head for head in heads if head["name"] in there]
        names = [f"{kind}:{head['name']}{f'/{side}' if side else ''}" for head in columns]
        tables = [_table(data, metric, names) for metric in METRICS]
        parts.append({"side": words.group_name(side) if side else "", "heads": columns, "tables": tables})
    return {"heads": list(heads), "parts": parts}


def _table(data: RunData, metric: str, averages: Sequence[str]) -> dict[str, Any]:
    entries = {name: [scores["average"].get(a) for a in averages] for name, scores in data.scored.items()}
    tests = [entry["baseline"] for row in entries.values() for entry in row if entry and entry.get("baseline")]
    adjusted = iter(holm([words.p_value(test, metric) for test in tests]).tolist() if tests else [])
    several = len(entries) > 1
    highest = [
        max((entry[metric] for entry in column if entry), default=None) if several else None
        for column in zip(*entries.values())
    ]
    rows = []
    for name, row in entries.items():
        cells = []
        for average, entry, best in zip(averages, row, highest):
            about = f"{data.name(name)}, average of {words.group_name(average)}"
            cell = score_cell(data, entry, metric, best, about) | {"holm": ""}
            test = entry.get("baseline") if entry else None
            if test:
                p = next(adjusted)
                cell |= {"holm": words.p_text(p).removeprefix("p ").removeprefix("= ")}
                cell["mark"] = words.sign(test[f"{metric}_delta"], p)
                cell["title"] += f"; adjusted by Holm's method {words.p_text(p)}"
            cells.append(cell)
        rows.append({"name": data.short(name), "is_baseline": name == data.baseline, "cells": cells})
    return {"metric": data.metric_names[metric], "rows": rows, "tests": len(tests)}


def level_tables(data: RunData, heads: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The tables of levels; None where not every system has been scored by level.

    Args:
        data: the run.
        heads: the levels, with ``name``.
    """
    found = members(data, LEVEL)
    if not all(f"{LEVEL}:{head['name']}" in found for head in heads):
        return None
    return group_tables(data, LEVEL, heads)


def family_section(data: RunData) -> dict[str, Any] | None:
    """The tables of families; None where the run has no two families.

    Returns:
        ``reason``: why there are no tables, else empty; those of :func:`group_tables`, ``about``: the languages of each
        family, and ``grouping`` otherwise.
    """
    if not has_groups(data):
        return {"reason": f"Not shown: {HOW_TO.format(what='families')}."} if _may_have_families(data) else None
    found = members(data, FAMILY)
    if not found:
        return None
    family_of = families_of(data.tasks, data.pivot)
    heads, about = [], []
    for group, tasks in found.items():
        name = kind_of_group(group)[1]
        number = f"{len(tasks)} direction{'s' if len(tasks) != 1 else ''}"
        codes = [code for code in sorted(_languages(data)) if family_of(code) == name]
        heads.append({"name": name, "title": f"{number}: {', '.join(tasks)}"})
        about.append(f"{name} {', '.join(codes)} ({number})")
    named = GROUPINGS[grouping_of(_languages(data))]
    return {"reason": "", "about": "; ".join(about), "grouping": named, **group_tables(data, FAMILY, heads)}


def _languages(data: RunData) -> set[str]:
    return {code for task in data.tasks for code in task.split("-")} - {data.pivot}


def _may_have_families(data: RunData) -> bool:
    tasks = [task for task in data.tasks if any(task in s["tasks"] for s in data.scored.values())]
    return bool(families(tasks, data.pivot, families_of(tasks, data.pivot)))
