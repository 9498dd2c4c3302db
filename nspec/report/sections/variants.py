"""What the variants of a run say: scores against the option that they change, and how stable a selection is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from nspec import analysis
from nspec.analysis.overlap import Floats, Masks
from nspec.mt import options
from nspec.mt.systems import config_of, masks_folder
from nspec.report import words
from nspec.report.run_data import METRICS, RunData
from nspec.report.sections import masks as figures
from nspec.report.sections.averages import changes


@dataclass(frozen=True)
class Curve:
    """Systems that differ in one numeric option.

    Attributes:
        of: the built-in system that they vary.
        option: full name.
        values: of the option, ascending; the built-in system's own is among them where it has been scored.
        systems: as many names.
        change: metric -> mean score difference against the baseline in points, as many.
    """

    of: str
    option: str
    values: tuple[float, ...]
    systems: tuple[str, ...]
    change: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Stability:
    """How far a variant selects the neurons that the selection it varies has.

    Attributes:
        system: the variant.
        layers: that both have, the encoder before the decoder.
        iou: float64 [layers], mean over the directions that both have.
        chance: float64 [layers], what independent masks of these densities would have.
        density: of the variant, mean over directions and layers.
    """

    system: str
    layers: tuple[str, ...]
    iou: Floats
    chance: Floats
    density: float


def curves(data: RunData) -> list[Curve]:
    """A curve for each numeric option that scored variants of ``forward`` change alone, with two points or more."""
    flat = options.flatten(data.config)
    found: dict[str, dict[float, str]] = {}
    for name, variant in data.variants.items():
        if variant.of == "forward" and len(variant.overrides) == 1 and changes(data, name, data.baseline, "bleu"):
            ((option, value),) = variant.overrides.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(option, {})[float(value)] = name
    drawn = []
    for option, points in found.items():
        if changes(data, "forward", data.baseline, "bleu"):
            points.setdefault(float(flat[option]), "forward")
        if len(points) < 2:
            continue
        values = tuple(sorted(points))
        systems = tuple(points[value] for value in values)
        means = {metric: tuple(_mean_change(data, name, metric) for name in systems) for metric in METRICS}
        drawn.append(Curve("forward", option, values, systems, means))
    return drawn


def _mean_change(data: RunData, name: str, metric: str) -> float:
    found = changes(data, name, data.baseline, metric)
    return sum(found.values()) / len(found) if found else math.nan


def stability(variant: str, masks: Masks, base: Masks) -> Stability | None:
    """Compares the masks of a variant with those it varies; None where they share no direction or no layer."""
    tasks = [task for task in masks.tasks if task in base.tasks]
    layers = [layer for layer in analysis.sort_layers(masks.layers) if layer in base.layers]
    if not tasks or not layers:
        return None
    own, other = analysis.density(masks, layers, tasks), analysis.density(base, layers, tasks)
    iou, chance = np.empty((len(tasks), len(layers))), np.empty((len(tasks), len(layers)))
    for column, layer in enumerate(layers):
        one, two = (analysis.layer_matrix(each, layer, tasks) for each in (masks, base))
        for row in range(len(tasks)):
            iou[row, column] = analysis.pairwise_iou(np.stack([one[row], two[row]]))[0, 1]
            chance[row, column] = analysis.chance_iou(np.array([own[row, column], other[row, column]]))[0, 1]
    return Stability(variant, tuple(layers), iou.mean(0), chance.mean(0), float(own.mean()))


def stabilities(data: RunData) -> list[Stability]:
    """Of every variant with a selection of its own, against that of the run."""
    found = []
    for name, masks in data.variant_masks.items():
        base = data.masks_at(masks_folder(data.config, data.variants[name].of))
        compared = stability(name, masks, base) if base is not None else None
        if compared is not None:
            found.append(compared)
    return found


def ablation_section(data: RunData) -> dict[str, Any] | None:
    """Table and figures of the variants; None where the run declares none."""
    if not data.variants:
        return None
    stable = {entry.system: entry for entry in stabilities(data)}
    drawn = curves(data)
    rows = [_row(data, name, stable.get(name)) for name in data.variants]
    return {
        "rows": rows,
        "curves": [
            {"option": curve.option, "svg": figures.draw("ablation", data, curve, key=f"ablation_{number}")}
            for number, curve in enumerate(drawn)
        ],
        "stability": figures.draw("stability", data, list(stable.values())) if stable else "",
    }


def _row(data: RunData, name: str, stable: Stability | None) -> dict[str, Any]:
    system, variant = data.systems[name], data.variants[name]
    average = system.scores["average"]["all"] if system.scores else None
    test = average.get("baseline") if average else None
    cells = []
    for metric in METRICS:
        delta = p = ""
        if test:
            delta = f"{words.signed(test[f'{metric}_delta'])} {words.arrow(test, metric)}".rstrip()
            p = words.p_text(words.p_value(test, metric))
        cells.append({"score": f"{average[metric]:.2f}" if average else "–", "delta": delta or "–", "p": p})
    own = config_of(data.config, name)
    density = (system.summary or {}).get("density")
    kept = stable.density if stable else density if isinstance(density, float) else None
    return {
        "name": name,
        "of": words.system_name(variant.of),
        "changes": words.changes(variant),
        "k": f"{own.select.k:g}" if masks_folder(data.config, name) else "–",
        "cells": cells,
        "density": "–" if kept is None else f"{kept:.3f}",
        "iou": f"{stable.iou.mean():.3f}" if stable else "–",
        "chance": f"{stable.chance.mean():.3f}" if stable else "–",
    }
