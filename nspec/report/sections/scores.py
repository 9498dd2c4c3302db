"""The scores of every system: averages, every direction, and how they were measured and tested."""

from __future__ import annotations

from typing import Any

from nspec.report import words
from nspec.report.run_data import RunData
from nspec.report.tables import score_cell, signatures, warnings
from nspec.report.words import METRICS


def section(data: RunData) -> dict[str, Any]:
    """The table of averages, a table of directions for each metric (none without scores), signatures and warnings."""
    return {
        "groups": data.main_groups,
        "averages": _averages(data),
        "directions": [_directions(data, metric) for metric in METRICS] if data.scored else [],
        "signatures": _signatures(data),
        "warnings": [
            {"text": text, "where": "; ".join(f"{data.short(name)}: {of}" for name, of in where)}
            for text, where in warnings(data.scored).items()
        ],
        "test": which_test(data),
        "earlier": earlier(data),
        "two_sided": data.two_sided,
        "bootstrap": data.config.score.bootstrap,
    }


def earlier(data: RunData) -> str:
    """Which systems of the table the configuration names no more, as a sentence; empty where there are none."""
    names = ", ".join(map(data.name, data.earlier))
    return f"From an earlier start of this run, and no longer in run.systems or run.variants: {names}." if names else ""


def which_test(data: RunData) -> str:
    """Which test the p values of the page are of, with its trials; empty where nothing was tested."""
    if not data.tests:
        return ""
    trials = sorted({int(test["ar_trials"]) for test in data.tests if isinstance(test.get("ar_trials"), int)})
    several = f" ({' or '.join(map(words.count, trials))} trials)" if trials else ""
    randomised = f"two-sided approximate randomisation{several}"
    samples = words.count(data.config.score.bootstrap)
    bootstrap = f"the paired bootstrap ({samples} samples), which is in effect one-sided"
    if data.two_sided is None:
        return (
            f"The p values and arrows are those of {randomised}; where scores are older than that test, of {bootstrap}."
        )
    return f"All p values and arrows are those of {randomised if data.two_sided else bootstrap}."


def _averages(data: RunData) -> list[dict[str, Any]]:
    """A row for every system: average scores over all directions, and BLEU and chrF++ from and to the pivot."""
    rows = []
    entries = {name: scores["average"] for name, scores in data.scored.items()}
    for name in data.systems:
        cells = {}
        for group in data.main_groups:
            for metric in METRICS:
                present = [entry[group][metric] for entry in entries.values() if group in entry]
                best = max(present) if len(present) > 1 else None
                about = f"{data.name(name)}, average of {words.group_name(group)}"
                cells[f"{group} {metric}"] = score_cell(data, entries.get(name, {}).get(group), metric, best, about)
        rows.append({"name": data.name(name), "cells": cells, "is_baseline": name == data.baseline})
    return rows


def _directions(data: RunData, metric: str) -> dict[str, Any]:
    """The table of one metric: a row for every direction, a column for every scored system."""
    rows = []
    names = list(data.scored)
    for task in data.tasks:
        entries = {name: data.scored[name]["tasks"].get(task) for name in names}
        present = [entry for entry in entries.values() if entry]
        if not present:
            continue
        best = max(entry[metric] for entry in present) if len(names) > 1 else None
        cells = [score_cell(data, entries[name], metric, best, f"{task}, {data.name(name)}") for name in names]
        rows.append({"task": task, "sentences": words.count(present[0]["sentences"]), "cells": cells})
    heads = [
        {"name": data.short(name), "title": data.name(name), "is_baseline": name == data.baseline} for name in names
    ]
    return {"metric": data.metric_names[metric], "heads": heads, "rows": rows}


def _signatures(data: RunData) -> list[dict[str, str]]:
    """Every signature that occurs, with the directions that it belongs to where they are not all."""
    found = [(metric, *entry) for metric in METRICS for entry in signatures(data.scored, metric).items()]
    return [
        {
            "metric": data.metric_names[metric],
            "text": text,
            "tasks": "" if len(tasks) == len(data.tasks) else ", ".join(t for t in data.tasks if t in tasks),
        }
        for metric, text, tasks in found
    ]
