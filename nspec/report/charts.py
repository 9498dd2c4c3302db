"""The figures of the page that compare methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nspec import analysis
from nspec.report.drawing import INK, MARKERS, SIDES, colour, layer_axis, new_figure, style
from nspec.report.run_data import METRICS, RunData
from nspec.report.words import in_sentence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nspec.report.sections.variants import Curve, Stability

_METRIC_COLOURS = {"bleu": "#0072b2", "chrf": "#d55e00"}


def levels(data: RunData, names: Sequence[str], means: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Mean score change by level of training pairs, a bar for each system; BLEU and chrF++ side by side.

    Args:
        data: the run.
        names: of the levels.
        means: system -> metric -> change of each level in points.
    """
    figure, panels = new_figure(9.6, 3.6, 2)
    width = 0.84 / len(means)
    places = np.arange(len(names))
    for axes, metric in zip(panels, METRICS):
        style(axes, "training pairs", f"change from {in_sentence(data.name(data.baseline))}", data.metric_names[metric])
        for number, (system, values) in enumerate(means.items()):
            at = places + (number - (len(means) - 1) / 2) * width
            axes.bar(
                at, values[metric], width * 0.92, color=colour(system, list(data.systems)), label=data.short(system)
            )
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xticks(places, names)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(means)), fontsize=8.5
    )
    return figure


def ablation(data: RunData, curve: Curve) -> Figure:
    """BLEU and chrF++ difference from the baseline against an option."""
    figure, panels = new_figure(6.4, 3.4)
    axes = panels[0]
    style(axes, curve.option, f"points above {in_sentence(data.name(data.baseline))}")
    for metric, marker in zip(METRICS, "os"):
        line = {"color": _METRIC_COLOURS[metric], "marker": marker, "label": data.metric_names[metric]}
        axes.plot(curve.values, curve.change[metric], **line)
    for value, system in zip(curve.values, curve.systems):
        if system == curve.of:
            axes.axvline(value, color=INK, linestyle=":", linewidth=1.0, label=f"{system}, as the run has it")
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(curve.values, [f"{value:g}" for value in curve.values])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8.5)
    return figure


def stability(data: RunData, compared: Sequence[Stability]) -> Figure:
    """IoU of the neurons of each variant with those that it varies, by layer, and what chance would give."""
    figure, panels = new_figure(9.6, 3.6, 2, sharey=True)
    for axes, side in zip(panels, SIDES):
        style(axes, f"{side} layer", "IoU with the run's own masks" if side == "encoder" else "", side.capitalize())
        drawn: set[int] = set()
        for entry in compared:
            chosen = [i for i, layer in enumerate(entry.layers) if analysis.layer_side(layer) == side]
            numbers = analysis.layer_numbers([entry.layers[i] for i in chosen])
            tint, marker = colour(entry.system, list(data.systems)), MARKERS.get(entry.system, "o")
            axes.plot(numbers, entry.iou[chosen], color=tint, marker=marker, markersize=4, label=entry.system)
            label = f"{entry.system}, by chance"
            dotted: dict[str, Any] = {
                "color": tint,
                "linestyle": ":",
                "linewidth": 1.2,
                "marker": "_" if len(chosen) == 1 else None,
            }
            axes.plot(numbers, entry.chance[chosen], label=label, **dotted)
            drawn.update(numbers)
        if drawn:
            layer_axis(axes, drawn)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8.5)
    return figure
