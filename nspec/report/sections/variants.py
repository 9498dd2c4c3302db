"""What the variants of a run say: scores against the option that they change, and how stable a selection is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nspec import analysis
from nspec.analysis.overlap import Floats, Masks
from nspec.mt.config import PARTS
from nspec.report import drawing, words
from nspec.report.run_data import RunData
from nspec.report.words import METRICS
from nspec.run.systems import config_of, masks_folder
from nspec.run.yaml import flatten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METRIC_COLOURS = {"bleu": "#0072b2", "chrf": "#d55e00"}


@dataclass(frozen=True)
class Curve:
    """Systems that differ in one numeric option."""

    of: str  # the built-in system that they vary
    option: str  # full name
    values: tuple[float, ...]  # ascending; the built-in system's own is among them where it has been scored
    systems: tuple[str, ...]  # as many names
    change: dict[str, tuple[float, ...]]  # metric -> mean score difference against the baseline in points, as many


@dataclass(frozen=True)
class Stability:
    """How far a variant selects the neurons that the selection it varies has."""

    system: str  # the variant
    layers: tuple[str, ...]  # that both have, the encoder before the decoder
    iou: Floats  # float64 [layers], mean over the directions that both have
    chance: Floats  # float64 [layers], what independent masks of these densities would have
    density: float  # of the variant, mean over directions and layers


def section(data: RunData) -> dict[str, Any] | None:
    """Table and figures of the variants; None where the run declares none."""
    if not data.variants:
        return None
    stable = {entry.system: entry for entry in stabilities(data)}
    label = "IoU of the neurons of variants with those they vary, by layer"
    return {
        "rows": [_row(data, name, stable.get(name)) for name in data.variants],
        "curves": [
            {
                "option": curve.option,
                "svg": drawing.render(ablation, "Score change against an option", f"ablation_{number}", data, curve),
            }
            for number, curve in enumerate(curves(data))
        ],
        "stability": drawing.render(by_layer, label, "stability", data, list(stable.values())) if stable else "",
    }


def curves(data: RunData) -> list[Curve]:
    """A curve for each numeric option that scored variants of ``forward`` change alone, with two points or more."""
    scored = {name: [data.changes(name, data.baseline, m) for m in METRICS] for name in ["forward", *data.variants]}
    found: dict[str, dict[float, str]] = {}
    for name, variant in data.variants.items():
        if variant.of == "forward" and len(variant.overrides) == 1 and all(scored[name]):
            ((option, value),) = variant.overrides.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found.setdefault(option, {})[float(value)] = name
    drawn = []
    for option, points in found.items():
        if all(scored["forward"]):
            own = flatten(data.config)[option]
            if option.removeprefix("select.") in PARTS:
                own = own or data.config.select.k
            points.setdefault(float(own), "forward")
        if len(points) > 1:
            values, systems = zip(*sorted(points.items()))
            means = {
                metric: tuple(sum(of.values()) / len(of) for of in (scored[name][number] for name in systems))
                for number, metric in enumerate(METRICS)
            }
            drawn.append(Curve("forward", option, values, systems, means))
    return drawn


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


def ablation(data: RunData, curve: Curve) -> Figure:
    """BLEU and chrF++ difference from the baseline against an option."""
    figure, panels = drawing.new_figure(6.4, 3.4)
    axes = panels[0]
    drawing.style(axes, curve.option, f"points above {words.in_sentence(data.name(data.baseline))}")
    for metric, marker in zip(METRICS, "os"):
        line: dict[str, Any] = {"color": _METRIC_COLOURS[metric], "marker": marker, "label": data.metric_names[metric]}
        axes.plot(curve.values, curve.change[metric], **line)
    for value, system in zip(curve.values, curve.systems):
        if system == curve.of:
            label = f"{system}, as the run has it"
            axes.axvline(value, color=drawing.INK, linestyle=":", linewidth=1.0, label=label)
    axes.axhline(0, color=drawing.INK, linewidth=0.8)
    axes.set_xticks(curve.values, [f"{value:g}" for value in curve.values])
    drawing.legend_of(figure, axes, 3)
    return figure


def by_layer(data: RunData, compared: Sequence[Stability]) -> Figure:
    """IoU of the neurons of each variant with those that it varies, by layer, and what chance would give."""
    figure, panels = drawing.side_panels("IoU with the run's own masks", 3.6)
    for axes, side in zip(panels, drawing.SIDES):
        drawn: set[int] = set()
        for entry in compared:
            chosen = [i for i, layer in enumerate(entry.layers) if analysis.layer_side(layer) == side]
            numbers = analysis.layer_numbers([entry.layers[i] for i in chosen])
            marker = drawing.MARKERS.get(entry.system, "o")
            line: dict[str, Any] = {"color": drawing.colour(entry.system, list(data.systems))}
            axes.plot(numbers, entry.iou[chosen], marker=marker, markersize=4, label=entry.system, **line)
            line |= {"linestyle": ":", "linewidth": 1.2, "marker": "_" if len(chosen) == 1 else None}
            axes.plot(numbers, entry.chance[chosen], label=f"{entry.system}, by chance", **line)
            drawn.update(numbers)
        if drawn:
            drawing.layer_axis(axes, drawn)
    drawing.legend_of(figure, panels[0], 4)
    return figure


def _row(data: RunData, name: str, stable: Stability | None) -> dict[str, Any]:
    system, variant = data.systems[name], data.variants[name]
    average = system.scores["average"]["all"] if system.scores else None
    test = average.get("baseline") if average else None
    cells = []
    for metric in METRICS:
        delta = p = ""
        if test:
            value = words.p_value(test, metric)
            delta = f"{words.difference(test[f'{metric}_delta'], value)} {words.arrow(test, metric)}".rstrip()
            p = words.p_text(value)
        cells.append({"score": f"{average[metric]:.2f}" if average else "–", "delta": delta or "–", "p": p})
    density = stable.density if stable else (system.summary or {}).get("density")
    return {
        "name": name,
        "of": words.system_name(variant.of),
        "changes": words.changes(variant),
        "k": words.selection(config_of(data.config, name).select).removeprefix("k = ")
        if masks_folder(data.config, name)
        else "–",
        "cells": cells,
        "density": "–" if density is None else f"{density:.3f}",
        "iou": f"{stable.iou.mean():.3f}" if stable else "–",
        "chance": f"{stable.chance.mean():.3f}" if stable else "–",
    }
