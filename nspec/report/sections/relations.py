"""The section of the page on whether related languages keep the same neurons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from nspec.analysis.blocks import OTHER, grouping_of
from nspec.analysis.languages import Grouping
from nspec.analysis.overlap import layer_numbers
from nspec.analysis.proximity import FEWEST, LayerProximity, Proximity, groups_of, proximity, sides_of_pivot
from nspec.report import words
from nspec.report.analyze import Tree, cluster, script_control
from nspec.report.drawing import inline_svg
from nspec.report.run_data import RunData

if TYPE_CHECKING:
    from nspec import NeuronMasks

PERMUTATIONS = 9999  # as many as `nspec analyze` makes
GROUPINGS: dict[Grouping, str] = {
    "ec30": "EC30's own groups",
    "branch": "branches of Glottolog's tree",
    "family": "families of Glottolog's tree",
}
"""What readers are told of each grouping."""


def relation_section(data: RunData) -> dict[str, Any] | None:
    """The Mantel test of every layer and the trees of languages; None where there are no masks.

    Returns:
        ``reason``: why there is nothing to show, else empty; ``summary``, ``rows``, ``trees``, ``grouping``, ``beside``
        (other groupings), ``permutations`` and ``controlled`` (script tells languages apart) otherwise.
    """
    if data.masks is None:
        return None
    try:
        sides = sides_of_pivot(data.masks, data.pivot)
        if min(len(codes) for codes in sides.values()) < FEWEST:
            return {"reason": f"This is tested where masks cover {FEWEST} languages or more beside the pivot."}
        codes = {code for each in sides.values() for code in each}
        found = proximity(
            data.masks,
            data.pivot,
            grouping=grouping_of(codes),
            permutations=PERMUTATIONS,
            control=script_control,
        )
    except ValueError as error:
        return {"reason": f"This cannot be tested here: {error}."}
    beside = list(dict.fromkeys(name for row in found.layers for name in row.beside))
    return {
        "reason": "",
        "summary": summary(found),
        "rows": [_row(found, row, beside) for row in found.layers],
        "beside": [GROUPINGS[name] for name in beside],
        "trees": _trees(found, data.masks),
        "grouping": GROUPINGS[found.grouping],
        "permutations": words.count(PERMUTATIONS),
        "controlled": any(row.partial for row in found.layers),
    }


def summary(
    found: Proximity,
    what: str = "the masks of closer languages overlap more",
    layers: str = "layers",
    name: Callable[[LayerProximity], str] | None = None,
) -> str:
    """In how many layers related languages keep more neurons in common, after Holm's correction; and where most.

    Args:
        found: the tests.
        what: is so in these layers.
        layers: what they are called, all together.
        name: and one of them; by default its side and its number in that.
    """
    said = []
    for direction in found.languages:
        tested = [row for row in found.layers if row.direction == direction and row.test]
        sure = [row for row in tested if row.p_holm < words.LEVEL]
        if not tested:
            continue
        best = max(tested, key=_r)
        side = words.group_name(f"{direction}_{found.pivot}")
        where = name(best) if name else _layer(found, best)
        said.append(
            f"{side}: in {len(sure)} of {len(tested)} {layers} {what} "
            f"(p < {words.LEVEL:g} after Holm's correction); r is highest, {words.signed(_r(best))}, in {where}"
        )
    return "; ".join(said) + "." if said else "All languages are alike in every layer, so there is nothing to test."


def _r(row: LayerProximity) -> float:
    return row.test.r if row.test else math.nan


def _layer(found: Proximity, row: LayerProximity) -> str:
    """``encoder 0`` for the lowest layer of the encoder."""
    layers = list(dict.fromkeys(other.layer for other in found.layers if other.side == row.side))
    return f"{row.side} {layer_numbers(layers)[layers.index(row.layer)]}"


def _row(found: Proximity, row: LayerProximity, beside: Sequence[Grouping]) -> dict[str, Any]:
    cells = ["–"] * 6
    if row.test:
        low, high = row.test.low, row.test.high
        interval = "–" if math.isnan(low) else f"{words.signed(low)} to {words.signed(high)}"
        cells = [words.signed(row.test.r), interval, f"{row.test.p:.4f}", f"{row.p_holm:.4f}", "–", "–"]
    if row.partial:
        cells[4:] = [words.signed(row.partial.r), f"{row.partial_p_holm:.4f}"]
    means = [(row.within, row.across), *(row.beside.get(name, (math.nan, math.nan)) for name in beside)]
    cells += ["–" if math.isnan(share) else f"{share:.3f}" for pair in means for share in pair]
    return {
        "layer": _layer(found, row),
        "direction": words.group_name(f"{row.direction}_{found.pivot}"),
        "cells": cells,
        "sure": bool(row.test) and row.p_holm < words.LEVEL,
        "sure_partial": bool(row.partial) and row.partial_p_holm < words.LEVEL,
        "title": row.reason or row.layer,
    }


def _trees(found: Proximity, masks: NeuronMasks) -> list[dict[str, str]]:
    from nspec.report.dendrogram import dendrogram

    return [_drawn(tree, found, dendrogram) for tree in cluster(masks, found)]


def _drawn(tree: Tree, found: Proximity, dendrogram: Any) -> dict[str, str]:
    title = f"{tree.side.capitalize()}, {words.group_name(f'{tree.direction}_{found.pivot}')}"
    groups = [name or OTHER for name in groups_of(tree.languages, found.grouping)]
    svg = dendrogram(tree.linkage, tree.languages, groups, title)
    # its own page is white with grey lines; here both are those of the page
    svg = svg.replace("#ffffff", "none").replace("#333333", "var(--ink)")
    return {"svg": inline_svg(svg, f"tree_{tree.side}_{tree.direction}", f"Tree of languages, {title}")}
