"""One comparison of several runs that differ in ``run.seed`` alone: means, spread, and tests over seeds.

The tests of a single run ask whether its two *models* differ on other sentences. Whether a *method* is better than another
also depends on initialisation and sampling, which only other seeds show; here the seeds are the observations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from nspec.analysis.mantel import holm
from nspec.analysis.overlap import Floats
from nspec.files import sha256
from nspec.mt.scoring.averages import kind_of_group
from nspec.report.losses import loss_groups, mean_losses
from nspec.report.run_data import RunData, load_run
from nspec.report.words import METRICS, arrow, group_name, metric_names
from nspec.run.protocol import Primary, declarations, primary_of
from nspec.run.yaml import flatten

COSTS = ("updates", "tokens", "train_seconds", "tokens_per_second", "density")
_CONFIDENCE = 0.95
# Systems are compared by name instead, so that a run with one more system can be a part.
_MAY_DIFFER = {"run.seed", "run.folder", "run.systems", "run.variants"}


@dataclass(frozen=True)
class Difference:
    """How far a system is above the baseline, paired by seed."""

    values: tuple[float, ...]  # points (of the loss nats), one a seed
    mean: float
    low: float  # lower end of the 95 % t interval of the mean
    high: float
    t: float  # Student's, seeds - 1 degrees of freedom; infinite where all seeds differ alike, 0 where they do by 0
    p: float  # two-sided, of the paired t test
    p_holm: float  # adjusted over the systems of this metric and average, and what else is :func:`tested_together`
    tested: int  # seeds whose run tested this system against the baseline
    above: int  # those in which that test (as :func:`nspec.report.words.p_value` picks it) says better, at 5 %
    below: int  # and worse


@dataclass(frozen=True)
class SeedResult:
    """One system, metric and average."""

    system: str  # its name in the runs
    metric: str  # ``bleu`` or ``chrf``; ``loss`` of the validation text
    group: str  # ``all``, ``from_<pivot>``, ``to_<pivot>``, or as :func:`nspec.mt.scoring.averages.run_groups` calls it
    scores: tuple[float, ...]  # points (0 to 100), one a seed; of the loss nats per target token
    mean: float
    sd: float  # standard deviation of ``scores`` (n - 1)
    difference: Difference | None  # from the baseline; None for the baseline itself


@dataclass(frozen=True)
class SeedComparison:
    """What :func:`compare_seeds` found."""

    folders: tuple[Path, ...]  # of the runs, in the order of seeds
    seeds: tuple[int, ...]  # in rising order; every tuple of values is in this order
    baseline: str  # the system that the others are compared with
    systems: tuple[str, ...]  # those that every run has scored
    tasks: tuple[str, ...]  # the directions
    groups: tuple[str, ...]  # the averages
    results: tuple[SeedResult, ...]  # by group, metric and system
    losses: tuple[SeedResult, ...]  # by average and system; without systems of which a run does not know them
    costs: Mapping[str, Mapping[str, float | None]]  # system -> mean of each of COSTS; None where a run does not say
    signatures: Mapping[str, tuple[str, ...]]  # metric -> the sacreBLEU signatures of the directions, each once
    notes: tuple[str, ...]  # what a reader has to know, a sentence each
    hypothesis: str = ""  # what was declared to be shown, the same in all runs
    primary: Primary | None = None  # the comparison that was declared to test it

    def find(self, system: str, metric: str = "bleu", group: str = "all") -> SeedResult:
        """The result of one system.

        Raises:
            KeyError: there is none of that system, metric and group.
        """
        for result in (*self.results, *self.losses):
            if (result.system, result.metric, result.group) == (system, metric, group):
                return result
        raise KeyError(f"no result of {system}, {metric}, {group}")

    @property
    def metric_names(self) -> dict[str, str]:
        """The metrics' names for readers, see :func:`nspec.report.words.metric_names`."""
        return metric_names(self.signatures["bleu"])


def compare_seeds(folders: Iterable[Path | str]) -> SeedComparison:
    """Compares the systems of several finished runs of one configuration with different seeds.

    Args:
        folders: run folders, two or more. Systems that not every run has scored are left out, with a note.

    Raises:
        ValueError: fewer than two runs, a seed twice, configurations that differ in more than seed, folder and systems,
            other directions, baselines or sacreBLEU signatures, or a baseline that not every run has.
    """
    runs = sorted((load_run(Path(folder)) for folder in folders), key=lambda run: run.config.run.seed)
    if len(runs) < 2:
        raise ValueError(f"found {len(runs)} run, expected 2 or more of one configuration with different run.seed")
    for one, other in zip(runs, runs[1:]):
        if one.config.run.seed == other.config.run.seed:
            raise ValueError(f"{one.folder} and {other.folder} both have run.seed {one.config.run.seed}")
    for run in runs:
        if not run.scored:
            raise ValueError(f"{run.folder} has no scores yet; `nspec run` makes them")
        _check_same(runs[0], run)
    first = runs[0]
    systems, notes = _common_systems(runs)
    for run in runs:
        _check_scores(first, run, systems)
    groups, left_out = _common_groups(runs, systems)
    results = [result for group in groups for metric in METRICS for result in _results(runs, systems, metric, group)]
    tasks = first.scored[first.baseline]["tasks"]
    losses = _adjusted(_loss_results(runs, systems))
    without = [system for system in systems if losses and all(result.system != system for result in losses)]
    if without:
        notes.append(f"Validation losses of {', '.join(without)} are left out: a run does not say them.")
    notes += [note for run in runs if (note := _declared_late(run))]
    if len({_test_text(run) for run in runs}) > 1:
        notes.append(
            "Runs have other test sentences each, as those that an older version prepared: scores vary with them."
        )
    return SeedComparison(
        folders=tuple(run.folder for run in runs),
        seeds=tuple(run.config.run.seed for run in runs),
        baseline=first.baseline,
        systems=tuple(systems),
        tasks=tuple(task for task in first.tasks if task in tasks),
        groups=tuple(groups),
        results=tuple(_adjusted(results)),
        losses=tuple(losses),
        costs={system: {key: _mean_cost(runs, system, key) for key in COSTS} for system in systems},
        signatures={m: tuple(dict.fromkeys(entry[f"{m}_signature"] for entry in tasks.values())) for m in METRICS},
        notes=(*notes, *_machines(runs, systems), *left_out),
        hypothesis=first.config.run.hypothesis.strip(),
        primary=primary_of(first.config),
    )


def _check_same(first: RunData, other: RunData) -> None:
    """ValueError where the configurations differ in what every system shares, or the baselines do."""
    mine, theirs = flatten(first.config), flatten(other.config)
    keys = [key for key in mine if mine[key] != theirs[key] and key not in _MAY_DIFFER]
    if keys:
        differ = [f"{key} ({mine[key]!r}, {theirs[key]!r})" for key in keys]
        raise ValueError(
            f"{first.folder} and {other.folder} are not one configuration with different seeds: they differ in "
            f"{', '.join(differ)}"
        )
    if first.baseline != other.baseline:
        raise ValueError(
            f"the baseline is {first.baseline} in {first.folder} and {other.baseline} in {other.folder}; score them again "
            "with the same score.baseline"
        )


def _declared_late(run: RunData) -> str:
    """A note where what the run declares was declared when some of its systems had been scored."""
    noted = declarations(run.folder)
    if not noted or not noted[-1]["scored"]:
        return ""
    scored = ", ".join(noted[-1]["scored"])
    return f"What is declared was declared in {run.folder} when there were scores of {scored} already."


def _test_text(run: RunData) -> tuple[str, ...]:
    """What tells the test text of a run from another."""
    return tuple(sha256(path) for path in sorted(run.folder.glob("prepared/text/test/*.txt")))


def _common_systems(runs: Sequence[RunData]) -> tuple[list[str], list[str]]:
    """The systems that every run has scored, in the order of the first, and notes on the others."""
    common = [name for name in runs[0].scored if all(name in run.scored for run in runs)]
    notes = []
    for name in dict.fromkeys(name for run in runs for name in run.scored if name not in common):
        lacking = [str(run.folder) for run in runs if name not in run.scored]
        notes.append(
            f"{name} is left out: {', '.join(lacking)} {'has' if len(lacking) == 1 else 'have'} no scores of it."
        )
    if runs[0].baseline not in common:
        raise ValueError(f"not every run has scores of {runs[0].baseline}, the baseline: {' '.join(notes)}")
    for name in common:
        for run in runs[1:]:
            if runs[0].variants.get(name) != run.variants.get(name):
                raise ValueError(
                    f"{name} is not the same variant in {runs[0].folder} and {run.folder}: see run.variants"
                )
    return common, notes


def _check_scores(first: RunData, run: RunData, systems: Sequence[str]) -> None:
    """ValueError where a system of ``run`` has other directions or signatures than the baseline of ``first``."""
    expected = first.scored[first.baseline]["tasks"]
    for system in systems:
        tasks = run.scored[system]["tasks"]
        if different := ", ".join(sorted(tasks.keys() ^ expected.keys())):
            raise ValueError(
                f"{run.folder}, {system}: other directions than {first.baseline} in {first.folder} ({different})"
            )
        for task, entry in tasks.items():
            for key in (f"{metric}_signature" for metric in METRICS):
                if entry[key] != expected[task][key]:
                    raise ValueError(
                        f"{run.folder}, {system}, {task}: {key} is {entry[key]}, in {first.folder} "
                        f"{expected[task][key]}; score them with the same sacreBLEU"
                    )


def _common_groups(runs: Sequence[RunData], systems: Sequence[str]) -> tuple[list[str], list[str]]:
    """The averages that every run and system has, over the same directions, and a note where levels or families lack."""
    scored = [run.scored[system] for run in runs for system in systems]
    named = dict.fromkeys(group for scores in scored for group in scores["average"])
    members = [scores.get("groups", {}) for scores in scored]
    common = [
        group
        for group in named
        if all(group in scores["average"] for scores in scored)
        and len({tuple(found.get(group.partition("/")[0], ())) for found in members}) == 1
    ]
    missing = ", ".join(group_name(group) for group in named if group not in common and "/" not in group)
    note = (
        f"{missing} left out: not every run averages over them, or over the same directions; `nspec evaluate CONFIG --redo "
        "score` scores a run anew."
    )
    return common, [note] if missing else []


def _machines(runs: Sequence[RunData], systems: Sequence[str]) -> list[str]:
    """A note where training times are of different machines or settings."""
    summaries = [run.systems[system].summary or {} for run in runs for system in systems]
    notes = []
    for key in ("device", "threads", "precision"):
        found = list(dict.fromkeys(str(summary[key]) for summary in summaries if summary.get(key) is not None))
        if len(found) > 1:
            notes.append(f"Times are not of like runs: {key} is {', '.join(found)}.")
    return notes


def _results(runs: Sequence[RunData], systems: Sequence[str], metric: str, group: str) -> list[SeedResult]:
    baseline = runs[0].baseline
    entries = {system: [run.scored[system]["average"][group] for run in runs] for system in systems}
    scores = {system: np.array([float(entry[metric]) for entry in found]) for system, found in entries.items()}
    results = []
    for system, values in scores.items():
        tests = [t for t in (entry.get("baseline") for entry in entries[system]) if t and t["system"] == baseline]
        difference = None if system == baseline else _difference(values - scores[baseline], tests, metric)
        sd = float(values.std(ddof=1))
        results.append(SeedResult(system, metric, group, tuple(values.tolist()), float(values.mean()), sd, difference))
    return results


def _loss_results(runs: Sequence[RunData], systems: Sequence[str]) -> list[SeedResult]:
    """The validation losses of the systems that all runs know them of, over the same directions."""
    baseline, groups = runs[0].baseline, loss_groups(runs[0])
    if any(loss_groups(run) != groups for run in runs):
        return []
    known = {system: [mean_losses(run, system) for run in runs] for system in systems}
    known = {system: found for system, found in known.items() if all(found)}
    results = []
    for group in groups if baseline in known else ():
        base = np.array([found[group] for found in known[baseline]])
        for system, found in known.items():
            values = np.array([each[group] for each in found])
            difference = None if system == baseline else _difference(values - base, (), "loss")
            mean, sd = float(values.mean()), float(values.std(ddof=1))
            results.append(SeedResult(system, "loss", group, tuple(values.tolist()), mean, sd, difference))
    return results


def _adjusted(results: Sequence[SeedResult]) -> list[SeedResult]:
    """The same results with p values adjusted over those that are tested together."""
    together: dict[tuple[str, str], list[float]] = {}
    for r in results:
        if r.difference:
            together.setdefault((r.metric, tested_together(r.group)), []).append(r.difference.p)
    adjusted = {key: iter(holm(p).tolist()) for key, p in together.items()}
    done = []
    for r in results:
        p_holm = next(adjusted[r.metric, tested_together(r.group)]) if r.difference else 0.0
        done.append(replace(r, difference=r.difference and replace(r.difference, p_holm=p_holm)))
    return done


def tested_together(average: str) -> str:
    """What names the averages whose p values are adjusted together: all levels (from or to the pivot), all families.

    Another average stands for itself: its p values are adjusted over systems alone.
    """
    kind, _, half = kind_of_group(average)
    return f"{kind}/{half}" if kind else average


def _difference(values: Floats, tests: Sequence[Mapping[str, object]], metric: str) -> Difference:
    """The statistics of paired differences float64 [seeds]; not yet adjusted for the number of systems."""
    freedom, mean, error = len(values) - 1, float(values.mean()), float(stats.sem(values))
    t = mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0
    p, reach = 2 * float(stats.t.sf(abs(t), freedom)), float(stats.t.ppf((1 + _CONFIDENCE) / 2, freedom)) * error
    arrows = [arrow(test, metric) for test in tests]
    counts = len(arrows), arrows.count("▲"), arrows.count("▼")
    return Difference(tuple(values.tolist()), mean, mean - reach, mean + reach, t, p, p, *counts)


def _mean_cost(runs: Sequence[RunData], system: str, key: str) -> float | None:
    values = [(run.systems[system].summary or {}).get(key) for run in runs]
    numbers = [value for value in values if isinstance(value, (int, float))]
    return sum(numbers) / len(numbers) if len(numbers) == len(runs) else None
