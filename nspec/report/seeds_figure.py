"""The figure of a comparison over seeds."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from nspec.report.drawing import colour
from nspec.report.run_data import METRICS
from nspec.report.words import group_name, system_name

if TYPE_CHECKING:
    from nspec.report.seeds import SeedComparison


def draw(comparison: SeedComparison, group: str) -> str:
    """Differences from the baseline, a panel for each metric, as an SVG file. The same input gives the same bytes.

    Args:
        comparison: with a system beside the baseline.
        group: one of its averages.
    """
    import matplotlib
    from matplotlib.figure import Figure

    systems = [system for system in comparison.systems if system != comparison.baseline]
    settings: Any = {"svg.hashsalt": "nspec-seeds", "svg.fonttype": "none", "font.size": 10, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(9.6, 1.2 + 0.36 * len(systems)), layout="constrained")
        panels = figure.subplots(1, len(METRICS), sharey=True)
        for axes, metric in zip(panels, METRICS):
            axes.axvline(0, color="#333333", linewidth=0.8)
            for place, system in enumerate(systems):
                d = comparison.find(system, metric, group).difference
                assert d is not None
                tint = colour(system, comparison.systems)
                axes.plot([d.low, d.high], [place, place], color=tint, linewidth=2)
                axes.plot([d.mean], [place], "|", color=tint, markersize=14, markeredgewidth=2)
                axes.plot(d.values, [place] * len(d.values), "o", color=tint, markersize=6, markeredgecolor="white")
            axes.set_yticks(range(len(systems)), [system_name(system) for system in systems])
            axes.set_ylim(len(systems) - 0.5, -0.5)
            axes.set_xlabel(f"{comparison.metric_names[metric]} above {system_name(comparison.baseline)}")
            axes.grid(True, axis="x", color="#dddddd", linewidth=0.8)
            axes.set_axisbelow(True)
            for side in ("top", "left", "right"):
                axes.spines[side].set_visible(False)
        figure.suptitle(f"{len(comparison.seeds)} seeds, {group_name(group)}: mean with 95 % t interval", fontsize=11)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
