"""The curve of size and quality that ``nspec export --k`` measures: as a figure, and as a table for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nspec.report.drawing import INK, legend_of, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = Mapping[str, Any]
_METRICS = {"bleu": ("BLEU", "#0072b2", "o"), "chrf": ("chrF++", "#d55e00", "s")}
_MEGABYTE = 1e6


def draw(facts: Mapping[str, Any], speed: bool = True) -> Figure:
    """BLEU and chrF++ with their 95 % intervals against size on disk and against speed.

    Args:
        facts: the contents of ``curve.json``.
        speed: whether speed is shown; not of a machine that was busy with other things.
    """
    figure, panels = new_figure(9.6 if speed else 6.4, 3.8, 2 if speed else 1, sharey=True)
    left = panels[0]
    kind = facts["format"] + (f", {facts['quantization']}" if facts["quantization"] else "")
    style(left, f"size of the folder, MB ({kind})", "score on the validation set")
    points = [*facts["points"][1:], facts["points"][0]]  # dense keeps most
    _against(left, points, lambda point: point["bytes"] / _MEGABYTE)
    if speed:
        style(panels[1], f"times as fast as dense (beam {facts['decode']['beam']}, {facts['threads']} threads)", "")
        _against(panels[1], points, lambda point: point["speedup"])
    left.set_ylim(0, 1.12 * max(point[f"{metric}_high"] for point in points for metric in _METRICS))
    legend_of(figure, left, 2)
    title = (
        f"{facts['system']}, {facts['task']}, {facts['sentences']} sentences: neurons by the share k of the activations"
    )
    left.set_title(title, fontsize=10, color=INK, loc="left")
    return figure


def _against(axes: Axes, points: list[Point], x: Callable[[Point], float]) -> None:
    for metric, (name, colour, marker) in _METRICS.items():
        values = [point[metric] for point in points]
        ends = [[v - p[f"{metric}_low"], p[f"{metric}_high"] - v] for v, p in zip(values, points)]
        bars: Any = [[max(0.0, end[i]) for end in ends] for i in (0, 1)]
        shown: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "capsize": 2.5,
            "elinewidth": 0.9,
            "lw": 1.4,
            "ms": 4.5,
        }
        axes.errorbar([x(point) for point in points], values, yerr=bars, label=f"{name} [95 %]", **shown)
    for number, point in enumerate(reversed(points)):  # names of near points are not at one height
        top = max(point[f"{metric}_high"] for metric in _METRICS)
        words = "dense" if point["k"] is None else f"{point['k']:g}"
        axes.annotate(
            words,
            (x(point), top),
            xytext=(0, 4 + 9 * (number % 2)),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            color=INK,
        )


def table(facts: Mapping[str, Any]) -> Any:
    """The points for a terminal."""
    from rich.table import Table

    made = Table(
        title=f"{facts['system']}, {facts['task']}, {facts['sentences']} validation sentences, {facts['format']}"
    )
    made.add_column("k")
    for name in ("density", "MB", "x size", "BLEU [95 %]", "p", "chrF++ [95 %]", "p", "sentences/s", "x speed"):
        made.add_column(name, justify="right")
    dense = facts["points"][0]
    for point in facts["points"]:
        cells = [
            f"{point['density']:.3f}",
            f"{point['bytes'] / _MEGABYTE:.2f}",
            f"{point['bytes'] / dense['bytes']:.2f}",
        ]
        for metric in _METRICS:
            ends = f"[{point[f'{metric}_low']:.1f}, {point[f'{metric}_high']:.1f}]"
            p = point[f"{metric}_p"]
            cells += [f"{point[metric]:.1f} {ends}", "" if p is None else f"{p:.3f}"]
        cells += [f"{point['sentences_per_second']:.1f}", f"{point['speedup']:.2f}"]
        made.add_row("dense" if point["k"] is None else f"{point['k']:g}", *cells)
    return made
