"""Whether related languages keep the same neurons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nspec.analysis.bands import OTHER
from nspec.analysis.languages import Grouping
from nspec.analysis.overlap import layer_numbers
from nspec.analysis.proximity import FEWEST, LayerProximity, Proximity, groups_of, mask_chance
from nspec.report import drawing, words
from nspec.report.analyze import PERMUTATIONS, Tree, cluster, script_control, summary, tested
from nspec.report.run_data import RunData


def section(data: RunData) -> dict[str, Any] | None:
    """The Mantel test of every layer and the trees of languages; None where there are no masks.

    Returns:
        ``reason``: why there is nothing to show, else empty; ``summary``, ``rows``, ``trees``, ``grouping``, ``beside``
        (other groupings), ``permutations``, ``controlled`` (script tells languages apart) and ``held`` (density does)
        otherwise.
    """
    if data.masks is None:
        return None
    try:
        found = tested(data.masks, data.pivot, control=script_control, expected=mask_chance)
    except ValueError as error:
        return {"reason": f"This cannot be tested here: {error}."}
    if found is None:
        return {"reason": f"This is tested where masks cover {FEWEST} languages or more beside the pivot."}
    beside = list(dict.fromkeys(name for row in found.layers for name in row.beside))
    return {
        "reason": "",
        "summary": summary(
            found, "the masks of closer languages overlap more", "layers", lambda row: _layer(found, row)
        ),
        "rows": [_row(found, row, beside) for row in found.layers],
        "beside": [words.GROUPINGS[name] for name in beside],
        "trees": [_drawn(tree, found) for tree in cluster(data.masks, found)],
        "grouping": words.GROUPINGS[found.grouping],
        "permutations": words.count(PERMUTATIONS),
        "controlled": any(row.partial for row in found.layers),
        "held": any(row.density for row in found.layers),
    }


def _layer(found: Proximity, row: LayerProximity) -> str:
    """``encoder 0`` for the lowest layer of the encoder."""
    layers = list(dict.fromkeys(other.layer for other in found.layers if other.side == row.side))
    return f"{row.side} {layer_numbers(layers)[layers.index(row.layer)]}"


def _row(found: Proximity, row: LayerProximity, beside: Sequence[Grouping]) -> dict[str, Any]:
    cells = ["–"] * 8
    if row.test:
        low, high = row.test.low, row.test.high
        interval = "–" if math.isnan(low) else f"{words.signed(low)} to {words.signed(high)}"
        cells = [words.signed(row.test.r), interval, f"{row.test.p:.4f}", f"{row.p_holm:.4f}", *["–"] * 4]
    if row.partial:
        cells[4:6] = [words.signed(row.partial.r), f"{row.partial_p_holm:.4f}"]
    if row.density:
        cells[6:] = [words.signed(row.density.r), f"{row.density_p_holm:.4f}"]
    means = [(row.within, row.across), *(row.beside.get(name, (math.nan, math.nan)) for name in beside)]
    cells += ["–" if math.isnan(share) else f"{share:.3f}" for pair in means for share in pair]
    return {
        "layer": _layer(found, row),
        "direction": words.group_name(f"{row.direction}_{found.pivot}"),
        "cells": cells,
        "sure": bool(row.test) and row.p_holm < words.ALPHA,
        "sure_partial": bool(row.partial) and row.partial_p_holm < words.ALPHA,
        "sure_density": bool(row.density) and row.density_p_holm < words.ALPHA,
        "title": row.reason or row.layer,
    }


def _drawn(tree: Tree, found: Proximity) -> str:
    title = f"{tree.side.capitalize()}, {words.group_name(f'{tree.direction}_{found.pivot}')}"
    groups = [name or OTHER for name in groups_of(tree.languages, found.grouping)]
    label, name = f"Tree of languages, {title}", f"tree_{tree.side}_{tree.direction}"
    return drawing.render(drawing.tree, label, name, tree.linkage, tree.languages, groups, title)
