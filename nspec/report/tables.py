"""Scores and overlap as tables: tab-separated files, and the table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspec import analysis
from nspec.files import write_text
from nspec.report.cells import main_groups
from nspec.report.run_data import METRICS, RunData, load_run
from nspec.report.words import arrow, group_name, p_text, p_value, signed, two_sided

if TYPE_CHECKING:
    from rich.table import Table

_NUMBERS = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
_TESTS = [f"{metric}_{end}" for metric in METRICS for end in ("delta", "p", "p_ar")]
SCORE_COLUMNS = ["system", "direction", "sentences", *_NUMBERS, "baseline", *_TESTS, "bleu_signature", "chrf_signature"]


def _line(cells: list[Any]) -> str:
    return "\t".join("" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells)


def write_scores(scored: Mapping[str, Mapping[str, Any]], tasks: Sequence[str], path: Path) -> None:
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
    lines = ["\t".join(SCORE_COLUMNS + extra)]
    for system, scores in scored.items():
        rows = [(task, scores["tasks"][task]) for task in tasks if task in scores["tasks"]]
        rows += [(f"average:{group}", entry) for group, entry in scores["average"].items()]
        for name, entry in rows:
            test = entry.get("baseline") or {}
            cells = [system, name, entry.get("sentences"), *(entry[key] for key in _NUMBERS), test.get("system")]
            cells += [*(test.get(key) for key in _TESTS), entry.get("bleu_signature"), entry.get("chrf_signature")]
            lines.append(_line(cells + [entry.get(key) for key in extra]))
    write_text(path, "\n".join(lines) + "\n")


def write_overlap(data: RunData, folder: Path) -> None:
    """``density.tsv`` (task, layer, share of fc1 rows kept) and ``iou.tsv`` (layer, two tasks, IoU) of the masks."""
    assert data.masks is not None
    tasks = analysis.order_tasks(data.masks.tasks, data.pivot)
    layers = analysis.sort_layers(data.masks.layers)
    shares = analysis.density(data.masks, layers, tasks)
    lines = ["direction\tlayer\tdensity"]
    lines += [
        _line([task, layer, float(shares[i, j])]) for i, task in enumerate(tasks) for j, layer in enumerate(layers)
    ]
    write_text(folder / "density.tsv", "\n".join(lines) + "\n")
    lines = ["layer\tdirection_a\tdirection_b\tiou"]
    for layer in layers:
        iou = analysis.layer_iou(data.masks, [layer], tasks)[0]
        pairs = [(i, j) for i in range(len(tasks)) for j in range(i + 1, len(tasks))]
        lines += [_line([layer, tasks[i], tasks[j], float(iou[i, j])]) for i, j in pairs]
    write_text(folder / "iou.tsv", "\n".join(lines) + "\n")


def score_table(run: Path) -> Table:
    """The table that a run ends with on the terminal: average scores of every system, and what the tests say.

    It fits 80 columns for one pivot language. Levels and families are on the page.

    Raises:
        ValueError: ``run`` is no run folder, or a file in it is broken.
    """
    from rich import box
    from rich.table import Table

    data = load_run(Path(run))
    directions = {len(scores["tasks"]) for scores in data.scored.values()}
    over = f"average of {directions.pop()} directions" if len(directions) == 1 else "average over directions"
    kinds = {True: "approximate randomisation", False: "paired bootstrap", None: "randomisation, else bootstrap"}
    by = kinds[two_sided(data)]
    table = Table(
        title=f"{data.folder.resolve().name}: {over}, with 95 % bootstrap intervals",
        caption=f"Δ: difference from {data.baseline}; p and ▲ ▼ (5 %): {by}; tokens/s and time are those of training",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("system", no_wrap=True)
    for metric in METRICS:
        table.add_column(data.metric_names[metric], justify="right", no_wrap=True)
        table.add_column("Δ", justify="right", no_wrap=True)
    groups = [group for group in main_groups(data) if group != "all"]
    for group in groups:
        table.add_column(f"{data.metric_names['bleu']}\n{group_name(group)}", justify="right", no_wrap=True)
    table.add_column("tokens/s\ntime", justify="right", no_wrap=True)
    best = {m: max((s["average"]["all"][m] for s in data.scored.values()), default=None) for m in METRICS}
    for name, system in data.systems.items():
        cells: list[str] = [name]
        average = system.scores["average"] if system.scores else None
        for metric in METRICS:
            cells += _terminal_cells(average["all"] if average else None, metric, best[metric])
        cells += [f"{average[group]['bleu']:.2f}" if average and group in average else "–" for group in groups]
        summary = system.summary or {}
        speed, seconds = summary.get("tokens_per_second"), summary.get("train_seconds")
        cells.append("–" if speed is None else f"{speed:,.0f}\n[dim]{_clock(seconds or 0)}[/dim]")
        table.add_row(*cells)
    return table


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _terminal_cells(entry: dict[str, Any] | None, metric: str, best: float | None) -> list[str]:
    """Score over interval, and difference over p value."""
    if entry is None:
        return ["–", ""]
    score = f"{entry[metric]:.2f}"
    score = f"[bold]{score}[/bold]" if entry[metric] == best else score
    score += f"\n[dim]{entry[f'{metric}_low']:.1f}–{entry[f'{metric}_high']:.1f}[/dim]"
    test = entry.get("baseline")
    if not test:
        return [score, ""]
    delta = f"{signed(test[f'{metric}_delta'])}{arrow(test, metric) or ' '}"
    return [score, f"{delta}\n[dim]{p_text(p_value(test, metric)).replace(' ', '')}[/dim]"]
