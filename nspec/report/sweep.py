"""Runs that differ in one thing at a time: how far each system's validation loss is from the baseline's, by that thing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from nspec.files import write_text
from nspec.mt.scoring.averages import kind_of_group
from nspec.report import drawing
from nspec.report.losses import mean_losses
from nspec.report.run_data import RunData, load_run
from nspec.report.tables import markdown_cell, markdown_table, write_tsv
from nspec.report.words import group_name, signed, system_name
from nspec.run.yaml import flatten
from nspec.yaml_text import one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What may differ between two runs without a word: it is no property of the text, the model or the training.
_APART = ("run.", "decode.", "score.")
_HEADS = ["differs in", "average", "system", "runs", "loss", "delta"]


@dataclass(frozen=True)
class SweepPoint:
    """Runs of one configuration, of one seed or several."""

    changes: Mapping[str, Any]  # option -> its value, where that is not the first run's; empty for the first
    directions: int
    folders: tuple[Path, ...]
    losses: Mapping[str, Mapping[str, float]]  # system -> average -> nats per target token, mean over the runs


@dataclass(frozen=True)
class Sweep:
    """What :func:`compare_runs` found."""

    baseline: str
    systems: tuple[str, ...]  # those that a run trained beside the baseline, in the order of the first that did
    groups: tuple[str, ...]  # all directions, those from and to the pivot
    options: Mapping[str, Any]  # of the first run
    points: tuple[SweepPoint, ...]  # the first run's is the first
    axes: Mapping[str, tuple[SweepPoint, ...]]  # what differs, in words -> its points, the first run's among them

    def delta(self, point: SweepPoint, system: str, group: str) -> float | None:
        """A system's loss minus the baseline's, in nats; None where the runs of a point do not have the system."""
        loss = point.losses.get(system, {}).get(group)
        return None if loss is None else loss - point.losses[self.baseline][group]


def compare_runs(folders: Iterable[Path | str], systems: Sequence[str] = ()) -> Sweep:
    """Compares runs that differ in options of their text, model or training with the first of them.

    Args:
        folders: run folders with trained systems; scores are not needed. Those that differ in the same options are points
            of one axis, with the first run. Runs of one configuration with different seeds are one point, their mean.
        systems: those that are compared with the baseline, in this order; none: all.

    Raises:
        ValueError: a system that no run has trained, fewer than two configurations, other baselines, or a run whose
            baseline has no validation losses.
    """
    runs = [load_run(Path(folder)) for folder in folders]
    for run in runs:
        if run.baseline != runs[0].baseline:
            raise ValueError(
                f"the baseline is {runs[0].baseline} in {runs[0].folder} and {run.baseline} in {run.folder}; runs are "
                "compared by their differences from one baseline (score.baseline)"
            )
        if not mean_losses(run, run.baseline):
            raise ValueError(
                f"{run.folder} has no validation losses of {run.baseline}, or those of a version that counted the tag "
                f"of the target; `nspec specialize` makes them (with `--redo specialize:{run.baseline}` anew)"
            )
    together: dict[str, list[RunData]] = {}
    for run in runs:
        together.setdefault(str(_changes(runs[0], run)), []).append(run)
    points = [_point(runs[0], alike) for alike in together.values()]
    if len(points) < 2:
        raise ValueError(
            f"found {len(points)} configuration in {len(runs)} runs, expected runs that differ in an option"
        )
    axes: dict[str, list[SweepPoint]] = {}
    for point in points[1:]:
        axes.setdefault(", ".join(point.changes), [points[0]]).append(point)
    trained = dict.fromkeys(system for point in points for system in point.losses if system != runs[0].baseline)
    if unknown := [system for system in systems if system not in trained]:
        raise ValueError(f"no run has trained {unknown[0]} beside {runs[0].baseline}; there are {', '.join(trained)}")
    return Sweep(
        baseline=runs[0].baseline,
        systems=tuple(systems or trained),
        groups=tuple(points[0].losses[runs[0].baseline]),
        options=flatten(runs[0].config),
        points=tuple(points),
        axes={name: tuple(found) for name, found in axes.items()},
    )


def _changes(first: RunData, run: RunData) -> dict[str, Any]:
    mine, theirs = flatten(first.config), flatten(run.config)
    return {key: theirs[key] for key in mine if mine[key] != theirs[key] and not key.startswith(_APART)}


def _point(first: RunData, runs: Sequence[RunData]) -> SweepPoint:
    losses: dict[str, dict[str, float]] = {}
    for system in runs[0].systems:
        found = [means for run in runs if system in run.systems and (means := mean_losses(run, system))]
        if len(found) == len(runs):
            groups = [group for group in found[0] if not kind_of_group(group)[0]]
            losses[system] = {group: fmean(means[group] for means in found) for group in groups}
    folders = tuple(run.folder for run in runs)
    return SweepPoint(_changes(first, runs[0]), len(runs[0].tasks), folders, losses)


def write(sweep: Sweep, folder: Path) -> None:
    """Writes ``sweep.md``, ``sweep.tsv`` and ``sweep_<average>.svg``.

    Raises:
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    write_text(folder / "sweep.md", markdown(sweep))
    rows = [
        [
            *(_name(point), group, system, len(point.folders)),
            point.losses[system][group],
            sweep.delta(point, system, group),
        ]
        for point in sweep.points
        for group in sweep.groups
        for system in (sweep.baseline, *sweep.systems)
        if system in point.losses
    ]
    write_tsv(folder / "sweep.tsv", _HEADS, rows)
    for group in sweep.groups:
        write_text(folder / f"sweep_{group}.svg", drawing.svg_file(draw, "sweep", sweep, group))


def _name(point: SweepPoint) -> str:
    return ", ".join(f"{key}={one_line(value)}" for key, value in point.changes.items()) or "the first run"


def markdown(sweep: Sweep) -> str:
    """A table for each average: the baseline's loss, and how far the other systems are from it."""
    base = system_name(sweep.baseline)
    lines = [
        "# Runs that differ in their options",
        "",
        f"Validation loss in nats per target token of the best checkpoint, mean over directions (and over the "
        f"runs of a line). The first column is {base}'s, the others are differences from it: negative is better.",
    ]
    for group in sweep.groups:
        heads = ["differs in", "directions", "runs", base, *(system_name(system) for system in sweep.systems)]
        rows = [
            [
                *(markdown_cell(_name(point)), str(point.directions), str(len(point.folders))),
                f"{point.losses[sweep.baseline][group]:.3f}",
                *("–" if (d := sweep.delta(point, s, group)) is None else signed(d, 3) for s in sweep.systems),
            ]
            for point in sweep.points
        ]
        lines += ["", f"## {group_name(group)}", "", *markdown_table(heads, rows)]
    return "\n".join(lines) + "\n"


def draw(sweep: Sweep, group: str) -> Figure:
    """Differences from the baseline in one average, a panel for each thing that differs, a line for each system."""
    figure, panels = drawing.new_figure(3.4 * len(sweep.axes) + 0.6, 3.8, len(sweep.axes), sharey=True)
    for axes, (name, points) in zip(panels, sweep.axes.items()):
        label, values = _scale(sweep, name, points)
        drawing.style(axes, label, f"nats above {system_name(sweep.baseline)}" if axes is panels[0] else "")
        axes.axhline(0, color=drawing.INK, linewidth=0.8)
        numbers = all(isinstance(value, (int, float)) for value in values)
        order = sorted(range(len(points)), key=values.__getitem__) if numbers else range(len(points))
        places = [values[i] for i in order] if numbers else list(range(len(points)))
        for system in sweep.systems:
            deltas = [sweep.delta(points[i], system, group) for i in order]
            known = [(place, delta) for place, delta in zip(places, deltas) if delta is not None]
            tint, mark = drawing.colour(system, sweep.systems), drawing.MARKERS.get(system, "o")
            axes.plot(*zip(*known), color=tint, marker=mark, label=system_name(system), linewidth=1.6, markersize=6)
        if numbers and min(places) > 0 and max(places) >= 4 * min(places):
            axes.set_xscale("log")
        axes.set_xticks(places, [str(values[i]) for i in order])
        axes.minorticks_off()
    drawing.legend_of(figure, panels[0], 4)
    return figure


def _scale(sweep: Sweep, name: str, points: Sequence[SweepPoint]) -> tuple[str, list[Any]]:
    """What a panel's axis is called, and the value of each point: directions, or the option that differs first."""
    if len({point.directions for point in points}) == len(points):
        return "directions", [point.directions for point in points]
    option = name.split(", ", maxsplit=1)[0]
    return name, [point.changes.get(option, sweep.options[option]) for point in points]
