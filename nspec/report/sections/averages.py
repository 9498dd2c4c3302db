"""Who gains and who loses: score changes by how much training text a direction has, and against bilingual models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nspec.mt.groups import resource_levels
from nspec.report import words
from nspec.report.run_data import METRICS, RunData
from nspec.report.sections import masks as figures
from nspec.report.sections.group_tables import HOW_TO, has_groups, level_tables


def changes(data: RunData, system: str, than: str, metric: str) -> dict[str, float]:
    """Score of ``system`` minus that of ``than`` in points, for each direction that both have been scored in."""
    one, other = (data.scored.get(name, {"tasks": {}})["tasks"] for name in (system, than))
    return {task: one[task][metric] - other[task][metric] for task in data.tasks if task in one and task in other}


def level_section(data: RunData) -> dict[str, Any]:
    """Every system against the baseline, by level of training pairs.

    Returns:
        ``reason``: why there are no levels, else empty; ``heads``, ``rows`` (mean changes), ``figure`` and ``tested``
        otherwise: the tables with tests, or None and ``how`` to get them where scores are of an older version.
    """
    sizes = {task: data.sizes[task] for task in data.tasks if task in data.sizes}
    compared = [name for name in data.scored if name != data.baseline and changes(data, name, data.baseline, "bleu")]
    if not compared:
        return {"reason": "Levels of training data are compared once systems and their baseline have been scored."}
    if not sizes:
        return {"reason": "How much training text a direction has is not known: prepared/meta.json does not say it."}
    low, high = min(sizes.values()), max(sizes.values())
    levels = resource_levels(sizes)
    if low == high:
        return {"reason": f"All directions have the same {words.count(low)} training pairs, so there are no levels."}
    if not levels:
        between = f"{words.count(low)} to {words.count(high)}"
        return {"reason": f"Directions have {between} training pairs, which differ too little for levels."}
    heads = [
        {"name": name, "range": _range([sizes[task] for task in tasks]), "directions": len(tasks)}
        for name, tasks in levels.items()
    ]
    for head in heads:
        head["title"] = f"{head['directions']} directions of {head['range']} training pairs"
    rows = []
    means: dict[str, dict[str, list[float]]] = {}
    for name in compared:
        cells = []
        means[name] = {}
        for metric in METRICS:
            change = changes(data, name, data.baseline, metric)
            means[name][metric] = []
            for tasks in levels.values():
                found = [change[task] for task in tasks if task in change]
                mean = sum(found) / len(found) if found else math.nan
                means[name][metric].append(mean)
                up = f"{sum(value > 0 for value in found)} of {len(found)} up"
                cells.append({"text": words.signed(mean) if found else "–", "up": up if found else ""})
        rows.append({"name": data.name(name), "colour": figures.css_colour(name, list(data.systems)), "cells": cells})
    tested = level_tables(data, heads)
    why = "." if has_groups(data) else f": {HOW_TO.format(what='levels')}."
    how = "" if tested else f"These means carry no test{why}"
    drawn = figures.draw("levels", data, list(levels), means)
    return {"reason": "", "heads": heads, "rows": rows, "figure": drawn, "tested": tested, "how": how}


def transfer_section(data: RunData) -> dict[str, Any] | None:
    """Every multilingual system minus the bilingual models, by direction; None where there are none of these."""
    if "bilingual" not in data.scored:
        return None
    names = [
        name for name in data.scored if name != "bilingual" and data.base_of(name) not in ("bilingual", "finetuned")
    ]
    found = {(name, m): changes(data, name, "bilingual", m) for name in names for m in METRICS}
    if not any(found.values()):
        return None
    rows = []
    for task in data.tasks:
        entry = data.scored["bilingual"]["tasks"].get(task)
        if not entry:
            continue
        cells = [_transfer([found[name, metric].get(task) for metric in METRICS]) for name in names]
        pairs = words.count(data.sizes[task]) if task in data.sizes else "–"
        rows.append({"task": task, "pairs": pairs, "bilingual": _pair(entry), "cells": cells, "mean": False})
    averages = [
        _transfer([sum(v.values()) / len(v) if (v := found[name, m]) else None for m in METRICS]) for name in names
    ]
    whole = _pair(data.scored["bilingual"]["average"]["all"])
    rows.insert(0, {"task": "mean", "pairs": "", "bilingual": whole, "cells": averages, "mean": True})
    return {"heads": [{"name": data.short(name), "title": data.name(name)} for name in names], "rows": rows}


def _pair(entry: Mapping[str, Any]) -> dict[str, str]:
    return {"text": f"{entry['bleu']:.2f}", "beside": f"{entry['chrf']:.2f}"}


def _transfer(values: Sequence[float | None]) -> dict[str, str]:
    """BLEU with chrF++ beside it; the sign of BLEU says which of the two it is."""
    bleu, chrf = values
    if bleu is None or chrf is None:
        return {"text": "–", "beside": "", "kind": ""}
    kind = "transfer" if bleu > 0 else "interference" if bleu < 0 else ""
    return {"text": words.signed(bleu), "beside": words.signed(chrf), "kind": kind}


def _range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return words.count(low) if low == high else f"{words.count(low)} to {words.count(high)}"
