"""The Markdown tables of a comparison over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from nspec.mt.groups import KINDS, LEVEL, kind_of_group
from nspec.report.run_data import METRICS
from nspec.report.words import count, group_name, p_text, sign, signed, system_name

if TYPE_CHECKING:
    from nspec.report.seeds import Difference, SeedComparison, SeedResult

_COST_HEADS = ["system", "updates", "tokens", "training, s", "tokens/s", "density"]


def tested_together(average: str) -> str:
    """What names the averages whose p values are adjusted together: all levels (of a side of the pivot), all families.

    Another average stands for itself: its p values are adjusted over systems alone.
    """
    kind, _, side = kind_of_group(average)
    return f"{kind}/{side}" if kind else average


def average_lines(comparison: SeedComparison) -> list[str]:
    """A table for each average over all directions or a side of the pivot, then one for all levels, and all families."""
    lines = []
    for group in comparison.groups:
        if kind_of_group(group)[0]:
            continue
        heads = [cell for metric in METRICS for cell in (comparison.metric_names[metric], "Δ", "p (Holm)", "seeds")]
        rows = [
            [_cell(system_name(system)), *(c for m in METRICS for c in _cells(comparison.find(system, m, group)))]
            for system in comparison.systems
        ]
        lines += ["", f"## Average of {group_name(group)}", "", *_table(["system", *heads], rows)]
    for kind in KINDS:
        lines += _group_lines(comparison, kind)
    return lines


def _group_lines(comparison: SeedComparison, kind: str) -> list[str]:
    """A table for each metric: a row for each system but the baseline, a column for each level or family."""
    columns = [group for group in comparison.groups if kind_of_group(group)[::2] == (kind, "")]
    systems = [system for system in comparison.systems if system != comparison.baseline]
    if not columns or not systems:
        return []
    over = "level of training data" if kind == LEVEL else "language family"
    lines = [
        "",
        f"## By {over}",
        "",
        f"Δ from {system_name(comparison.baseline)} with its 95 % t interval and p, in brackets adjusted by Holm's method "
        "over all systems and columns of a table; ▲ ▼ significant at 5 % after that. Directions from and to the pivot "
        "apart are in seeds.tsv.",
    ]
    for metric in METRICS:
        found = [[comparison.find(system, metric, group).difference for group in columns] for system in systems]
        rows = [[_cell(system_name(s)), *(_short(d) for d in row if d)] for s, row in zip(systems, found)]
        heads = [_cell(group_name(group)) for group in columns]
        lines += ["", *_table([comparison.metric_names[metric], *heads], rows)]
    return lines


def cost_lines(comparison: SeedComparison) -> list[str]:
    """The table of costs."""
    rows = [[_cell(system_name(system)), *_cost_cells(comparison.costs[system])] for system in comparison.systems]
    return ["", "## Costs, mean over seeds", "", *_table(_COST_HEADS, rows)]


def _difference(d: Difference) -> str:
    return f"{signed(d.mean)} [{signed(d.low)}, {signed(d.high)}]"


def _p(d: Difference) -> str:
    return f"{p_text(d.p)} ({p_text(d.p_holm).removeprefix('p ').removeprefix('= ')})"


def _short(d: Difference) -> str:
    return f"{_difference(d)}{sign(d.mean, d.p_holm)} {_p(d)}"


def _cells(result: SeedResult) -> list[str]:
    d = result.difference
    score = f"{result.mean:.2f} ± {result.sd:.2f}"
    if d is None:
        return [score, "", "", ""]
    arrows = f"▲{d.above} ▼{d.below} of {d.tested}" if d.tested else "–"
    return [score, _difference(d), _p(d), arrows]


def _cost_cells(costs: Mapping[str, float | None]) -> list[str]:
    found = costs.items()
    return ["–" if value is None else f"{value:.3f}" if key == "density" else count(value) for key, value in found]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]
