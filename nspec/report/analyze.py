"""``nspec analyze``: whether the overlap of a run's masks reflects language proximity, as a table, files and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nspec.analysis import clustering
from nspec.analysis.bands import grouping_of
from nspec.analysis.languages import genetic_distances, read_distances, script_distances
from nspec.analysis.overlap import Floats, Side, side_layers
from nspec.analysis.proximity import (
    FEWEST,
    Direction,
    LayerProximity,
    Proximity,
    Similarity,
    across_pivot,
    groups_of,
    mask_chance,
    mask_iou,
    proximity,
)
from nspec.analysis.typology import ASPECTS, Aspect, typological_distances
from nspec.files import write_text
from nspec.report import drawing, words
from nspec.report.tables import terminal_table, write_tsv

if TYPE_CHECKING:
    from rich.table import Table

PERMUTATIONS = 9999
"""Relabellings of a test, at most, unless the caller says otherwise."""
COLUMNS = [
    *("layer", "side", "direction", "languages", "r", "low", "high", "p", "p_holm", "p_bh", "exact", "permutations"),
    *("partial_r", "partial_p", "partial_p_holm", "iou_within", "iou_across", "reason"),
    *("density_r", "density_p", "density_p_holm"),
]


@dataclass(frozen=True)
class Tree:
    """Languages clustered by their mean mask distance over the layers of one side."""

    side: Side
    direction: Direction  # ``from`` or ``to`` the pivot
    languages: tuple[str, ...]  # the leaves, by number
    linkage: Floats  # float64 [n - 1, 4] of :func:`nspec.analysis.clustering.average_linkage`

    @property
    def order(self) -> list[str]:
        """The leaves as a tree shows them."""
        return [self.languages[leaf] for leaf in clustering.leaf_order(self.linkage)]


@dataclass(frozen=True)
class Analysis:
    """What :func:`analyze_run` found."""

    what: str  # ``neurons``, ``heads`` or ``halves``
    folder: Path  # what it wrote
    distances: str  # of the languages, as given to :func:`analyze_run`
    proximity: Proximity | None  # the tests; None of halves, and of heads where there are too few languages to test
    trees: tuple[Tree, ...]  # languages clustered by their masks


def analyze_run(
    run: Path,
    pivot: str = "",
    permutations: int = PERMUTATIONS,
    distances: str = "",
    heads: int = 0,
    halves: bool = False,
) -> tuple[Analysis, ...]:
    """Tests the masks of a run and writes ``analysis.json``, ``analysis.tsv`` and the dendrograms into RUN/analysis.

    Args:
        run: a run folder with ``masks``.
        pivot: the language that directions come from and go to; empty: that of the run's configuration.
        permutations: at most so many relabellings a Mantel test.
        distances: a file with the distances of languages, see :func:`nspec.analysis.languages.read_distances`, or
            ``uriel-syntax``, ``uriel-phonology``, ``uriel-inventory`` for those of
            :func:`nspec.analysis.typology.typological_distances`; empty: those in the tree of languages.
        heads: the attention heads of the dense model are tested as well, in RUN/analysis/heads: how much each matters
            to a direction is measured on so many validation sentences of it. 0: they are not. They are measured and
            saved, for the page of the run, also where there are too few languages to test.
        halves: neurons are selected from each half of the text as well, to see how stable the selection is, and saved
            in RUN/analysis/halves, for the page of the run; that needs no number of languages.

    Returns:
        What was found of the neurons, and of heads and halves where they are asked for; where there are too few
        languages, of these alone.

    Raises:
        OSError: the file of distances cannot be read.
        ValueError: the run has no masks or no pivot, a direction type has fewer than 4 languages (without ``heads`` and
            ``halves``), a language is not known, or the file of distances is not there, wrong or lacks a pair. Nothing is
            written then.
    """
    from nspec import NeuronMasks

    if not (run / "masks" / "masks.safetensors").is_file():
        raise ValueError(f"{run} has no masks/masks.safetensors; `nspec select CONFIG` or `nspec run CONFIG` makes it")
    pivot = pivot or _pivot(run)
    options: dict[str, Any] = {"distances": distances, "permutations": permutations}
    masks = NeuronMasks.load(run / "masks")
    found = []
    few = min(len(codes) for codes in across_pivot(masks, pivot).values()) < FEWEST
    if not ((heads or halves) and few):  # alone the test says what it lacks
        found = [_analyze("neurons", masks, mask_iou, run / "analysis", pivot, expected=mask_chance, **options)]
    if halves:
        from nspec.report import measured_halves

        measured_halves.save(measured_halves.measure_halves(run), run)
        found.append(Analysis("halves", run / measured_halves.FOLDER, distances, None, ()))
    if not heads:
        return tuple(found)
    from nspec.analysis.heads import head_similarity
    from nspec.report import measured_heads

    folder = run / measured_heads.FOLDER
    importance = measured_heads.measure_heads(run, heads)
    measured_heads.save(importance, run, heads)
    if few:
        return (*found, Analysis("heads", folder, distances, None, ()))
    return (*found, _analyze("heads", importance, head_similarity, folder, pivot, **options))


def _analyze(
    what: str,
    of: Any,
    similarity: Similarity,
    folder: Path,
    pivot: str,
    *,
    distances: str,
    permutations: int,
    expected: Similarity | None = None,
) -> Analysis:
    far = _distances(distances)
    found = proximity(
        of,
        pivot,
        similarity=similarity,
        expected=expected,
        distances=far,
        permutations=permutations,
        control=script_control,
    )
    result = Analysis(what, folder, distances, found, cluster(of, found, similarity))
    write_text(folder / "analysis.json", json.dumps(_plain(as_json(result)), indent=1, allow_nan=False) + "\n")
    write_tsv(folder / "analysis.tsv", COLUMNS, (_cells(found, row) for row in found.layers))
    for tree in result.trees:
        groups = [name or "not known" for name in groups_of(tree.languages, found.grouping)]
        title = f"{tree.side.capitalize()}, {_arrow(tree.direction, found.pivot)}"
        svg = drawing.svg_file(drawing.tree, "dendrogram", tree.linkage, tree.languages, groups, title)
        write_text(folder / f"dendrogram_{tree.side}_{tree.direction}_{found.pivot}.svg", svg)
    return result


def _distances(named: str) -> Callable[[Sequence[str]], Floats]:
    """The distances of languages that an option names; see :func:`analyze_run`."""
    if not named:
        return genetic_distances
    kind, _, aspect = named.partition("-")
    if kind == "uriel":
        return typological_distances(cast("Aspect", aspect))
    if not Path(named).is_file():
        by_name = ", ".join(f"uriel-{known}" for known in ASPECTS)
        raise ValueError(
            f"--distances: {named} is no file; expected one with lines such as de nl 0.2, or one of {by_name}"
        )
    return read_distances(named)


def script_control(codes: Sequence[str]) -> Floats | None:
    """The distance by script (0: the same, 1: another), the control of the partial tests.

    Returns:
        float64 [n, n]; None where the script of a language is not known, or script cannot tell them apart.
    """
    try:
        far = script_distances(codes)
    except ValueError:
        return None
    return far if 0 < far.sum() < len(codes) * (len(codes) - 1) else None


def _pivot(run: Path) -> str:
    from nspec.run.read import read_config

    path = run / "config.yaml"
    pivot = read_config(run)[0].corpus.pivot if path.is_file() else ""
    if not pivot:
        why = f"{path} names no pivot" if path.is_file() else f"{run} has no config.yaml"
        raise ValueError(f"{why}: give the language that directions come from and go to, such as --pivot en")
    return pivot


def cluster(masks: Any, found: Proximity, similarity: Similarity = mask_iou) -> tuple[Tree, ...]:
    """A tree for each side that the masks have and each direction type.

    Args:
        masks: those that were tested, or what ``similarity`` takes.
        found: the languages.
        similarity: as in :func:`nspec.analysis.proximity.proximity`.
    """
    trees = []
    for side in drawing.SIDES:
        layers = side_layers(masks, side)
        for direction, codes in found.languages.items() if layers else ():
            far = 1 - similarity(masks, layers, direction, found.pivot, codes).mean(0)
            trees.append(Tree(side, direction, codes, clustering.average_linkage(far)))
    return tuple(trees)


def as_json(result: Analysis) -> dict[str, Any]:
    """All of it as plain values; what is not defined is NaN."""
    trees = [
        {
            "side": tree.side,
            "direction": tree.direction,
            "order": tree.order,
            "newick": clustering.newick(tree.linkage, tree.languages),
        }
        for tree in result.trees
    ]
    assert result.proximity is not None
    return {**asdict(result.proximity), "distances": result.distances or "tree", "control": "script", "trees": trees}


def _plain(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _cells(found: Proximity, row: LayerProximity) -> list[Any]:
    """The cells of a row, as ``COLUMNS`` names them."""
    test, partial = row.test, row.partial
    cells: list[Any] = [row.layer, row.side, row.direction, len(found.languages[row.direction])]
    cells += [test.r, test.low, test.high, test.p, row.p_holm, row.p_bh] if test else [None] * 6
    cells += [str(test.exact).lower(), test.permutations] if test else [None, None]
    cells += [partial.r, partial.p, row.partial_p_holm] if partial else [None] * 3
    cells += [row.within, row.across, row.reason]
    return [*cells, *([row.density.r, row.density.p, row.density_p_holm] if row.density else [None] * 3)]


def _arrow(direction: Direction, pivot: str) -> str:
    return words.group_name(f"{direction}_{pivot}")


def tested(of: Any, pivot: str, **options: Any) -> Proximity | None:
    """:func:`nspec.analysis.proximity.proximity` by the groups that the page shows; None where languages are too few.

    Raises:
        ValueError: as there.
    """
    across = across_pivot(of, pivot).values()
    if min(len(codes) for codes in across) < FEWEST:
        return None
    grouping = grouping_of({code for codes in across for code in codes})
    return proximity(of, pivot, grouping=grouping, permutations=PERMUTATIONS, **options)


def summary(found: Proximity, what: str, layers: str, name: Callable[[LayerProximity], str]) -> str:
    """In how many layers related languages have more in common, after Holm's correction; and where most.

    Args:
        found: the tests.
        what: is so in these layers, such as ``the masks of closer languages overlap more``.
        layers: what they are called, all together.
        name: of one of them.
    """

    def r(row: LayerProximity) -> float:
        return row.test.r if row.test else math.nan

    said = []
    for direction in found.languages:
        tested = [row for row in found.layers if row.direction == direction and row.test]
        if tested:
            sure, best = [row for row in tested if row.p_holm < words.ALPHA], max(tested, key=r)
            said.append(
                f"{_arrow(direction, found.pivot)}: in {len(sure)} of {len(tested)} {layers} {what} "
                f"(p < {words.ALPHA:g} after Holm's correction); r is highest, {words.signed(r(best))}, in {name(best)}"
            )
    return "; ".join(said) + "." if said else "All languages are alike in every layer, so there is nothing to test."


def proximity_table(found: Proximity, distances: str = "", what: str = "neurons") -> Table:
    """The table that ``nspec analyze`` prints: a row for each layer and direction type. It fits 80 columns.

    Args:
        found: what it shows.
        distances: the file of the languages' distances, for the title; empty: the tree of languages.
        what: ``neurons`` or ``heads``.
    """
    from rich.markup import escape

    against = escape(Path(distances).name) if distances else "the tree of languages"
    verb, of = ("use the same heads", "importances") if what == "heads" else ("keep the same neurons", "masks")
    overlap = "cosine" if what == "heads" else "IoU"
    table = terminal_table(
        f"Do related languages {verb}? Distance of {of} against {against}",
        "r: Spearman, 95 % jackknife interval; p: Mantel, one-sided (r > 0); Holm, BH: adjusted over all rows; "
        f"{overlap} by {found.grouping}{_held(found)}",
        ["layer"],
        ["x", "r", "interval", "p", "Holm", "BH", f"{overlap}\nwithin", f"{overlap}\nacross"],
    )
    for row in found.layers:
        cells = [layer_name(row), _arrow(row.direction, found.pivot)]
        if row.test:
            low, high = row.test.low, row.test.high
            cells += [f"{row.test.r:+.2f}", "–" if math.isnan(low) else f"{low:+.2f} {high:+.2f}"]
            cells += [f"{p:.4f}" for p in (row.test.p, row.p_holm, row.p_bh)]
        else:
            cells += ["–"] * 5
        cells += ["–" if math.isnan(share) else f"{share:.3f}" for share in (row.within, row.across)]
        table.add_row(*cells)
    return table


def halves_table(run: Path) -> Table:
    """The table of how stable a selection is, which ``nspec analyze --halves`` prints: a row for each layer."""
    from nspec.report import measured_halves

    found = measured_halves.load(run)
    assert found is not None
    table = terminal_table(
        "Does each half of the text select the same neurons?",
        "mean IoU: of one direction's neurons from the two halves; of two directions; of the halves by chance",
        ["layer"],
        ["halves", "directions", "chance"],
    )
    for row in measured_halves.compare_halves(*found[:2]):
        shares = (row.halves, row.directions, row.chance)
        table.add_row(row.layer, *("–" if math.isnan(share) else f"{share:.3f}" for share in shares))
    return table


def _held(found: Proximity) -> str:
    """What is left where script, or density, is held constant: how many rows, and between which r."""
    said = ""
    for what, tests in (
        ("script", [(row.partial, row.partial_p_holm) for row in found.layers if row.partial]),
        ("density", [(row.density, row.density_p_holm) for row in found.layers if row.density]),
    ):
        if tests:
            r, sure = [test.r for test, _ in tests], sum(p < words.ALPHA for _, p in tests)
            said += f". With {what} held constant (partial Mantel): r {min(r):+.2f} to {max(r):+.2f}, "
            said += f"Holm p < {words.ALPHA:g} in {sure} of {len(tests)} rows"
    return said


def layer_name(row: LayerProximity) -> str:
    """``encoder 0``; of attention ``decoder 0 self`` or ``decoder 0 cross``, as transformers and PyTorch name them."""
    *path, last = row.layer.split(".")
    number = next((part for part in reversed(path) if part.isdigit()), "")
    kinds = {"self_attn": "self", "encoder_attn": "cross", "multihead_attn": "cross"}
    return " ".join(part for part in (row.side, number, kinds.get(last, "")) if part)


def print_analysis(results: Iterable[Analysis]) -> None:
    """The tables and the folders, on standard output."""
    from nspec.terminal import show

    for result in results:
        if result.what == "halves":
            show(halves_table(result.folder.parents[1]))
        elif result.proximity is None:
            print(f"{result.what}: measured, not tested: that needs {FEWEST} languages or more beside the pivot")
        else:
            show(proximity_table(result.proximity, result.distances, result.what))
        print(f"analysis: {result.folder}", flush=True)
