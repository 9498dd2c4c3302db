"""Systems side by side: what ``nspec score`` shows and writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspec.analysis import order_tasks
from nspec.files import write_json
from nspec.report.run_data import METRICS
from nspec.report.tables import write_scores
from nspec.report.words import arrow, group_name, names_of_scores, signed

if TYPE_CHECKING:
    from rich.table import Table

Scored = Mapping[str, Mapping[str, Any]]


def write(scored: Scored, pivot: str, folder: Path) -> None:
    """``scores.tsv``, and ``<system>/scores.json`` as a run has it.

    Args:
        scored: for each system the result of :func:`nspec.mt.scoring.score_system`; all have the same directions.
        pivot: orders the directions.
        folder: where to; made as needed.
    """
    for name, scores in scored.items():
        write_json(folder / name / "scores.json", {"system": name, **scores})
    write_scores(scored, _tasks(scored, pivot), folder / "scores.tsv")


def tables(scored: Scored, pivot: str) -> list[Table | str]:
    """A table for each metric, averages before directions, each followed by a line for each of its signatures.

    Args:
        scored: as for :func:`write`.
        pivot: orders the directions.
    """
    parts: list[Table | str] = []
    for metric in METRICS:
        parts += [_table(scored, metric, pivot), *_signatures(scored, metric), ""]
    models = [scores["signatures"]["comet"] for scores in scored.values() if "comet" in scores["signatures"]]
    if models:
        parts += [_comet_table(scored, pivot), f"COMET signature: {models[0]}", ""]
    return parts[:-1]


def warning_lines(scored: Scored) -> list[str]:
    """What was warned of while systems were scored, a line for each text, with the systems and directions it is said of."""
    said: dict[str, list[str]] = {}
    for name, scores in scored.items():
        for warning in scores.get("warnings", ()):
            said.setdefault(warning["text"], []).append(f"{name} ({', '.join(warning['directions'])})")
    return [f"nspec: warning, {'; '.join(where)}: {text}" for text, where in said.items()]


def _tasks(scored: Scored, pivot: str) -> list[str]:
    return order_tasks(next(iter(scored.values()))["tasks"], pivot)


def _rows(scored: Scored, pivot: str) -> list[tuple[str, list[Mapping[str, Any]], bool]]:
    """Name, the entries of all systems, and whether a line follows: averages, then directions."""
    from rich.markup import escape

    systems = list(scored.values())
    groups = list(systems[0]["average"])
    rows = [
        (escape(group_name(group)), [scores["average"][group] for scores in systems], group == groups[-1])
        for group in groups
    ]
    return rows + [(task, [scores["tasks"][task] for scores in systems], False) for task in _tasks(scored, pivot)]


def _empty_table(title: str, caption: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("average of, direction", no_wrap=True)
    return table


def _table(scored: Scored, metric: str, pivot: str) -> Table:
    rows = _rows(scored, pivot)
    tests = [entry["baseline"] for _, entries, _ in rows for entry in entries if entry["baseline"]]
    caption = ""
    if tests:
        caption = (
            f"Δ: difference from {tests[0]['system']}; below it p of the paired bootstrap / of approximate randomisation "
            f"(two-sided, {tests[0]['ar_trials']:,} trials); ▲ ▼ significant at 5 % by the latter"
        )
    table = _empty_table(f"{names_of_scores(scored.values())[metric]}, with 95 % bootstrap intervals", caption)
    for name, scores in scored.items():
        table.add_column(name, justify="right", no_wrap=True)
        if scores["average"]["all"]["baseline"]:
            table.add_column("Δ", justify="right", no_wrap=True)
    for name, entries, last in rows:
        cells = [name]
        best = max(entry[metric] for entry in entries)
        for entry in entries:
            score = f"{entry[metric]:.2f}"
            score = f"[bold]{score}[/bold]" if entry[metric] == best and len(entries) > 1 else score
            cells.append(f"{score}\n[dim]{entry[f'{metric}_low']:.1f}–{entry[f'{metric}_high']:.1f}[/dim]")
            test = entry["baseline"]
            if test:
                p, p_ar = _p(test[f"{metric}_p"]), _p(test[f"{metric}_p_ar"])
                delta = f"{signed(test[f'{metric}_delta'])}{arrow(test, metric) or ' '}"
                cells.append(f"{delta}\n[dim]{p} / {p_ar}[/dim]")
        table.add_row(*cells, end_section=last)
    return table


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _signatures(scored: Scored, metric: str) -> list[str]:
    """They are those of the references and of the tokenizer, so that all systems have the same."""
    found: dict[str, list[str]] = {}
    for task, entry in next(iter(scored.values()))["tasks"].items():
        found.setdefault(entry[f"{metric}_signature"], []).append(task)
    metric_name = names_of_scores(scored.values())[metric]
    return [
        f"{metric_name} signature{f' ({chr(44).join(tasks)})' if len(found) > 1 else ''}: {signature}"
        for signature, tasks in found.items()
    ]


def _comet_table(scored: Scored, pivot: str) -> Table:
    table = _empty_table("COMET", "")
    for name in scored:
        table.add_column(name, justify="right", no_wrap=True)
    for name, entries, last in _rows(scored, pivot):
        table.add_row(name, *(f"{entry['comet']:.4f}" for entry in entries), end_section=last)
    return table
