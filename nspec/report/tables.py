"""Scores and overlap as tables: tab-separated files, tables on the terminal, and the cells of those on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspec import analysis
from nspec.files import write_json, write_text
from nspec.report.run_data import RunData, load_run
from nspec.report.words import (
    METRICS,
    arrow,
    difference,
    group_name,
    in_sentence,
    names_of_scores,
    p_text,
    p_value,
    verdict,
)

if TYPE_CHECKING:
    from rich.table import Table

Scored = Mapping[str, Mapping[str, Any]]

_NUMBERS = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
_TESTS = [f"{metric}_{end}" for metric in METRICS for end in ("delta", "p", "p_ar")]
SCORE_COLUMNS = ["system", "direction", "sentences", *_NUMBERS, "baseline", *_TESTS, "bleu_signature", "chrf_signature"]


def write_tsv(path: Path, heads: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """A tab-separated file: numbers with six digits; what is None or not a number (NaN) is empty.

    Raises:
        OSError: the file cannot be written; what was there is unchanged.
    """

    def text(cell: Any) -> str:
        if isinstance(cell, float):
            return "" if math.isnan(cell) else f"{cell:.6g}"
        return "" if cell is None else str(cell)

    write_text(path, "".join("\t".join(map(text, row)) + "\n" for row in [heads, *rows]))


def markdown_cell(text: str) -> str:
    """Text as it may stand in a cell of a table in Markdown."""
    return text.replace("|", "\\|")


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown: the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]


def write_scores(scored: Scored, tasks: Sequence[str], path: Path) -> None:
    """Every score with its interval, tests and signature: a line per system and direction, then its averages.

    Averages have ``average:all`` and alike as their direction and the number of directions under ``sentences``' stead
    empty; numbers are points (0 to 100) and p values (``_p``: paired bootstrap, ``_p_ar``: approximate randomisation,
    empty where a run is older than that test). A last column ``comet`` is there when a system has it.

    Args:
        scored: what ``scores.json`` of each system holds.
        tasks: the directions in the order in which they are written; those that a system has not are passed by.
        path: the file.
    """
    extra = ["comet"] if any("comet" in scores["average"]["all"] for scores in scored.values()) else []
    lines = []
    for system, scores in scored.items():
        rows = [(task, scores["tasks"][task]) for task in tasks if task in scores["tasks"]]
        rows += [(f"average:{group}", entry) for group, entry in scores["average"].items()]
        for name, entry in rows:
            test = entry.get("baseline") or {}
            cells = [system, name, entry.get("sentences"), *(entry[key] for key in _NUMBERS), test.get("system")]
            cells += [*(test.get(key) for key in _TESTS), entry.get("bleu_signature"), entry.get("chrf_signature")]
            lines.append([*cells, *(entry.get(key) for key in extra)])
    write_tsv(path, SCORE_COLUMNS + extra, lines)


def write_overlap(data: RunData, folder: Path) -> None:
    """``density.tsv`` (task, layer, share of fc1 rows kept) and ``iou.tsv`` (layer, two tasks, IoU) of the masks."""
    assert data.masks is not None
    tasks = analysis.order_tasks(data.masks.tasks, data.pivot)
    layers = analysis.sort_layers(data.masks.layers)
    shares = analysis.density(data.masks, layers, tasks).tolist()
    rows = [(task, layer, share) for task, of in zip(tasks, shares) for layer, share in zip(layers, of)]
    write_tsv(folder / "density.tsv", ["direction", "layer", "density"], rows)
    iou = analysis.layer_iou(data.masks, layers, tasks).tolist()
    pairs = [(i, j) for i in range(len(tasks)) for j in range(i + 1, len(tasks))]
    overlaps = [(layer, tasks[i], tasks[j], of[i][j]) for layer, of in zip(layers, iou) for i, j in pairs]
    write_tsv(folder / "iou.tsv", ["layer", "direction_a", "direction_b", "iou"], overlaps)


def score_cell(
    data: RunData, entry: dict[str, Any] | None, metric: str, best: float | None, about: str
) -> dict[str, Any]:
    """One score on the page: its text, interval, mark and what is said on hover.

    Args:
        data: the run.
        entry: of a direction or an average in ``scores.json``; None where there is none.
        metric: ``bleu`` or ``chrf``.
        best: the highest score of those that it stands with; None: nothing is marked as highest.
        about: what the score is of.
    """
    if entry is None:
        empty = dict.fromkeys(("interval", "mark", "delta", "p"), "")
        return empty | {"score": "–", "best": False, "title": f"{about}: missing"}
    low, high, test = entry[f"{metric}_low"], entry[f"{metric}_high"], entry.get("baseline")
    title = f"{about}: {entry[metric]:.2f} {data.metric_names[metric]}, 95 % interval {low:.2f} to {high:.2f}"
    delta = p = ""
    if test:
        found, value = test[f"{metric}_delta"], p_value(test, metric)
        delta, p, says = difference(found, value), p_text(value), verdict(found, value)
        title += f"; {delta} against {in_sentence(data.name(test['system']))}, {p}, {says}"
    return {
        "score": f"{entry[metric]:.2f}",
        "interval": f"{low:.1f}–{high:.1f}",
        "best": best is not None and entry[metric] == best,
        "mark": arrow(test, metric),
        "delta": delta,
        "p": p,
        "title": title,
    }


def terminal_table(title: str, caption: str, left: Sequence[str] = (), right: Sequence[str] = ()) -> Table:
    """An empty table as all commands print them, with the columns ``left`` and ``right``, so aligned."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _score_lines(entry: Mapping[str, Any], metric: str, best: bool) -> str:
    """A score over its interval."""
    score = f"{entry[metric]:.2f}"
    score = f"[bold]{score}[/bold]" if best else score
    return f"{score}\n[dim]{entry[f'{metric}_low']:.1f}–{entry[f'{metric}_high']:.1f}[/dim]"


def _test_lines(test: Mapping[str, Any], metric: str, p: str) -> str:
    """A difference with its arrow over its p value."""
    delta = difference(test[f"{metric}_delta"], p_value(test, metric))
    return f"{delta}{arrow(test, metric) or ' '}\n[dim]{p}[/dim]"


def score_table(run: Path) -> Table:
    """The table that a run ends with on the terminal: average scores of every system, and what the tests say.

    It fits 80 columns for one pivot language. Levels and families are on the page.

    Raises:
        ValueError: ``run`` is no run folder, or a file in it is broken.
    """
    data = load_run(Path(run))
    directions = {len(scores["tasks"]) for scores in data.scored.values()}
    over = f"average of {directions.pop()} directions" if len(directions) == 1 else "average over directions"
    kinds = {True: "approximate randomisation", False: "paired bootstrap", None: "randomisation, else bootstrap"}
    by, names = kinds[data.two_sided], data.metric_names
    groups = [group for group in data.main_groups if group != "all"]
    table = terminal_table(
        f"{data.folder.resolve().name}: {over}, with 95 % bootstrap intervals",
        f"Δ: difference from {data.baseline}; p and ▲ ▼ (5 %): {by}; tokens/s and time are those of training",
        ["system"],
        [*(head for metric in METRICS for head in (names[metric], "Δ"))]
        + [f"{names['bleu']}\n{group_name(group)}" for group in groups]
        + ["tokens/s\ntime"],
    )
    best = {m: max((s["average"]["all"][m] for s in data.scored.values()), default=None) for m in METRICS}
    for name, system in data.systems.items():
        cells: list[str] = [name]
        average = system.scores["average"] if system.scores else {}
        for metric in METRICS:
            entry = average.get("all")
            test = entry.get("baseline") if entry else None
            cells.append(_score_lines(entry, metric, entry[metric] == best[metric]) if entry else "–")
            cells.append(_test_lines(test, metric, p_text(p_value(test, metric)).replace(" ", "")) if test else "")
        cells += [f"{average[group]['bleu']:.2f}" if group in average else "–" for group in groups]
        summary = system.summary or {}
        speed, seconds = summary.get("tokens_per_second"), summary.get("train_seconds")
        cells.append("–" if speed is None else f"{speed:,.0f}\n[dim]{_clock(seconds or 0)}[/dim]")
        table.add_row(*cells)
    return table


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def write_comparison(scored: Scored, pivot: str, folder: Path) -> None:
    """What ``nspec score`` writes: ``scores.tsv``, and ``<system>/scores.json`` as a run has it.

    Args:
        scored: for each system the result of :func:`nspec.mt.scoring.scores.score_system`; all have the same directions.
        pivot: orders the directions.
        folder: where to; made as needed.
    """
    for name, scores in scored.items():
        write_json(folder / name / "scores.json", {"system": name, **scores})
    write_scores(scored, _tasks(scored, pivot), folder / "scores.tsv")


def comparison_tables(scored: Scored, pivot: str) -> list[Table | str]:
    """What ``nspec score`` shows: a table for each metric, averages before directions, each with its signatures.

    Args:
        scored: as for :func:`write_comparison`.
        pivot: orders the directions.
    """
    parts: list[Table | str] = []
    for metric in METRICS:
        parts += [_comparison_table(scored, metric, pivot), *_signature_lines(scored, metric), ""]
    models = [scores["signatures"]["comet"] for scores in scored.values() if "comet" in scores["signatures"]]
    if models:
        table = terminal_table("COMET", "", ["average of, direction"], list(scored))
        for name, entries, last in _comparison_rows(scored, pivot):
            table.add_row(name, *(f"{entry['comet']:.4f}" for entry in entries), end_section=last)
        parts += [table, f"COMET signature: {models[0]}", ""]
    return parts[:-1]


def signatures(scored: Scored, metric: str) -> dict[str, list[str]]:
    """The sacreBLEU signatures of a metric that occur, with the directions of each."""
    found: dict[str, dict[str, None]] = {}
    for scores in scored.values():
        for task, entry in scores["tasks"].items():
            found.setdefault(entry[f"{metric}_signature"], {})[task] = None
    return {signature: list(tasks) for signature, tasks in found.items()}


def warnings(scored: Scored) -> dict[str, list[tuple[str, str]]]:
    """What was warned of while systems were scored: text -> the systems and directions that it is said of."""
    said: dict[str, list[tuple[str, str]]] = {}
    for name, scores in scored.items():
        for warning in scores.get("warnings", ()):
            said.setdefault(warning["text"], []).append((name, ", ".join(warning["directions"])))
    return said


def warning_lines(scored: Scored) -> list[str]:
    """The same as ``nspec score`` prints it, a line for each text."""
    lines = {text: "; ".join(f"{name} ({of})" for name, of in where) for text, where in warnings(scored).items()}
    return [f"nspec: warning, {where}: {text}" for text, where in lines.items()]


def _tasks(scored: Scored, pivot: str) -> list[str]:
    return analysis.order_tasks(next(iter(scored.values()))["tasks"], pivot)


def _comparison_rows(scored: Scored, pivot: str) -> list[tuple[str, list[Mapping[str, Any]], bool]]:
    """Name, the entries of all systems, and whether a line follows: averages, then directions."""
    from rich.markup import escape

    systems = list(scored.values())
    groups = list(systems[0]["average"])
    rows = [
        (escape(group_name(group)), [scores["average"][group] for scores in systems], group == groups[-1])
        for group in groups
    ]
    return rows + [(task, [scores["tasks"][task] for scores in systems], False) for task in _tasks(scored, pivot)]


def _comparison_table(scored: Scored, metric: str, pivot: str) -> Table:
    rows = _comparison_rows(scored, pivot)
    tests = [entry["baseline"] for _, entries, _ in rows for entry in entries if entry["baseline"]]
    caption = ""
    if tests:
        caption = (
            f"Δ: difference from {tests[0]['system']}; below it p of the paired bootstrap / of approximate randomisation "
            f"(two-sided, {tests[0]['ar_trials']:,} trials); ▲ ▼ significant at 5 % by the latter"
        )
    columns = [[name, "Δ"] if s["average"]["all"]["baseline"] else [name] for name, s in scored.items()]
    title = f"{names_of_scores(scored.values())[metric]}, with 95 % bootstrap intervals"
    table = terminal_table(title, caption, ["average of, direction"], [head for heads in columns for head in heads])
    for name, entries, last in rows:
        cells = [name]
        best = max(entry[metric] for entry in entries)
        for entry in entries:
            cells.append(_score_lines(entry, metric, entry[metric] == best and len(entries) > 1))
            test = entry["baseline"]
            if test:
                both = (test[f"{metric}_p"], test[f"{metric}_p_ar"])
                cells.append(_test_lines(test, metric, " / ".join("<0.001" if p < 0.001 else f"{p:.3f}" for p in both)))
        table.add_row(*cells, end_section=last)
    return table


def _signature_lines(scored: Scored, metric: str) -> list[str]:
    found, name = signatures(scored, metric), names_of_scores(scored.values())[metric]
    of = {text: f" ({','.join(tasks)})" if len(found) > 1 else "" for text, tasks in found.items()}
    return [f"{name} signature{where}: {text}" for text, where in of.items()]
