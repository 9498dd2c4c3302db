"""Validation losses of a run's systems, as means over directions; and the section of the page that shows them."""

from __future__ import annotations

from typing import Any

from nspec.mt.scoring.averages import LEVEL, resource_levels
from nspec.report import words
from nspec.report.run_data import RunData


def loss_groups(data: RunData) -> dict[str, list[str]]:
    """The directions that losses are averaged over: all, from and to the pivot, levels of training data; none empty."""
    tasks = data.tasks or list(next((system.losses for system in data.systems.values() if system.losses), {}))
    found = {"all": tasks}
    if data.pivot:
        found[f"from_{data.pivot}"] = [task for task in tasks if task.startswith(f"{data.pivot}-")]
        found[f"to_{data.pivot}"] = [task for task in tasks if task.endswith(f"-{data.pivot}")]
    sizes = {task: data.sizes[task] for task in tasks if task in data.sizes}
    found |= {f"{LEVEL}:{name}": members for name, members in resource_levels(sizes).items()} if sizes else {}
    return {group: members for group, members in found.items() if members}


def mean_losses(data: RunData, system: str) -> dict[str, float]:
    """Nats per target token of a system's best checkpoint on the validation text, each direction counted alike.

    Returns:
        The mean of each of :func:`loss_groups`; empty where the loss of a direction is not known.
    """
    losses, groups = data.systems[system].losses, loss_groups(data)
    if not losses or not set(groups["all"]) <= set(losses):
        return {}
    return {group: sum(losses[task] for task in members) / len(members) for group, members in groups.items()}


def section(data: RunData) -> dict[str, Any] | None:
    """``heads`` and ``rows`` of the table of losses; None where none is known.

    A row has the loss of each group and, where the baseline has one too, the difference from it.
    """
    found = {name: mean_losses(data, name) for name in data.systems}
    found = {name: means for name, means in found.items() if means}
    if not found:
        return None
    base = found.get(data.baseline, {})
    rows = []
    for name, means in found.items():
        cells = [
            {
                "loss": f"{loss:.3f}",
                "change": words.signed(loss - base[group], 3) if base and name != data.baseline else "",
            }
            for group, loss in means.items()
        ]
        rows.append({"name": data.name(name), "is_baseline": name == data.baseline, "cells": cells})
    groups = loss_groups(data)
    heads = [
        {"name": words.group_name(group), "title": f"{len(members)} directions"} for group, members in groups.items()
    ]
    return {"heads": heads, "rows": rows, "compared": bool(base) and len(found) > 1}
