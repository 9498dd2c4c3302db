"""Which attention heads matter to which direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nspec.analysis.bands import band_order
from nspec.analysis.overlap import Floats, mean_pairwise, sort_layers
from nspec.analysis.proximity import FEWEST, LayerProximity
from nspec.report import drawing, words
from nspec.report.analyze import PERMUTATIONS, layer_name, summary, tested
from nspec.report.run_data import RunData

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nspec.analysis.heads import HeadImportance

ATTENTION = {
    "encoder self": "Encoder self-attention",
    "decoder self": "Decoder self-attention",
    "cross": "Cross-attention",
}


def section(data: RunData) -> dict[str, Any]:
    """Heat maps of the heads' importance, the strongest result in a sentence, and the test against language distance.

    Returns:
        ``reason``: how to get it, where nothing has been measured, else empty; ``warning`` (empty or not), ``sentences``,
        ``strongest``, ``relation``, ``tested``, ``permutations``, ``maps``, ``bands`` and ``wide`` otherwise.

    Raises:
        ValueError: what was measured is broken.
    """
    from nspec.report import measured_heads

    found = measured_heads.load(data.folder)
    if found is None:
        return {
            "reason": f"Not measured. `nspec analyze {data.folder} --heads 100` measures on validation sentences how "
            "much each attention head matters to each direction; the next `nspec report` shows it here."
        }
    importance, sentences, outdated = found
    tasks, bands = band_order(importance.tasks, data.pivot)
    maps = []
    for kind, layers in layers_of_kind(importance).items():
        rows = np.concatenate([_shares(importance, layer, tasks) for layer in layers], axis=1)
        alike = float(np.mean([mean_pairwise(importance.similarity(layer)) for layer in layers]))
        key = f"heads_{kind.replace(' ', '_')}"
        label = f"Importance of heads, {words.in_sentence(ATTENTION[kind])}"
        svg = drawing.render(
            heat, label, key, rows, [len(importance.matrix(layer)[0]) for layer in layers], tasks, data.pivot
        )
        maps.append({"kind": ATTENTION[kind], "svg": svg, "alike": f"{alike:.3f}" if len(tasks) > 1 else ""})
    relation, tested = _relation(importance, data.pivot)
    return {
        "reason": "",
        "warning": "The dense model was trained anew after this was measured: measure it again." if outdated else "",
        "sentences": "" if sentences is None else words.count(sentences),
        "strongest": strongest(importance, tasks),
        "relation": relation,
        "tested": tested,
        "permutations": words.count(PERMUTATIONS),
        "maps": maps,
        "bands": len({band.name for band in bands}) > 1,
        "wide": len(tasks) > 20,
    }


def layers_of_kind(importance: HeadImportance) -> dict[str, list[str]]:
    """The attention modules of each of :data:`ATTENTION` that there are, from bottom to top."""
    from nspec.analysis.heads import attention_kind

    layers = sort_layers(importance.layers)
    found = {kind: [layer for layer in layers if attention_kind(layer) == kind] for kind in ATTENTION}
    return {kind: members for kind, members in found.items() if members}


def _shares(importance: HeadImportance, layer: str, tasks: list[str]) -> Floats:
    return importance.shares(layer)[[importance.tasks.index(task) for task in tasks]]


def strongest(importance: HeadImportance, tasks: list[str]) -> str:
    """The head that stands out most in one direction, its share there being farthest from its mean over directions.

    It is a sentence; empty for a single direction.
    """
    if len(tasks) < 2:
        return ""
    best: tuple[float, str] = (-1.0, "")
    for kind, layers in layers_of_kind(importance).items():
        for depth, layer in enumerate(layers):
            shares = _shares(importance, layer, tasks)
            mean = shares.mean(0)
            row, head = np.unravel_index(np.argmax(np.abs(shares - mean)), shares.shape)
            apart = float(abs(shares[row, head] - mean[head]))
            if apart > best[0] + 1e-12:
                share, usual = f"{100 * shares[row, head]:.0f} %", f"{100 * mean[head]:.0f} %"
                even = f"{100 / shares.shape[1]:.0f} %"
                where = f"{words.in_sentence(ATTENTION[kind])}, layer {depth}"
                said = (
                    f"Directions differ most in head {head} of {where}: it has {share} of its layer's importance in "
                    f"{tasks[row]} and {usual} on average over directions (it would be {even} if all heads mattered "
                    "alike)."
                )
                best = (apart, said)
    return best[1]


def _relation(importance: HeadImportance, pivot: str) -> tuple[str, bool]:
    """Whether closer languages use heads more alike, and whether that was tested: where it was not, why not."""
    from nspec.analysis.heads import head_similarity

    what = "related languages use the same heads"
    try:
        found = tested(importance, pivot, similarity=head_similarity)
    except ValueError as error:
        return f"Whether {what} cannot be tested here: {error}.", False
    if found is None:
        return f"Whether {what} is tested where there are {FEWEST} languages or more beside the pivot.", False
    said = summary(found, "closer languages use heads more alike", "attention layers", _name)
    return f"Do related languages use the same heads? {said}", True


def _name(row: LayerProximity) -> str:
    return f"{layer_name(row)}-attention" if layer_name(row).endswith(("self", "cross")) else layer_name(row)


def heat(rows: Floats, heads: list[int], tasks: list[str], pivot: str) -> Figure:
    """Shares of the importance of a layer, [tasks in the order of bands, sum of ``heads``], ``heads`` to a layer."""
    _, bands = band_order(tasks, pivot)
    width = min(11.0, max(4.6, 2.4 + 0.24 * rows.shape[1]))
    figure, panels = drawing.new_figure(width, max(1.8, 0.9 + (0.155 if len(tasks) > 20 else 0.24) * len(tasks)))
    axes = panels[0]
    drawing.heat_map(figure, axes, rows, tasks, bands, max(float(rows.max()), 1e-6), vmin=0.0, aspect="auto")
    ends = np.cumsum([0, *heads])
    axes.set_xticks((ends[:-1] + ends[1:] - 1) / 2, [f"layer {depth}" for depth in range(len(heads))], fontsize=8.0)
    axes.tick_params(length=0)
    for end in ends[1:-1]:
        axes.axvline(end - 0.5, color="#ffffff", linewidth=2.4)
    return figure
