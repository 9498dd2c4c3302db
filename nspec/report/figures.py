"""The figures of the page, as SVG to put inline.

Colours of text, axes and background are CSS variables, so that one drawing serves a light and a dark page. Output is
the same for the same input: no dates, no random ids.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nspec import analysis
from nspec.report.load import RunData, System
from nspec.report.words import group_name, system_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with every common colour vision; dense is grey because it is where all start.
COLOURS = {"dense": "#8c8c8c", "continued": "#e69f00", "forward": "#0072b2", "update": "#009e73", "random": "#cc79a7"}
_OTHERS = ["#d55e00", "#56b4e9", "#b8a200"]
_MARKERS = {"dense": "o", "continued": "s", "forward": "^", "update": "v", "random": "D"}
_GROUPS = [("all", "#8c8c8c"), ("from", "#0072b2"), ("to", "#d55e00")]

# Placeholders that become CSS variables in the SVG: matplotlib only takes colours.
_INK, _GRID = "#010203", "#010204"
# The blue is too dark on a dark page, so that one varies as well.
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--line)", "#0072b2": "var(--blue)"}

# Share of fc1 rows masked in the paper's EC30 models at k = 0.95, mean over directions, layers 0 to 5 of each side.
PUBLISHED_K = 0.95
PUBLISHED_MASKED = {
    ("from", "encoder"): [0.250, 0.209, 0.217, 0.225, 0.206, 0.179],
    ("from", "decoder"): [0.172, 0.205, 0.223, 0.254, 0.291, 0.279],
    ("to", "encoder"): [0.295, 0.213, 0.206, 0.214, 0.205, 0.176],
    ("to", "decoder"): [0.211, 0.209, 0.201, 0.187, 0.237, 0.289],
}
SIDES: tuple[analysis.overlap.Side, ...] = ("encoder", "decoder")
_POINTS = 200  # of a training curve; a longer log is averaged down to these


def colour(system: str, names: Sequence[str]) -> str:
    """The colour of a system, the same in every figure."""
    if system in COLOURS:
        return COLOURS[system]
    others = [name for name in names if name not in COLOURS]
    return _OTHERS[others.index(system) % len(_OTHERS)]


def css_colour(system: str, names: Sequence[str]) -> str:
    """The same colour for use in the page itself."""
    value = colour(system, names)
    return _VARIABLES.get(value, value)


def _figure(width: float, height: float, columns: int = 1, **kwargs: Any) -> tuple[Figure, NDArray[Any]]:
    """A figure without the global state of pyplot. Sizes in inches of 96 CSS pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, columns, squeeze=True, **kwargs))
    return figure, axes


def _style(axes: Axes, x: str, y: str, title: str = "") -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=11, color=_INK, loc="left")
    axes.grid(True, axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an ``<svg>`` element: ids made unique by ``name``, sizes left to the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg, count=1
    )
    svg = re.sub(r"'?DejaVu Sans'?[^;\"]*", "var(--sans)", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return svg


def _settings(name: str) -> Any:
    ink = {key: _INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    return ink | {
        "svg.fonttype": "none",
        "svg.hashsalt": f"nspec-{name}",
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.parse_math": False,
        "legend.frameon": False,
        "axes.linewidth": 0.8,
    }


def draw(name: str, *arguments: Any) -> str:
    """Draws the figure ``name`` (``density``, ``heat_encoder``, ...) and returns it as SVG."""
    import matplotlib

    function, label = _FIGURES[name]
    with matplotlib.rc_context(_settings(name)):
        return _svg(function(*arguments), name, label)


def groups(data: RunData, tasks: Sequence[str]) -> dict[str, list[str]]:
    """``from`` and ``to`` the pivot with their tasks, or ``all`` where there is no pivot."""
    split = {
        "from": [task for task in tasks if data.pivot and task.startswith(f"{data.pivot}-")],
        "to": [task for task in tasks if data.pivot and task.endswith(f"-{data.pivot}")],
    }
    return {key: members for key, members in split.items() if members} or {"all": list(tasks)}


def _label(data: RunData, group: str) -> str:
    return group_name("all" if group == "all" else f"{group}_{data.pivot}")


def _layer_axis(axes: Axes, layers: int) -> None:
    axes.set_xticks(range(layers))
    axes.set_xlim(-0.4, layers - 0.6)


def density(data: RunData) -> Figure:
    """Density by layer, encoder and decoder side by side, with the published shape at relative depth."""
    assert data.masks is not None
    figure, panels = _figure(9.6, 3.2, 2, sharey=True)
    colours = dict(_GROUPS)
    tasks = analysis.order_tasks(data.masks.tasks, data.pivot)
    for axes, side in zip(panels, SIDES):
        layers = analysis.side_layers(data.masks, side)
        _style(axes, f"{side} layer", "density: share of fc1 rows kept" if side == "encoder" else "", side.capitalize())
        if not layers:
            continue
        for group, members in groups(data, tasks).items():
            shares = analysis.density(data.masks, layers, members)
            line: dict[str, Any] = {
                "color": colours[group],
                "label": _label(data, group),
                "marker": "o",
                "markersize": 4,
            }
            axes.plot(range(len(layers)), shares.mean(0), **line)
            axes.fill_between(range(len(layers)), shares.min(0), shares.max(0), color=colours[group], alpha=0.15, lw=0)
            published = PUBLISHED_MASKED.get((group, side))
            if published and len(layers) > 1 and shows_published(data):
                depth = np.linspace(0, len(layers) - 1, len(published))
                style = {"color": colours[group], "linestyle": (0, (4, 3)), "linewidth": 0.9}
                axes.plot(depth, 1 - np.array(published), label=f"{_label(data, group)}, published", **style)
        _layer_axis(axes, len(layers))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def shows_published(data: RunData) -> bool:
    """Whether the published densities are drawn: only where ours were selected with the same k."""
    return math.isclose(data.config.select.k, PUBLISHED_K) and bool(data.pivot)


def mean_iou(data: RunData) -> Figure:
    """Mean pairwise IoU by layer, with what independent masks of the same densities would have."""
    assert data.masks is not None
    figure, panels = _figure(9.6, 3.2, 2, sharey=True)
    colours = dict(_GROUPS)
    tasks = analysis.order_tasks(data.masks.tasks, data.pivot)
    chosen = {"all": tasks} | {k: v for k, v in groups(data, tasks).items() if len(v) > 1}
    for axes, side in zip(panels, SIDES):
        layers = analysis.side_layers(data.masks, side)
        _style(axes, f"{side} layer", "mean IoU of two directions" if side == "encoder" else "", side.capitalize())
        if not layers:
            continue
        for group, members in chosen.items():
            values = analysis.mean_pairwise(analysis.layer_iou(data.masks, layers, members))
            axes.plot(
                range(len(layers)), values, color=colours[group], marker="o", markersize=4, label=_label(data, group)
            )
        shares = analysis.density(data.masks, layers, tasks)
        chance = [analysis.mean_pairwise(analysis.chance_iou(shares[:, i])) for i in range(len(layers))]
        axes.plot(range(len(layers)), chance, color=_INK, linestyle=":", linewidth=1.2, label="by chance")
        _layer_axis(axes, len(layers))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def heat(data: RunData, side: analysis.overlap.Side) -> Figure:
    """IoU of every two directions, averaged over the layers of one side."""
    assert data.masks is not None
    tasks = analysis.order_tasks(data.masks.tasks, data.pivot)
    iou = analysis.layer_iou(data.masks, analysis.side_layers(data.masks, side), tasks).mean(0)
    size = 5.3 if len(tasks) <= 20 else max(5.3, 0.155 * len(tasks) + 1)
    figure, panels = _figure(size + 0.5, size)
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
    if len(tasks) <= 20:
        for row, column in zip(*np.nonzero(~np.eye(len(tasks), dtype=bool))):
            # not #000000: matplotlib leaves that out, and the text colour of the page would take its place
            dark = iou[row, column] < low + 0.6 * (high - low)
            style = {"ha": "center", "va": "center", "fontsize": 6.6, "color": "#ffffff" if dark else "#050505"}
            axes.text(column, row, f"{100 * iou[row, column]:.0f}", **style)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5)
    return figure


def loss(data: RunData) -> Figure:
    """Dense; then training and validation of everything that continues from it, apart because their scales are."""
    names = list(data.systems)
    dense = data.systems.get("dense", System("dense"))
    continued = [s for n, s in data.systems.items() if n != "dense" and (s.training or s.validation)]
    figure, panels = _figure(10.4, 3.4, 3 if continued else 1)
    _style(panels[0], "updates", "loss, nats per target token", "Dense")
    _training(panels[0], dense, colour("dense", names), "training")
    _validation(panels[0], dense, colour("dense", names), "validation")
    if dense.training or dense.validation:
        panels[0].legend(fontsize=8.5)
    if continued:
        _style(panels[1], "updates after dense", "", "Continued: training")
        _style(panels[2], "updates after dense", "", "Continued: validation")
        for system in continued:
            _training(panels[1], system, colour(system.name, names), system_name(system.name))
            _validation(panels[2], system, colour(system.name, names), system_name(system.name))
        if dense.validation:
            best = min(line["valid_loss"] for line in dense.validation)
            panels[2].axhline(
                best, color=colour("dense", names), ls=(0, (4, 3)), lw=1.2, label="dense, its best validation"
            )
        shown = _legend(list(panels[1:]))
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize=8.5)
    for axes in panels:
        axes.set_xlim(left=0)
    return figure


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
        style: dict[str, Any] = {"marker": _MARKERS.get(system.name, "P"), "markersize": 4, "linewidth": 1.8}
        axes.plot(x, y, color=tint, label=label, **style)


_FIGURES: dict[str, Any] = {
    "density": (density, "Density by layer"),
    "mean_iou": (mean_iou, "Mean IoU by layer"),
    "heat_encoder": (lambda data: heat(data, "encoder"), "IoU of directions, encoder"),
    "heat_decoder": (lambda data: heat(data, "decoder"), "IoU of directions, decoder"),
    "loss": (loss, "Training and validation loss"),
}
