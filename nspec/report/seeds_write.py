"""A comparison over seeds as files: Markdown, tab-separated tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspec.files import write_text
from nspec.mt.scoring.averages import AVERAGED_BY, LEVEL, kind_of_group
from nspec.report import drawing
from nspec.report.declared import compared
from nspec.report.seeds import COSTS, Difference, SeedComparison, SeedResult
from nspec.report.tables import markdown_cell, markdown_table, write_tsv
from nspec.report.words import METRICS, bare_p, count, group_name, p_text, sign, signed, system_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = ["system", "metric", "average", "seeds", "mean", "sd", "baseline", "delta", "delta_low", "delta_high"]
_COLUMNS += ["t", "p", "p_holm", "tested", "above", "below"]
_COST_HEADS = ["system", "updates", "tokens", "training, s", "tokens/s", "density"]


def write(comparison: SeedComparison, folder: Path) -> None:
    """Writes ``seeds.md``, ``seeds.tsv``, ``costs.tsv`` and ``seeds_<average>.svg`` (with two systems or more).

    ``seeds.tsv`` has validation losses too. A line of it has after the statistics the score and the difference of each
    seed. There is no figure of levels and families.

    Raises:
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    write_text(folder / "seeds.md", markdown(comparison))
    each = [f"{what}:{seed}" for what in ("score", "delta") for seed in comparison.seeds]
    results = (*comparison.results, *comparison.losses)
    write_tsv(folder / "seeds.tsv", _COLUMNS + each, (_row(comparison, result) for result in results))
    costs = ([system, *comparison.costs[system].values()] for system in comparison.systems)
    write_tsv(folder / "costs.tsv", ["system", *COSTS], costs)
    for group in comparison.groups if len(comparison.systems) > 1 else ():
        if not kind_of_group(group)[0]:
            svg = drawing.svg_file(differences, "seeds", comparison, group)
            write_text(folder / f"seeds_{group.replace('/', '_')}.svg", svg)


def _row(comparison: SeedComparison, result: SeedResult) -> list[Any]:
    seeds, d = len(comparison.seeds), result.difference
    row: list[Any] = [result.system, result.metric, result.group, seeds, result.mean, result.sd]
    row += [comparison.baseline, d.mean, d.low, d.high, d.t, d.p, d.p_holm] if d else [None] * 7
    row += [d.tested, d.above, d.below] if d else [None] * 3
    return [*row, *result.scores, *(d.values if d else [None] * seeds)]


def differences(comparison: SeedComparison, group: str) -> Figure:
    """Differences from the baseline, a panel for each metric: a dot a seed, the mean with its 95 % interval, by system.

    Args:
        comparison: with a system beside the baseline.
        group: one of its averages.
    """
    systems = [system for system in comparison.systems if system != comparison.baseline]
    figure, panels = drawing.new_figure(9.6, 1.2 + 0.36 * len(systems), len(METRICS), sharey=True)
    for axes, metric in zip(panels, METRICS):
        above = f"{comparison.metric_names[metric]} above {system_name(comparison.baseline)}"
        drawing.style(axes, above, "", lines="x", frame=["left"])
        axes.axvline(0, color=drawing.INK, linewidth=0.8)
        for place, system in enumerate(systems):
            d = comparison.find(system, metric, group).difference
            assert d is not None
            tint = drawing.colour(system, comparison.systems)
            axes.plot([d.low, d.high], [place, place], color=tint, linewidth=2)
            axes.plot([d.mean], [place], "|", color=tint, markersize=14, markeredgewidth=2)
            axes.plot(d.values, [place] * len(d.values), "o", color=tint, markersize=6, markeredgecolor="white")
        axes.set_yticks(range(len(systems)), [system_name(system) for system in systems])
        axes.set_ylim(len(systems) - 0.5, -0.5)
    figure.suptitle(f"{len(comparison.seeds)} seeds, {group_name(group)}: mean with 95 % t interval", fontsize=11)
    return figure


def markdown(comparison: SeedComparison) -> str:
    """All of it as Markdown: tables of the averages, then costs, notes and signatures."""
    seeds, names = comparison.seeds, comparison.metric_names
    base = system_name(comparison.baseline)
    lines = [
        f"# {len(seeds)} seeds ({', '.join(map(str, seeds))}), {len(comparison.tasks)} directions",
        "",
        f"Mean ± standard deviation over seeds. Δ: difference from {base}, paired by seed, with its 95 % t interval; "
        "p: two-sided paired t test over seeds, adjusted over systems by Holm's method. ▲ ▼: in how many seeds the "
        "run's own test on its test set is significant at 5 %.",
    ]
    lines[2:2] = _declared_lines(comparison)
    lines += [*_loss_lines(comparison), *_average_lines(comparison)]
    rows = [
        [markdown_cell(system_name(system)), *_cost_cells(comparison.costs[system])] for system in comparison.systems
    ]
    lines += ["", "## Costs, mean over seeds", "", *markdown_table(_COST_HEADS, rows), ""]
    lines += [f"- {note}" for note in comparison.notes]
    lines += [f"- {names[m]} signature: `{each}`" for m in METRICS for each in comparison.signatures[m]]
    return "\n".join(lines) + "\n"


def _declared_lines(comparison: SeedComparison) -> list[str]:
    """The hypothesis and the comparison that were declared, with its result; empty where nothing was."""
    lines = [f"**Hypothesis.** {comparison.hypothesis}", ""] if comparison.hypothesis else []
    if (primary := comparison.primary) is None:
        return lines
    said = compared(primary, comparison.baseline, comparison.metric_names, system_name)
    try:
        d = comparison.find(primary.system, primary.metric, primary.average).difference
    except KeyError:
        d = None
    if d is None:
        return [*lines, f"**Declared comparison.** {said}: not every run says it.", ""]
    unit, digits = ("nats, negative is better", 3) if primary.metric == "loss" else ("points", 2)
    result = f"{_difference(d, digits)} ({unit}), {p_text(d.p)}, not corrected, as the one declared"
    return [*lines, f"**Declared comparison.** {said}: {result}.", ""]


def _loss_lines(comparison: SeedComparison) -> list[str]:
    """The table of validation losses: the baseline's, and how far each other system is from it."""
    groups = list(dict.fromkeys(result.group for result in comparison.losses))
    if not groups:
        return []
    base = markdown_cell(system_name(comparison.baseline))
    lines = [
        "",
        "## Validation loss",
        "",
        f"Nats per target token of the best checkpoint, mean over directions. Below {base} the difference from it, paired "
        "by seed, with its 95 % t interval and p, in brackets adjusted by Holm's method over systems (and levels); "
        "negative is better.",
        "",
    ]
    rows: list[list[str]] = []
    for system in dict.fromkeys(result.system for result in comparison.losses):
        found = [result for result in comparison.losses if result.system == system]
        if system == comparison.baseline:
            rows.insert(0, [base, *(f"{result.mean:.3f} ± {result.sd:.3f}" for result in found)])
        else:
            cells = [f"{_difference(r.difference, 3)} {_p(r.difference)}" for r in found if r.difference]
            rows.append([markdown_cell(system_name(system)), *cells])
    return [*lines, *markdown_table(["system", *(markdown_cell(group_name(group)) for group in groups)], rows)]


def _average_lines(comparison: SeedComparison) -> list[str]:
    """A table for each average over all directions, from or to the pivot, then one for all levels, and all families."""
    lines = []
    for group in comparison.groups:
        if kind_of_group(group)[0]:
            continue
        heads = [cell for metric in METRICS for cell in (comparison.metric_names[metric], "Δ", "p (Holm)", "seeds")]
        rows = [
            [
                markdown_cell(system_name(system)),
                *(c for m in METRICS for c in _cells(comparison.find(system, m, group))),
            ]
            for system in comparison.systems
        ]
        lines += ["", f"## Average of {group_name(group)}", "", *markdown_table(["system", *heads], rows)]
    for kind in AVERAGED_BY:
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
        rows = [[markdown_cell(system_name(s)), *(_short(d) for d in row if d)] for s, row in zip(systems, found)]
        heads = [markdown_cell(group_name(group)) for group in columns]
        lines += ["", *markdown_table([comparison.metric_names[metric], *heads], rows)]
    return lines


def _difference(d: Difference, digits: int = 2) -> str:
    return f"{signed(d.mean, digits)} [{signed(d.low, digits)}, {signed(d.high, digits)}]"


def _p(d: Difference) -> str:
    return f"{p_text(d.p)} ({bare_p(d.p_holm)})"


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
