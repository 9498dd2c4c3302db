"""Who gains and who loses: by how much training text a direction has, by family, and against bilingual models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nspec.analysis.bands import families_of, grouping_of
from nspec.analysis.mantel import holm
from nspec.mt.languages import languages_of_task
from nspec.mt.scoring.averages import FAMILY, LEVEL, families, kind_of_group, resource_levels
from nspec.report import drawing, words
from nspec.report.run_data import RunData
from nspec.report.tables import score_cell
from nspec.report.words import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOW_TO = (
    "the scores are of an older version, which did not test {what}; `nspec evaluate CONFIG --redo score` makes them anew "
    "from the same translations, in seconds"
)


def section(data: RunData) -> dict[str, Any]:
    """``levels``, ``families`` and ``transfer``: what the functions below give, or None."""
    return {
        "levels": level_section(data) if data.scored else None,
        "families": family_section(data) if data.scored else None,
        "transfer": transfer_section(data),
    }


def level_section(data: RunData) -> dict[str, Any]:
    """Every system against the baseline, by level of training sentences.

    Returns:
        ``reason``: why there are no levels, else empty; ``heads``, ``rows`` (mean changes), ``figure`` and ``tested``
        otherwise: the tables with tests, or None and ``how`` to get them where scores are of an older version.
    """
    sizes = {task: data.sizes[task] for task in data.tasks if task in data.sizes}
    compared = [name for name in data.scored if name != data.baseline and data.changes(name, data.baseline, METRICS[0])]
    if not compared:
        return {"reason": "Levels of training data are compared once systems and their baseline have been scored."}
    if not sizes:
        return {"reason": "How much training text a direction has is not known: prepared/meta.json does not say it."}
    levels, between = resource_levels(sizes), words.span(sizes.values())
    if len(set(sizes.values())) == 1:
        return {"reason": f"All directions have the same {between} training sentences, so there are no levels."}
    if not levels:
        return {"reason": f"Directions have {between} training sentences, which differ too little for levels."}
    heads = []
    for name, tasks in levels.items():
        head = {"name": name, "range": words.span([sizes[task] for task in tasks]), "directions": len(tasks)}
        heads.append(head | {"title": f"{head['directions']} directions of {head['range']} training sentences"})
    rows = []
    means: dict[str, dict[str, list[float]]] = {}
    for name in compared:
        cells = []
        means[name] = {}
        for metric in METRICS:
            change = data.changes(name, data.baseline, metric)
            found = [[change[task] for task in tasks if task in change] for tasks in levels.values()]
            means[name][metric] = [sum(of) / len(of) if of else math.nan for of in found]
            for of, mean in zip(found, means[name][metric]):
                up = f"{sum(value > 0 for value in of)} of {len(of)} up"
                cells.append({"text": words.signed(mean) if of else "–", "up": up if of else ""})
        tint = drawing.css_colour(name, list(data.systems))
        rows.append({"name": data.name(name), "colour": tint, "cells": cells})
    there = members(data, LEVEL)
    tested = group_tables(data, LEVEL, heads) if all(f"{LEVEL}:{name}" in there for name in levels) else None
    why = "." if has_groups(data) else f": {HOW_TO.format(what='levels')}."
    how = "" if tested else f"These means carry no test{why}"
    figure = drawing.render(bars, "Score change by level of training sentences", "levels", data, list(levels), means)
    return {"reason": "", "heads": heads, "rows": rows, "figure": figure, "tested": tested, "how": how}


def bars(data: RunData, names: Sequence[str], means: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """The means, system -> metric -> change of each level ``names`` in points, as bars; BLEU and chrF++ side by side."""
    figure, panels = drawing.new_figure(9.6, 3.6, 2)
    width = 0.84 / len(means)
    places = np.arange(len(names))
    change = f"change from {words.in_sentence(data.name(data.baseline))}"
    for axes, metric in zip(panels, METRICS):
        drawing.style(axes, "training sentences", change, data.metric_names[metric])
        for number, (system, values) in enumerate(means.items()):
            at, tint = places + (number - (len(means) - 1) / 2) * width, drawing.colour(system, list(data.systems))
            axes.bar(at, values[metric], width * 0.92, color=tint, label=data.short(system))
        axes.axhline(0, color=drawing.INK, linewidth=0.8)
        axes.set_xticks(places, names)
    drawing.legend_of(figure, panels[0], min(4, len(means)), below=True)
    return figure


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

    Each table is of one metric, a row for each scored system, a column for each of ``heads``, with p values adjusted by
    Holm's method over all tests of the table. Its arrows go by the adjusted values.

    Returns:
        ``heads``; ``parts``, each with ``half`` (such as ``en→x``, empty for whole groups), ``heads`` and ``tables``.
    """
    averages = [average for scores in data.scored.values() for average in scores["average"]]
    found = [kind_of_group(average) for average in dict.fromkeys(averages)]
    halves = dict.fromkeys(half for of, _, half in found if of == kind)
    parts = []
    for half in halves:
        columns = [head for head in heads if (kind, head["name"], half) in found]
        names = [f"{kind}:{head['name']}{f'/{half}' if half else ''}" for head in columns]
        tables = [_table(data, metric, names) for metric in METRICS]
        parts.append({"half": words.group_name(half) if half else "", "heads": columns, "tables": tables})
    return {"heads": list(heads), "parts": parts}


def _table(data: RunData, metric: str, averages: Sequence[str]) -> dict[str, Any]:
    entries = {name: [scores["average"].get(a) for a in averages] for name, scores in data.scored.items()}
    tests = [entry["baseline"] for row in entries.values() for entry in row if entry and entry.get("baseline")]
    adjusted = iter(holm([words.p_value(test, metric) for test in tests]).tolist())
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
                cell |= {"holm": words.bare_p(p), "mark": words.sign(test[f"{metric}_delta"], p)}
                cell["title"] += f"; adjusted by Holm's method {words.p_text(p)}"
            cells.append(cell)
        rows.append({"name": data.short(name), "is_baseline": name == data.baseline, "cells": cells})
    return {"metric": data.metric_names[metric], "rows": rows}


def family_section(data: RunData) -> dict[str, Any] | None:
    """The tables of families; None where the run has no two families.

    Returns:
        ``reason``: why there are no tables, else empty; those of :func:`group_tables`, ``about``: the languages of each
        family, and ``grouping`` otherwise.
    """
    if not has_groups(data):
        tasks = [task for task in data.tasks if any(task in s["tasks"] for s in data.scored.values())]
        may_have = families(tasks, data.pivot, families_of(tasks, data.pivot))
        return {"reason": f"Not shown: {HOW_TO.format(what='families')}."} if may_have else None
    found = members(data, FAMILY)
    if not found:
        return None
    family_of = families_of(data.tasks, data.pivot)
    languages = {code for task in data.tasks for code in languages_of_task(task)} - {data.pivot}
    heads, about = [], []
    for group, tasks in found.items():
        name = kind_of_group(group)[1]
        number = f"{len(tasks)} direction{'s' if len(tasks) != 1 else ''}"
        heads.append({"name": name, "title": f"{number}: {', '.join(tasks)}"})
        about.append(f"{name} {', '.join(code for code in sorted(languages) if family_of(code) == name)} ({number})")
    named = words.GROUPINGS[grouping_of(languages)]
    return {"reason": "", "about": "; ".join(about), "grouping": named, **group_tables(data, FAMILY, heads)}


def transfer_section(data: RunData) -> dict[str, Any] | None:
    """Every multilingual system minus the bilingual models, by direction; None where there are none of these."""
    if "bilingual" not in data.scored:
        return None
    names = [
        name for name in data.scored if name != "bilingual" and data.base_of(name) not in ("bilingual", "finetuned")
    ]
    found = {(name, m): data.changes(name, "bilingual", m) for name in names for m in METRICS}
    if not any(found.values()):
        return None
    alone = data.scored["bilingual"]
    means = [[sum(v.values()) / len(v) if (v := found[name, m]) else None for m in METRICS] for name in names]
    rows = [_transfer_row("mean", "", alone["average"]["all"], means)]
    for task in (task for task in data.tasks if task in alone["tasks"]):
        sentences = words.count(data.sizes[task]) if task in data.sizes else "–"
        changes = [[found[name, metric].get(task) for metric in METRICS] for name in names]
        rows.append(_transfer_row(task, sentences, alone["tasks"][task], changes))
    return {"heads": [{"name": data.short(name), "title": data.name(name)} for name in names], "rows": rows}


def _transfer_row(
    task: str, sentences: str, alone: Mapping[str, Any], changes: Sequence[Sequence[float | None]]
) -> dict[str, Any]:
    """BLEU with chrF++ beside it; the sign of a change of BLEU says which of the two it is."""
    cells = []
    for bleu, chrf in changes:
        cells.append({"text": "–", "beside": "", "kind": ""})
        if bleu is not None and chrf is not None:
            kind = "transfer" if bleu > 0 else "interference" if bleu < 0 else ""
            cells[-1] = {"text": words.signed(bleu), "beside": words.signed(chrf), "kind": kind}
    bilingual = {"text": f"{alone['bleu']:.2f}", "beside": f"{alone['chrf']:.2f}"}
    return {"task": task, "sentences": sentences, "bilingual": bilingual, "cells": cells}
