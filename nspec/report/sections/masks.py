"""Which neurons directions keep: how many by layer, and which they share, beside the numbers of the paper.

The paper's are from Tan, Wu, Monz, *Neuron Specialization*, EMNLP 2024 (arXiv 2404.11201), with the outputs and figures
of the authors' release: models of 6 + 6 layers, d_model 1024, d_ff 4096, on EC30 (30 languages and English, 60
directions). Lists are of layers from bottom to top; ``from`` is en→x and ``to`` is x→en.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nspec import analysis
from nspec.analysis.bands import band_order
from nspec.mt.config import PARTS
from nspec.report import drawing, words
from nspec.report.run_data import RunData
from nspec.report.words import group_name
from nspec.run.systems import config_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nspec import NeuronMasks

SOURCE = "Tan, Wu and Monz, Neuron Specialization, EMNLP 2024 (arXiv 2404.11201), models of EC30"

PUBLISHED_MASKED_K = 0.95
"""The k of :data:`PUBLISHED_MASKED`."""

PUBLISHED_MASKED: dict[tuple[str, str], list[float]] = {
    ("from", "encoder"): [0.250, 0.209, 0.217, 0.225, 0.206, 0.179],
    ("from", "decoder"): [0.172, 0.205, 0.223, 0.254, 0.291, 0.279],
    ("to", "encoder"): [0.295, 0.213, 0.206, 0.214, 0.205, 0.176],
    ("to", "decoder"): [0.211, 0.209, 0.201, 0.187, 0.237, 0.289],
}
"""Share of the rows of fc1 that are masked, mean over directions, by direction type and side."""

PUBLISHED_IOU_K = 0.70
"""The k of :data:`PUBLISHED_IOU`."""

PUBLISHED_IOU: dict[tuple[str, analysis.overlap.Side], list[float]] = {
    ("to", "encoder"): [0.377, 0.479, 0.526, 0.591, 0.630, 0.655],
    ("from", "decoder"): [0.522, 0.497, 0.414, 0.299, 0.241, 0.259],
}
"""Mean IoU of the masks of two directions, by direction type and side: the two that were published."""

_COLOURS = {"all": "#8c8c8c", "from": "#0072b2", "to": "#d55e00"}


def section(data: RunData) -> dict[str, Any] | None:
    """Figures and numbers about the masks; None where there are none."""
    if data.masks is None:
        return None
    tasks, bands = band_order(data.masks.tasks, data.pivot)
    shares = analysis.density(data.masks, tasks=tasks)
    heats = []
    for side in drawing.SIDES if len(tasks) > 1 else ():
        layers = analysis.side_layers(data.masks, side)
        if layers:
            mean, chance = (values.mean() for values in _iou_and_chance(data.masks, layers, tasks))
            svg = drawing.render(heat, f"IoU of directions, {side}", f"heat_{side}", data, side)
            heats.append({"side": side, "svg": svg, "mean": f"{mean:.3f}", "chance": f"{chance:.3f}"})
    label = "Mean IoU by layer, with published values"
    comparable = data.pivot and data.config.select.rule == "share"
    beside = drawing.render(published_iou, label, "published_iou", data) if comparable and len(tasks) > 1 else ""
    return {
        "masked": drawing.render(masked, "Share of fc1 rows masked by layer, with published values", "masked", data),
        "published": bool(comparable),
        "source": SOURCE,
        "bands": len({band.name for band in bands}) > 1,
        "published_iou": beside,
        "published_iou_k": f"{PUBLISHED_IOU_K:g}",
        "iou_rows": iou_rows(data) if beside else [],
        "halves": halves_section(data),
        "selection": words.selection_sentence(data.config.select),
        "mean": f"{shares.mean():.3f}",
        "low": f"{shares.min():.3f}",
        "high": f"{shares.max():.3f}",
        "heats": heats,
        "wide": len(tasks) > 20,
        "iou": drawing.render(mean_iou, "Mean IoU by layer", "mean_iou", data) if heats else "",
    }


def _iou_and_chance(masks: NeuronMasks, layers: Sequence[str], tasks: Sequence[str]) -> tuple[Any, Any]:
    """Mean IoU of two directions, and what independent masks of these densities would have: float64 [layers] each."""
    shares = analysis.density(masks, layers, tasks)
    chance = np.array([analysis.mean_pairwise(analysis.chance_iou(column)) for column in shares.T])
    return analysis.mean_pairwise(analysis.layer_iou(masks, layers, tasks)), chance


def _groups(data: RunData, tasks: Sequence[str]) -> dict[str, list[str]]:
    """``from`` and ``to`` the pivot with their tasks, or ``all`` where there is no pivot."""
    split = {
        "from": [task for task in tasks if data.pivot and task.startswith(f"{data.pivot}-")],
        "to": [task for task in tasks if data.pivot and task.endswith(f"-{data.pivot}")],
    }
    return {key: members for key, members in split.items() if members} or {"all": list(tasks)}


def _label(data: RunData, group: str) -> str:
    """``en→x`` for ``from``, ``x→en`` for ``to``."""
    return group_name("all" if group == "all" else f"{group}_{data.pivot}")


def _selection(data: RunData, group: str, side: str) -> str:
    """How neurons were selected for directions ``from`` or ``to`` the pivot, or ``all``, on one side."""
    select = data.config.select
    part = select.rule == "share" and group != "all"
    return f"k = {select.k_of(group, side):g}" if part else words.selection(select)


def _line(axes: Axes, numbers: Sequence[int], values: Any, group: str, label: str) -> None:
    axes.plot(numbers, values, label=label, color=_COLOURS[group], marker="o", markersize=4)


def _chance(axes: Axes, numbers: Sequence[int], values: Any, label: str) -> None:
    axes.plot(numbers, values, label=label, color=drawing.INK, linestyle=":", linewidth=1.2)


def _published(axes: Axes, values: Sequence[float] | None, numbers: Sequence[int], group: str, label: str) -> None:
    """A dashed line from the first layer to the last, whatever number of layers the published model had."""
    whole = list(numbers) == list(range(len(numbers)))  # of a part of the layers it is not known how deep the model is
    if values and len(numbers) > 1 and whole:
        dashed: dict[str, Any] = {"color": _COLOURS[group], "linestyle": (0, (4, 3)), "linewidth": 1.1}
        axes.plot(np.linspace(0, numbers[-1], len(values)), values, label=label, **dashed)


def masked(data: RunData) -> Figure:
    """Share of fc1 rows masked by layer, encoder and decoder side by side, with the published one at relative depth."""
    assert data.masks is not None
    figure, panels = drawing.side_panels("share of fc1 rows masked")
    tasks = analysis.order_tasks(data.masks.tasks, data.pivot)
    for axes, side in zip(panels, drawing.SIDES):
        layers = analysis.side_layers(data.masks, side)
        if not layers:
            continue
        numbers = analysis.layer_numbers(layers)
        for group, members in _groups(data, tasks).items():
            shares, name = 1 - analysis.density(data.masks, layers, members), _label(data, group)
            _line(axes, numbers, shares.mean(0), group, f"{name}, this run ({_selection(data, group, side)})")
            axes.fill_between(numbers, shares.min(0), shares.max(0), color=_COLOURS[group], alpha=0.15, lw=0)
            if data.config.select.rule == "share":
                published = PUBLISHED_MASKED.get((group, side))
                _published(axes, published, numbers, group, f"{name}, published (k = {PUBLISHED_MASKED_K:g})")
        drawing.layer_axis(axes, numbers)
    drawing.legend_of(figure, panels[0], 2)
    return figure


def published_iou(data: RunData) -> Figure:
    """Mean IoU by layer of the two direction types that were published, this run's beside the published one's."""
    figure, panels = drawing.side_panels("mean IoU of two directions")
    for axes, (group, side) in zip(panels, PUBLISHED_IOU):
        masks, own = iou_masks(data, group, side)
        tasks = analysis.order_tasks(masks.tasks, data.pivot)
        layers = analysis.side_layers(masks, side)
        axes.set_title(f"{side.capitalize()}, {_label(data, group)}", fontsize=11, loc="left")
        members = _groups(data, tasks).get(group, [])
        if not layers:
            continue
        numbers = analysis.layer_numbers(layers)
        if len(members) > 1:
            values, chance = _iou_and_chance(masks, layers, members)
            _line(axes, numbers, values, group, f"this run (k = {own:g})")
            _chance(axes, numbers, chance, "this run, by chance")
        _published(axes, PUBLISHED_IOU[group, side], numbers, group, f"published (k = {PUBLISHED_IOU_K:g})")
        drawing.layer_axis(axes, numbers)
        if axes.get_legend_handles_labels()[0]:  # one direction of a type and one layer: there is nothing to draw
            axes.legend(fontsize=8.5)
    return figure


def iou_rows(data: RunData) -> list[dict[str, str]]:
    """The same by layer as numbers, for all four cases, with what chance would give."""
    assert data.masks is not None
    groups = _groups(data, analysis.order_tasks(data.masks.tasks, data.pivot))
    cases: list[tuple[str, analysis.overlap.Side]] = [*PUBLISHED_IOU, ("from", "encoder"), ("to", "decoder")]
    rows = []
    for group, side in cases:
        masks, k = iou_masks(data, group, side)
        layers = analysis.side_layers(masks, side)
        if layers and len(groups.get(group, [])) > 1:
            own, chance = _iou_and_chance(masks, layers, groups[group])
            texts = [" ".join(f"{iou:.2f}" for iou in values) for values in (own, chance)]
            published = " ".join(f"{iou:.2f}" for iou in PUBLISHED_IOU.get((group, side), []))
            name = f"{side.capitalize()}, {_label(data, group)}"
            rows.append(
                {"name": name, "own": texts[0], "k": f"{k:g}", "chance": texts[1], "published": published or "–"}
            )
    return rows


def halves_section(data: RunData) -> dict[str, Any]:
    """How alike the neurons are that each half of the text selects; ``reason`` where that was not measured."""
    from nspec.report import measured_halves

    found = measured_halves.load(data.folder)
    if found is None:
        return {
            "reason": f"How stable the selection is was not measured; `nspec analyze {data.folder} --halves` selects "
            "neurons from each half of the text, and the next `nspec report` shows how alike they are."
        }
    one, two, outdated = found
    rows = [
        {
            "layer": f"{analysis.layer_side(row.layer)} {analysis.layer_numbers([row.layer])[0]}",
            "cells": [f"{iou:.3f}" if iou == iou else "–" for iou in (row.halves, row.directions, row.chance)],
        }
        for row in measured_halves.compare_halves(one, two)
    ]
    warning = "The dense model or the options of profile and select are others now: measure this again."
    return {"reason": "", "rows": rows, "warning": warning if outdated else ""}


def iou_masks(data: RunData, group: str, side: str) -> tuple[Any, float]:
    """The masks to compare with the published IoU of directions ``from`` or ``to`` the pivot on one side.

    Returns:
        Those of the published k, where the run has its counts; else its own, or those of a variant of forward that differs
        in k alone, if its k there is nearer; and that k.
    """
    if (data.folder / "profile" / "counts.safetensors").is_file():
        import nspec

        counts = nspec.ActivationCounts.load(data.folder / "profile")
        return nspec.select(counts, k=PUBLISHED_IOU_K), PUBLISHED_IOU_K
    found = [(data.config.select.k_of(group, side), data.masks)]
    for name, masks in data.variant_masks.items():
        variant = data.variants[name]
        if variant.of == "forward" and set(variant.overrides) <= {"select.k", *(f"select.{part}" for part in PARTS)}:
            found.append((config_of(data.config, name).select.k_of(group, side), masks))
    k, chosen = min(found, key=lambda pair: abs(pair[0] - PUBLISHED_IOU_K))
    return chosen, k


def mean_iou(data: RunData) -> Figure:
    """Mean pairwise IoU by layer, with what independent masks of the same densities would have."""
    assert data.masks is not None
    figure, panels = drawing.side_panels("mean IoU of two directions", 3.2)
    tasks = analysis.order_tasks(data.masks.tasks, data.pivot)
    chosen = {"all": tasks} | {k: v for k, v in _groups(data, tasks).items() if len(v) > 1}
    for axes, side in zip(panels, drawing.SIDES):
        layers = analysis.side_layers(data.masks, side)
        if not layers:
            continue
        numbers = analysis.layer_numbers(layers)
        found = {group: _iou_and_chance(data.masks, layers, members) for group, members in chosen.items()}
        for group, (values, _) in found.items():
            _line(axes, numbers, values, group, _label(data, group))
        _chance(axes, numbers, found["all"][1], "by chance")
        drawing.layer_axis(axes, numbers)
    drawing.legend_of(figure, panels[0], 4)
    return figure


def heat(data: RunData, side: analysis.overlap.Side) -> Figure:
    """IoU of every two directions, averaged over the layers of one side, with lines between groups of languages."""
    assert data.masks is not None
    tasks, bands = band_order(data.masks.tasks, data.pivot)
    iou = analysis.layer_iou(data.masks, analysis.side_layers(data.masks, side), tasks).mean(0)
    size = max(5.3, 0.155 * len(tasks) + 1)
    figure, panels = drawing.new_figure(size + 1.3, size)
    axes = panels[0]
    shown = np.where(np.eye(len(tasks), dtype=bool), np.nan, iou)
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    font = drawing.heat_map(figure, axes, shown, tasks, bands, max(high, low + 1e-6), vmin=low, interpolation="none")
    axes.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=font)
    axes.tick_params(length=2)
    axes.set_title(side.capitalize(), fontsize=10, loc="left")
    for number, band in enumerate(bands):
        if band.first:
            axes.axvline(band.first - 0.5, color="#ffffff", linewidth=drawing.band_line(bands, number))
    if len(tasks) <= 20:
        for row, column in zip(*np.nonzero(~np.eye(len(tasks), dtype=bool))):
            # not #000000: matplotlib leaves that out, and the text colour of the page would take its place
            tint = "#ffffff" if iou[row, column] < low + 0.6 * (high - low) else "#050505"
            text = f"{100 * iou[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=6.6, color=tint)
    return figure
