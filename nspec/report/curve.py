"""The curve of size, speed and quality that ``nspec export --k`` measures: as a figure, and as a table for a terminal."""

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


def engine_of(facts: Mapping[str, Any]) -> str:
    """What translated, with its version and the type of its weights: ``ctranslate2 4.8.5, int8``."""
    return f"{facts['format']} {facts['version']}" + (f", {facts['quantization']}" if facts["quantization"] else "")


def draw(facts: Mapping[str, Any]) -> Figure:
    """BLEU and chrF++ with their 95 % intervals against size on disk and against speed, with its slowest and fastest round.

    Args:
        facts: the contents of ``curve.json``.
    """
    figure, (left, right) = new_figure(9.6, 3.8, 2, sharey=True)
    engine, threads = engine_of(facts), facts["threads"]
    style(left, f"size of the folder, MB ({engine})", "score on the validation set")
    style(right, f"sentences/s ({engine}, beam {facts['decode']['beam']}, {threads} thread{'s' * (threads > 1)})", "")
    points = [*facts["points"][1:], facts["points"][0]]  # dense keeps most
    _against(left, points, lambda point: point["bytes"] / _MEGABYTE)
    _against(right, points, lambda point: point["sentences_per_second"], _rounds(points))
    left.set_ylim(0, 1.12 * max(point[f"{metric}_high"] for point in points for metric in _METRICS))
    legend_of(figure, left, 2)
    title = (
        f"{facts['system']}, {facts['task']}, {facts['sentences']} sentences: neurons by the share k of the activations"
    )
    left.set_title(title, fontsize=10, color=INK, loc="left")
    return figure


def _rounds(points: list[Point]) -> list[list[float]]:
    """How far the slowest and the fastest round of each point lie from the median one."""
    speed = "sentences_per_second"
    return [[abs(point[f"{speed}_{end}"] - point[speed]) for point in points] for end in ("low", "high")]


def _against(axes: Axes, points: list[Point], x: Callable[[Point], float], across: Any = None) -> None:
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
        axes.errorbar([x(point) for point in points], values, yerr=bars, xerr=across, label=f"{name} [95 %]", **shown)
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
        title=f"{facts['system']}, {facts['task']}, {facts['sentences']} validation sentences, {engine_of(facts)}"
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
