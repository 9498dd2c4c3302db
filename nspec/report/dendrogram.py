"""A tree of languages, as an SVG file of its own."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from nspec.analysis.clustering import leaf_order
from nspec.analysis.overlap import Floats

# Okabe and Ito's colours, told apart with every common colour vision; more groups than colours use them again.
_COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c", "#000000"]


def dendrogram(linkage: Floats, names: Sequence[str], groups: Sequence[str], title: str) -> str:
    """Draws a tree from left (far) to right (near), a leaf a line. The same input gives the same bytes.

    Args:
        linkage: float [n - 1, 4] of :func:`nspec.analysis.clustering.average_linkage`.
        names: of the n leaves.
        groups: their groups, which give the colours of names.
        title: above the tree.
    """
    import matplotlib
    from matplotlib.figure import Figure

    order = leaf_order(linkage)
    settings: Any = {
        "svg.hashsalt": "nspec-dendrogram",
        "svg.fonttype": "none",
        "font.size": 10,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(6.4, 1.1 + 0.22 * len(names)), layout="constrained")
        axes = figure.subplots()
        heights = [0.0] * len(names)
        places = [float(order.index(leaf)) for leaf in range(len(names))]
        for first, second, distance, _ in linkage:
            a, b = int(first), int(second)
            axes.plot(
                [heights[a], distance, distance, heights[b]], [places[a], places[a], places[b], places[b]], "#333333"
            )
            heights.append(float(distance))
            places.append((places[a] + places[b]) / 2)
        known = list(dict.fromkeys(groups[leaf] for leaf in order))
        tints = {group: _COLOURS[number % len(_COLOURS)] for number, group in enumerate(known)}
        axes.yaxis.tick_right()  # before the labels are coloured: those of the left are others
        axes.set_yticks(range(len(names)), [names[leaf] for leaf in order])
        for label, leaf in zip(axes.get_yticklabels(), order):
            label.set_color(tints[groups[leaf]])
        for group in known:
            axes.plot([], [], "s", color=tints[group], label=group)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(max(heights) * 1.03 or 1.0, 0)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel("mask distance, 1 - IoU")
        axes.set_title(title, fontsize=11, loc="left")
        for spine in ("top", "left", "right"):
            axes.spines[spine].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
