"""The figures of the page about masks and training; those that compare methods are in :mod:`nspec.report.charts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nspec import analysis
from nspec.analysis.blocks import block_order
from nspec.report import charts, published
from nspec.report.drawing import (
    GROUPS,
    INK,
    MARKERS,
    SIDES,
    colour,
    css_colour,
    groups,
    label_of,
    layer_axis,
    new_figure,
    render,
    style,
)
from nspec.report.run_data import RunData, System

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SIDES", "colour", "css_colour", "draw", "groups"]

_POINTS = 200  # of a training curve; a longer log is averaged down to these


def draw(name: str, *arguments: Any, key: str = "") -> str:
    """Draws the figure ``name`` (``masked``, ``heat_encoder``, ...) and returns it as SVG.

    Args:
        name: of the figure.
        arguments: what it shows.
        key: begins its ids where a page has several of the name.
    """
    function, label = _FIGURES[name]
    return render(function, label, key or name, *arguments)


def masked(data: RunData) -> Figure:
    """Share of fc1 rows masked by layer, encoder and decoder side by side, with the published one at relative depth."""
    assert data.masks is not None
    figure, panels = new_figure(9.6, 3.4, 2, sharey=True)
    colours = dict(GROUPS)
    tasks = analysis.order_tasks(data.masks.tasks, data.pivot)
    for axes, side in zip(panels, SIDES):
        layers = analysis.side_layers(data.masks, side)
        style(axes, f"{side} layer", "share of fc1 rows masked" if side == "encoder" else "", side.capitalize())
        if not layers:
            continue
        numbers = analysis.layer_numbers(layers)
        for group, members in groups(data, tasks).items():
            shares = 1 - analysis.density(data.masks, layers, members)
            line: dict[str, Any] = {"color": colours[group], "marker": "o", "markersize": 4}
            label = f"{label_of(data, group)}, this run (k = {data.config.select.k:g})"
            axes.plot(numbers, shares.mean(0), label=label, **line)
            axes.fill_between(numbers, shares.min(0), shares.max(0), color=colours[group], alpha=0.15, lw=0)
            label = f"{label_of(data, group)}, published (k = {published.MASKED_K:g})"
            _published(axes, published.MASKED.get((group, side)), numbers, colours[group], label)
        layer_axis(axes, numbers)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _published(axes: Axes, values: Sequence[float] | None, numbers: Sequence[int], tint: str, label: str) -> None:
    """A dashed line from the first layer to the last, whatever number of layers the published model had."""
    whole = list(numbers) == list(range(len(numbers)))  # of a part of the layers it is not known how deep the model is
    if values and len(numbers) > 1 and whole:
        dashed: dict[str, Any] = {"color": tint, "linestyle": (0, (4, 3)), "linewidth": 1.1}
        axes.plot(np.linspace(0, numbers[-1], len(values)), values, label=label, **dashed)


def published_iou(data: RunData) -> Figure:
    """Mean IoU by layer of the two direction types that were published, this run's beside the published one's."""
    masks, own = iou_masks(data)
    figure, panels = new_figure(9.6, 3.4, 2, sharey=True)
    colours = dict(GROUPS)
    tasks = analysis.order_tasks(masks.tasks, data.pivot)
    for axes, (group, side) in zip(panels, published.IOU):
        layers = analysis.side_layers(masks, side)  # type: ignore[arg-type]
        title = f"{side.capitalize()}, {label_of(data, group)}"
        style(axes, f"{side} layer", "mean IoU of two directions" if side == "encoder" else "", title)
        members = groups(data, tasks).get(group, [])
        if not layers:
            continue
        numbers = analysis.layer_numbers(layers)
        if len(members) > 1:
            values = analysis.mean_pairwise(analysis.layer_iou(masks, layers, members))
            line: dict[str, Any] = {"color": colours[group], "marker": "o", "markersize": 4}
            axes.plot(numbers, values, label=f"this run (k = {own:g})", **line)
            shares = analysis.density(masks, layers, members)
            chance = [analysis.mean_pairwise(analysis.chance_iou(column)) for column in shares.T]
            axes.plot(numbers, chance, color=INK, linestyle=":", linewidth=1.2, label="this run, by chance")
        label = f"published (k = {published.IOU_K:g})"
        _published(axes, published.IOU[group, side], numbers, colours[group], label)
        layer_axis(axes, numbers)
        if axes.get_legend_handles_labels()[0]:  # one direction of a type and one layer: there is nothing to draw
            axes.legend(fontsize=8.5)
    return figure


def iou_masks(data: RunData) -> tuple[Any, float]:
    """The masks to compare with the published IoU, and their k: a variant of forward that differs in k alone, if nearer."""
    found = [(data.config.select.k, data.masks)]
    for name, masks in data.variant_masks.items():
        variant = data.variants[name]
        if variant.of == "forward" and set(variant.overrides) == {"select.k"}:
            found.append((float(variant.overrides["select.k"]), masks))
    k, chosen = min(found, key=lambda pair: abs(pair[0] - published.IOU_K))
    return chosen, k


def mean_iou(data: RunData) -> Figure:
    """Mean pairwise IoU by layer, with what independent masks of the same densities would have."""
    assert data.masks is not None
    figure, panels = new_figure(9.6, 3.2, 2, sharey=True)
    colours = dict(GROUPS)
    tasks = analysis.order_tasks(data.masks.tasks, data.pivot)
    chosen = {"all": tasks} | {k: v for k, v in groups(data, tasks).items() if len(v) > 1}
    for axes, side in zip(panels, SIDES):
        layers = analysis.side_layers(data.masks, side)
        style(axes, f"{side} layer", "mean IoU of two directions" if side == "encoder" else "", side.capitalize())
        if not layers:
            continue
        numbers = analysis.layer_numbers(layers)
        for group, members in chosen.items():
            values = analysis.mean_pairwise(analysis.layer_iou(data.masks, layers, members))
            line: dict[str, Any] = {"color": colours[group], "marker": "o", "markersize": 4}
            axes.plot(numbers, values, label=label_of(data, group), **line)
        shares = analysis.density(data.masks, layers, tasks)
        chance = [analysis.mean_pairwise(analysis.chance_iou(shares[:, i])) for i in range(len(layers))]
        axes.plot(numbers, chance, color=INK, linestyle=":", linewidth=1.2, label="by chance")
        layer_axis(axes, numbers)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def heat(data: RunData, side: analysis.overlap.Side) -> Figure:
    """IoU of every two directions, averaged over the layers of one side, with lines between groups of languages."""
    assert data.masks is not None
    tasks, blocks = block_order(data.masks.tasks, data.pivot)
    iou = analysis.layer_iou(data.masks, analysis.side_layers(data.masks, side), tasks).mean(0)
    size = 5.3 if len(tasks) <= 20 else max(5.3, 0.155 * len(tasks) + 1)
    figure, panels = new_figure(size + 1.3, size)
    axes = panels[0]
    shown = np.where(np.eye(len(tasks), dtype=bool), np.nan, iou)
    low, high = float(np.nanmin(shown)), float(np.nanmax(shown))
    image = axes.imshow(shown, cmap="viridis", vmin=low, vmax=max(high, low + 1e-6), interpolation="none")
    font = 8.0 if len(tasks) <= 20 else 6.4
    axes.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=font)
    axes.set_yticks(range(len(tasks)), tasks, fontsize=font)
    axes.tick_params(length=2)
    axes.set_title(side.capitalize(), fontsize=10, loc="left")
    for spine in axes.spines.values():
        spine.set_visible(False)
    for number, block in enumerate(blocks):
        if block.first:
            # where the direction type changes the line is stronger
            width = 2.4 if block.part != blocks[number - 1].part else 0.9
            for line in (axes.axhline, axes.axvline):
                line(block.first - 0.5, color="#ffffff", linewidth=width)
        if len(blocks) > 1:
            middle = block.first + (block.size - 1) / 2
            axes.text(len(tasks) - 0.3, middle, block.name, ha="left", va="center", fontsize=font)
    if len(tasks) <= 20:
        for row, column in zip(*np.nonzero(~np.eye(len(tasks), dtype=bool))):
            # not #000000: matplotlib leaves that out, and the text colour of the page would take its place
            dark = iou[row, column] < low + 0.6 * (high - low)
            text = {"ha": "center", "va": "center", "fontsize": 6.6, "color": "#ffffff" if dark else "#050505"}
            axes.text(column, row, f"{100 * iou[row, column]:.0f}", **text)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5)
    return figure


def loss(data: RunData) -> Figure:
    """Dense; then training and validation of everything that continues from it, apart because their scales are."""
    names = list(data.systems)
    dense = data.systems.get("dense", System("dense"))
    continued = [data.systems[name] for name in continued_systems(data)]
    figure, panels = new_figure(10.4, 3.4, 3 if continued else 1)
    style(panels[0], "updates", "loss, nats per target token", "Dense")
    _training(panels[0], dense, colour("dense", names), "training")
    _validation(panels[0], dense, colour("dense", names), "validation")
    if dense.training or dense.validation:
        panels[0].legend(fontsize=8.5)
    if continued:
        style(panels[1], "updates after dense", "", "Continued: training")
        style(panels[2], "updates after dense", "", "Continued: validation")
        for system in continued:
            _training(panels[1], system, colour(system.name, names), data.short(system.name))
            _validation(panels[2], system, colour(system.name, names), data.short(system.name))
        if dense.validation:
            best = min(line["valid_loss"] for line in dense.validation)
            panels[2].axhline(
                best, color=colour("dense", names), ls=(0, (4, 3)), lw=1.2, label="dense, its best validation"
            )
        shown = _legend(list(panels[1:]))
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(len(shown), 5), fontsize=8.5)
    for axes in panels:
        axes.set_xlim(left=0)
    return figure


def continued_systems(data: RunData) -> list[str]:
    """Systems that go on from dense as one model, so that their losses compare; a model for each direction does not."""
    return [
        name
        for name, system in data.systems.items()
        if name != "dense"
        and data.base_of(name) not in ("finetuned", "bilingual")
        and (system.training or system.validation)
    ]


def _legend(panels: Sequence[Axes]) -> dict[str, Any]:
    """Label -> line over several panels; where a label is in more than one, the last panel's line stands for it."""
    return {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels())}


def _training(axes: Axes, system: System, tint: str, label: str) -> None:
    """Training loss as a thin line; of a long log, means over equal pieces."""
    if not system.training:
        return
    steps = np.array([line["step"] for line in system.training], dtype=float)
    values = np.array([line["loss"] for line in system.training], dtype=float)
    pieces = min(len(steps), _POINTS)
    x = [piece.mean() for piece in np.array_split(steps, pieces)]
    y = [piece.mean() for piece in np.array_split(values, pieces)]
    axes.plot(x, y, color=tint, linewidth=1.0, label=label)


def _validation(axes: Axes, system: System, tint: str, label: str) -> None:
    """Validation loss as a strong line with a marker for every measurement."""
    if system.validation:
        x = [line["step"] for line in system.validation]
        y = [line["valid_loss"] for line in system.validation]
        line: dict[str, Any] = {"marker": MARKERS.get(system.name, "P"), "markersize": 4, "linewidth": 1.8}
        axes.plot(x, y, color=tint, label=label, **line)


_FIGURES: dict[str, Any] = {
    "masked": (masked, "Share of fc1 rows masked by layer, with published values"),
    "published_iou": (published_iou, "Mean IoU by layer, with published values"),
    "mean_iou": (mean_iou, "Mean IoU by layer"),
    "heat_encoder": (lambda data: heat(data, "encoder"), "IoU of directions, encoder"),
    "heat_decoder": (lambda data: heat(data, "decoder"), "IoU of directions, decoder"),
    "loss": (loss, "Training and validation loss"),
    "levels": (charts.levels, "Score change by level of training pairs"),
    "ablation": (charts.ablation, "Score change against an option"),
    "stability": (charts.stability, "IoU of the neurons of variants with those they vary, by layer"),
}
