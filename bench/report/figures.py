"""The figures of a report, as SVG files on a white ground, which read on light and dark pages alike.

Output is the same for the same rows: no dates, no random ids. A figure has one row of panels per device.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from bench.cases import OPERATORS
from bench.report import cells, summary
from bench.report.summary import fields, groups, is_ours, of_kind, operator_case, rank, values
from bench.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Devices = Mapping[str, Sequence[Row]]
"""Device -> its newest rows."""

# Okabe and Ito's colours, told apart with every common colour vision; grey is what all are compared with.
_GREY, _INK, _GRID, _BLUE = "#8c8c8c", "#222222", "#dddddd", "#0072b2"
_DTYPES = {"float32": "#0072b2", "bfloat16": "#d55e00", "float16": "#009e73"}
_SYSTEMS = {"dense": _GREY, "release": "#e69f00", "forward": "#0072b2", "update": "#009e73"}
_PARTS = {"task switch": "#cc79a7", "forward": "#56b4e9", "backward": "#0072b2", "optimizer": "#e69f00"}
_STYLES: list[tuple[Any, str]] = [("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ((0, (5, 1, 1, 1, 1, 1)), "v")]
_IDEAL: dict[str, Any] = {"color": _INK, "lw": 1.0, "ls": (0, (1, 1.5))}
_STEP = "training step"
_OPTIMIZER_NAMES = {"adamw": "AdamW", "row_sparse_adamw": "row-sparse AdamW"}


def style(axes: Axes, title: str, x: str = "", y: str = "", grid: Literal["x", "y"] = "y") -> None:
    """Title, labels and frame of a panel."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(True, axis=grid, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _new(width: float, heights: Sequence[float], names: Sequence[str]) -> tuple[Figure, Sequence[Any]]:
    """A figure with a strip for each device, its name over it. Inches of 96 CSS pixels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights)), layout="constrained", facecolor="white")
    strips: Any = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for strip, name in zip(strips, names):
        strip.suptitle("\n".join(textwrap.wrap(name, 100)), fontsize=11, fontweight="bold", x=0.01, ha="left")
    return figure, strips


def _speed_panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Operators that were measured at several densities, and the training step."""
    cases = groups((row for row in of_kind(rows, "operator") if row.get("speedup")), lambda row: row.get("operator"))
    found = {
        str(name): cases[name]
        for name in sorted(cases, key=lambda name: rank(OPERATORS, name))
        if len(values(cases[name], "density")) > 1
    }
    steps = [row for row in of_kind(rows, "step") if row.get("speedup") and row.get("system") != "dense"]
    pure = [row for row in steps if row.get("batch") == "pure"] or steps
    return found | ({_STEP: pure} if len(values(pure, "density")) > 1 else {})


def _line(axes: Axes, points: Sequence[Row], colour: str, style: tuple[Any, str], filled: bool = True) -> None:
    """Medians with bars from the 10 % to the 90 % quantile."""
    points = sorted(points, key=lambda row: row["density"])
    x, y = [row["density"] for row in points], np.array([row["speedup"] for row in points])
    low = np.array([row.get("speedup_low") or row["speedup"] for row in points])
    high = np.array([row.get("speedup_high") or row["speedup"] for row in points])
    bars: dict[str, Any] = {"yerr": np.abs([y - low, high - y]), "elinewidth": 1.0, "capsize": 2.5}
    inside = colour if filled else "white"
    axes.errorbar(x, y, color=colour, linestyle=style[0], marker=style[1], mfc=inside, ms=4.5, lw=1.4, **bars)


def _key(label: str, **how: Any) -> Any:
    """An entry of a legend: what a colour, a line or a marker means, whichever lines have it."""
    from matplotlib.lines import Line2D

    style: dict[str, Any] = {"color": _GREY, "lw": 1.4, "ms": 4.5, **how}
    return Line2D([], [], label=label, **style)


def _shape(row: Row) -> str:
    """The shape with its tokens for AdamW too, whose matrices are those of the same block."""
    return cells.shape_of({**row, "operator": None})


def _shape_keys(shapes: Sequence[Any]) -> list[Any]:
    return [_key(str(shape), ls=style, marker=marker) for shape, (style, marker) in zip(shapes, _STYLES)]


def _operator_lines(axes: Axes, rows: Sequence[Row], shapes: Sequence[str]) -> None:
    ours = groups((row for row in rows if is_ours(row)), lambda row: (operator_case(row), row["provider"]))
    for case in ours.values():
        first = case[0]
        style = _STYLES[shapes.index(_shape(first)) % len(_STYLES)]
        tint = _DTYPES.get(str(first.get("dtype")), _GREY)
        _line(axes, case, tint, style, filled=first["provider"] != "mode update")


def _operator_keys(rows: Sequence[Row], shapes: Sequence[str]) -> list[Any]:
    """What colours, lines and markers of the operators' panels mean."""
    dtypes = dict.fromkeys(str(row.get("dtype")) for row in rows)
    keys = [_key(dtype, color=_DTYPES.get(dtype, _GREY), lw=3) for dtype in dtypes] + _shape_keys(shapes)
    if any(row["provider"] == "mode update" for row in rows):
        keys += [_key("hollow: mode update", lw=0, marker="o", mfc="white")]
    return [*keys, _key("ideal: 1 / density", **_IDEAL)]


_model = fields("shape", "dtype", "scaled", "d_model", "encoder_layers", "tokens")


def _step_lines(axes: Axes, rows: Sequence[Row]) -> list[Any]:
    """Draws a line per system and shape, and what is possible at most; returns the keys."""
    models = list(dict.fromkeys(map(_model, rows)))
    keys: dict[Any, Any] = {}
    found = groups(sorted(rows, key=summary.step_key), lambda row: (_model(row), row["system"], row["optimizer"]))
    for (model, system, optimizer), points in found.items():
        # of a system with both optimisers the row-sparse one is drawn: what belongs with it
        if optimizer == "adamw" and (model, system, "row_sparse_adamw") in found:
            continue
        tint = _SYSTEMS.get(system, _INK)
        _line(axes, points, tint, _STYLES[models.index(model) % len(_STYLES)])
        name = f"{system}, {_OPTIMIZER_NAMES.get(optimizer, optimizer)}"
        keys[name] = _key(name, color=tint, lw=3)
    top = max(row["speedup"] for row in rows)
    for model, style in zip(models, _STYLES):
        share = summary.block_share(row for row in rows if _model(row) == model)
        if share is not None:
            x = np.linspace(min(values(rows, "density")), 1, 100)
            y = [summary.amdahl(share, density) for density in x]
            axes.plot(x, y, color=_GREY, lw=1.0, ls=style[0])
            keys["bound"] = _key("if only the blocks were to shrink", lw=1.0)
            top = max(top, *y)
    axes.set_ylim(min(0.9, *(row["speedup"] for row in rows)) - 0.05, 1 + 1.3 * (top - 1) + 0.05)
    return [*keys.values(), *_shape_keys([f"Transformer-{model[0]}, {model[1]}" for model in models])]


def speed(devices: Devices) -> Figure | None:
    """Speed-up over dense against density, a panel per operator and one for the step; ideal and 1.0 as lines."""
    panels = {name: found for name, rows in devices.items() if (found := _speed_panels(rows))}
    if not panels:
        return None
    # the last place of a strip has the keys
    columns = max(2 if len(found) in (1, 3) else 3 for found in panels.values())
    lines = {name: -(-(len(found) + 1) // columns) for name, found in panels.items()}
    figure, strips = _new(3.2 * columns, [2.75 * count + 0.3 for count in lines.values()], list(panels))
    for strip, (device, found) in zip(strips, panels.items()):
        places = list(strip.subplots(lines[device], columns, squeeze=False).flat)
        for axes in places[len(found) :]:
            axes.set_axis_off()
        drawn = [row for name, rows in found.items() if name != _STEP for row in rows if is_ours(row)]
        shapes = list(dict.fromkeys(map(_shape, drawn)))
        keys = {"operators": _operator_keys(drawn, shapes) if drawn else [], _STEP: []}
        for axes, (name, rows) in zip(places, found.items()):
            over = ", ".join(dict.fromkeys(str(row["baseline"]) for row in rows if row.get("baseline")))
            style(axes, name, "density: share of active neurons", f"speed-up over {over}")
            densities = values(rows, "density")
            x = np.linspace(min(densities), 1, 100)
            axes.plot(x, 1 / x, **_IDEAL)
            axes.axhline(1, color=_INK, lw=0.8)
            if name == _STEP:
                keys[_STEP] = _step_lines(axes, rows)
            else:
                _operator_lines(axes, rows, shapes)
            axes.set_xticks(densities, [f"{density:g}" for density in densities])
        if not drawn:
            keys[_STEP].append(_key("ideal: 1 / density", **_IDEAL))
        headed = [[_key(title, lw=0), *members] for title, members in keys.items() if members]
        entries = [entry for members in headed for entry in members]
        how: dict[str, Any] = {"fontsize": 7.5, "handlelength": 2.6, "labelspacing": 0.2, "borderpad": 0}
        legend = places[-1].legend(handles=entries, loc="center left", **how)
        for text in legend.get_texts():
            text.set_fontweight("bold" if text.get_text() in keys else "normal")
    return figure


def _reached(rows: Sequence[Row]) -> dict[str, list[tuple[str, float, float | None, str]]]:
    """By operator ours in each case at about the published masks' density: words, share of the roof, baseline's, bound."""
    limits, found = summary.ceilings(rows), []
    cases = groups(of_kind(rows, "operator"), operator_case)
    for members in sorted(cases.values(), key=lambda case: rank(OPERATORS, case[0].get("operator"))):
        density = summary.near_real(values(members, "density"))
        members = [row for row in members if row.get("density") == density]
        baseline = next(
            (summary.roof(row, limits) for row in members if row.get("provider") == row.get("baseline")), None
        )
        for row in filter(is_ours, members):
            if (ours := summary.roof(row, limits)) is not None:
                mode = "" if row["provider"] == "ours" else f"{row['provider']}, "
                at = "" if density in (None, 1) else f", density {density:g}"
                words = f"{mode}{row.get('dtype')}, {cells.shape_of(row)}"
                operator = f"{row['operator']}, over {row.get('baseline')}{at}"
                found.append((operator, (words, ours[0], baseline[0] if baseline else None, ours[1])))
    return {name: [case for _, case in own] for name, own in groups(found, lambda one: one[0]).items()}


def roofline(devices: Devices) -> Figure | None:
    """Share of the device's best speed: ours as a narrow bar in the wide one of what it is compared with."""
    panels = {name: found for name, rows in devices.items() if (found := _reached(rows))}
    if not panels:
        return None
    lines = [len(found) + sum(map(len, found.values())) for found in panels.values()]
    figure, strips = _new(9.6, [0.2 * count + 1.4 for count in lines], list(panels))
    for strip, (device, found) in zip(strips, panels.items()):
        axes = strip.subplots()
        named = [row for row in of_kind(devices[device], "ceiling") if row.get("per_second")]
        names = [" ".join(filter(None, (row["what"], row.get("dtype"), cells.per_second(row)))) for row in named]
        note = "\n".join(textwrap.wrap("measured ceilings: " + "; ".join(names), 100))
        style(axes, "", f"time that flops and bytes take at the ceilings / time taken\n{note}", grid="x")
        place, ticks, longest = 0, [], 1.0
        for operator, cases in found.items():
            ticks.append((place, operator, True))
            for label, ours, baseline, bound in cases:
                place += 1
                ticks.append((place, label, False))
                if baseline is not None:
                    axes.barh(place, 100 * baseline, color="#c4c4c4", height=0.8, label="what it is compared with")
                axes.barh(place, 100 * ours, color=_BLUE, height=0.36, label="ours")
                against = "" if baseline is None else f" ({100 * baseline:.0f} %)"
                where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
                axes.annotate(f"{100 * ours:.0f} %{against}, {bound}", (1.01, place), annotation_clip=False, **where)
                longest = max(longest, ours, baseline or 0)
            place += 1
        axes.set_yticks([at for at, _, _ in ticks], [label for _, label, _ in ticks], fontsize=8)
        for label, (_, _, head) in zip(axes.get_yticklabels(), ticks):
            label.set_fontweight("bold" if head else "normal")
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(place - 0.3, -0.6)
        axes.set_xlim(0, max(105, 102 * longest))
        axes.axvline(100, color=_INK, lw=1.0)
        axes.xaxis.set_major_formatter("{x:.0f} %")
        handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
        strip.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=2, fontsize=8.5)
    return figure


def _part_groups(rows: Sequence[Row]) -> dict[Any, list[Row]]:
    steps = [row for row in of_kind(rows, "step") if row.get("parts")]
    pure = [row for row in steps if row.get("batch") == "pure"] or steps
    return groups(sorted(pure, key=summary.step_key), _model)


def _part_label(row: Row) -> str:
    optimizer = _OPTIMIZER_NAMES.get(str(row.get("optimizer")), str(row.get("optimizer")))
    density = "" if row.get("system") == "dense" or row.get("density") is None else f" {row['density']:g},"
    return f"{row.get('system')}{density or ','} {optimizer}"


def parts(devices: Devices) -> Figure | None:
    """Milliseconds of a training step by part, stacked, a bar per system, optimiser and density."""
    panels = {name: found for name, rows in devices.items() if (found := _part_groups(rows))}
    if not panels:
        return None
    heights = [0.17 * max(map(len, found.values())) * ((len(found) + 1) // 2) + 1.5 for found in panels.values()]
    figure, strips = _new(9.6, heights, list(panels))
    used: dict[str, Any] = {}
    for strip, found in zip(strips, panels.values()):
        columns = min(2, len(found))
        places = list(strip.subplots(-(-len(found) // columns), columns, squeeze=False).flat)
        for axes in places[len(found) :]:
            axes.set_axis_off()
        for axes, members in zip(places, found.values()):
            model = f"{cells.model_name(members[0]).split(' (')[0]}, {members[0].get('dtype')}"
            tokens = f", {members[0]['tokens']} tokens" if members[0].get("tokens") else ""
            style(axes, f"{model}\n{cells.batch_name(members[0])} a batch{tokens}", "ms", grid="x")
            used |= _stack(axes, members)
    figure.legend(used.values(), used.keys(), loc="outside lower center", ncols=len(used), fontsize=9)
    return figure


def _stack(axes: Axes, rows: Sequence[Row]) -> dict[str, Any]:
    """The bars of one panel; what the parts leave of the step's time is "rest". Returns a handle for each part."""
    handles: dict[str, Any] = {}
    names = summary.part_names(rows)
    place, labels, before = 0.0, [], None
    for row in rows:
        group = (row.get("system"), row.get("optimizer"))
        place += 0.6 if before not in (None, group) else 0.0
        before = group
        left = 0.0
        whole = row.get("milliseconds") or sum(row["parts"].values())
        for name in [*names, "rest"]:
            width = row["parts"].get(name) if name != "rest" else max(0.0, whole - left)
            if width and (name != "rest" or width > 0.01 * whole):
                tint = _PARTS.get(name, "#cccccc")
                handles[name] = axes.barh(place, width, left=left, color=tint, height=0.85)
                left += width
        text = (
            cells.milliseconds(row.get("milliseconds"))
            if cells.is_baseline_step(row)
            else cells.speedup(row, spread=False)
        )
        axes.annotate(text, (max(left, whole), place), (3, 0), textcoords="offset points", va="center", fontsize=7.5)
        labels.append((place, _part_label(row)))
        place += 1
    axes.set_yticks([at for at, _ in labels], [label for _, label in labels], fontsize=7.5)
    axes.set_ylim(place - 0.4, -0.6)
    axes.margins(x=0.16)
    return handles


FIGURES: dict[str, tuple[Callable[[Devices], Any], str]] = {
    "speedup": (speed, "Speed-up over dense against density"),
    "roofline": (roofline, "Share of the device's best speed that ours and dense reach"),
    "parts": (parts, "Time of a training step by part"),
}
"""Name -> function and what the picture shows, in words."""


def draw(name: str, devices: Devices) -> str | None:
    """The figure ``name`` as the text of an SVG file; None where no row of its kind was measured."""
    import matplotlib

    ink = {key: _INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    settings: Any = ink | {
        "svg.fonttype": "none",
        "svg.hashsalt": f"nspec-bench-{name}",
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.parse_math": False,
        "legend.frameon": False,
        "axes.linewidth": 0.8,
    }
    with matplotlib.rc_context(settings):
        figure = FIGURES[name][0](devices)
        if figure is None:
            return None
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.S)
    # Verdana has the widths of DejaVu Sans, and is on the machines that the latter is not on.
    return re.sub(r"'DejaVu Sans'[^;\"]*", "'DejaVu Sans', Verdana, Geneva, sans-serif", svg)
