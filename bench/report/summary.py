"""What result rows say, before it is written as tables or drawn: newest rows, verdicts, losses, bounds.

Nothing here formats or draws. A field that a row lacks, or that is null, is "not measured" and never an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.cases import OPERATORS
from bench.rows import Row

T = TypeVar("T")
REAL_DENSITY = 0.78
"""Density of the published masks."""
SYSTEMS = ("dense", "release", "forward", "update")
OPTIMIZERS = ("adamw", "row_sparse_adamw")
PRODUCTS_SAVED = {"dense": 0.0, "release": 0.0, "forward": 1.0, "update": 1 / 6}
"""Of the six matrix products of a feed-forward block (two forward, four backward), the share that shrinks with density."""
STEP_PARTS = ("task switch", "forward", "backward", "optimizer")

# What makes two rows measurements of one thing. NSPEC_BACKEND is among it: a forced backend is not what users run.
_MODEL = ("shape", "scaled", "d_model", "d_ff", "heads", "encoder_layers", "decoder_layers", "vocabulary")
_CASE: dict[str, tuple[str, ...]] = {
    "operator": ("operator", "activation", "provider", "tokens", "d_model", "d_ff", "tasks", "dtype", "density"),
    "absent": ("operator", "activation", "provider", "tokens", "d_model", "d_ff", "tasks", "dtype", "density"),
    "ceiling": ("what", "dtype"),
    "step": (*_MODEL, "tokens", "batch", "tasks_in_batch", "system", "optimizer", "dtype", "density"),
    "tasks": (*_MODEL, "tokens", "system", "tasks", "density", "dtype", "optimizer"),
    "profiling": (*_MODEL, "way", "padding", "sentences", "tokens", "dtype"),
    "probe": ("experiment", "name"),
    "host": ("name", "dtype"),
}
KINDS = tuple(_CASE)
_OLDER = {"activation": "relu"}
"""What rows mean that were written before they had a field."""
NEEDED = {
    "operator": ("operator", "provider", "baseline", "dtype", "density"),
    "absent": ("operator", "provider", "reason"),
    "ceiling": ("what",),
    "step": ("shape", "system", "optimizer", "batch", "dtype", "density"),
    "tasks": ("shape", "system", "tasks"),
    "profiling": ("shape", "way", "dtype"),
    "probe": ("experiment", "name"),
    "host": ("name", "launches", "products", "kernels"),
}


def check(rows: Iterable[Row]) -> None:
    """That rows say what they measured; the figures themselves may be missing.

    Raises:
        ValueError: one does not.
    """
    for number, row in enumerate(rows, start=1):
        missing = [name for name in NEEDED.get(row["kind"], ()) if row.get(name) is None]
        if missing:
            what = f"row {number}, of kind {row['kind']}, has no {', '.join(missing)}"
            raise ValueError(
                f"{what}; was it written by this version of the suite? Measure again, or leave its file out"
            )


def case_of(row: Row) -> Hashable:
    """What a row measures, as a key: equal for two runs of one case on one device."""
    named = _CASE.get(row["kind"], tuple(sorted(row)))
    backend = row.get("backend_asked") or "auto"
    # What could not run and runs later, or the other way round, is one thing.
    kind = "operator" if row["kind"] == "absent" else row["kind"]
    return (kind, row.get("device"), backend, *(repr(row.get(field, _OLDER.get(field))) for field in named))


def fields(*names: str) -> Callable[[Row], tuple[Any, ...]]:
    """A key for :func:`groups`: the values of some fields, what older rows mean or None where a row lacks one."""
    return lambda row: tuple(row.get(name, _OLDER.get(name)) for name in names)


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of several measurements of a case on a device the newest, in the order in which cases first appear.

    Not a mean over runs: a figure then belongs to one commit, and a run of a part replaces just that part.
    """
    kept: dict[Hashable, Row] = {}
    for row in rows:
        key = case_of(row)
        if key not in kept or (row.get("date") or "") >= (kept[key].get("date") or ""):
            kept[key] = row
    return list(kept.values())


def by_device(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Device -> its newest rows; GPUs first, else in order of appearance."""
    found: dict[str, list[Row]] = {}
    for row in newest(rows):
        found.setdefault(str(row.get("device") or "unnamed device"), []).append(row)
    return dict(sorted(found.items(), key=lambda item: item[1][0].get("device_type") != "cuda"))


def of_kind(rows: Iterable[Row], kind: str) -> list[Row]:
    """Rows of one kind."""
    return [row for row in rows if row["kind"] == kind]


def groups(rows: Iterable[T], key: Callable[[T], Any]) -> dict[Any, list[T]]:
    """Rows (or other things) by a key, keys in order of first appearance."""
    found: dict[Any, list[T]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def values(rows: Iterable[Row], field: str) -> list[Any]:
    """The distinct values of a field, rising, without nulls."""
    return sorted({row[field] for row in rows if row.get(field) is not None})


def rank(order: Sequence[str], name: str | None) -> tuple[int, str]:
    """A sort key: known names in their order, others after them by name."""
    return (order.index(name), "") if name in order else (len(order), name or "")


def is_ours(row: Row) -> bool:
    """Ours as users get it: no backend is forced, neither by the provider (``ours: reference``) nor from outside."""
    forced = (row.get("backend_asked") or "auto") != "auto" or str(row.get("provider")).startswith("ours: ")
    return bool(row.get("ours")) and not forced


def has_device_time(row: Row) -> bool:
    """Whether the device alone was timed too; rows of a CPU, and older ones, have one time."""
    return row.get("device_speedup") is not None


def shape_of(row: Row) -> str:
    """``4096 × 512 × 2048`` (tokens × d × d_ff; AdamW has no tokens), an activation other than ReLU, tasks in the batch."""
    named = ("d_model", "d_ff") if row.get("operator") == "row_sparse_adamw" else ("tokens", "d_model", "d_ff")
    text = " × ".join(str(row[name]) for name in named if row.get(name))
    if row.get("activation", "relu") != "relu":
        text += f", {row['activation']}"
    tasks = row.get("tasks") or 1
    return text if tasks == 1 else f"{text}, {tasks} tasks"


operator_case = fields("operator", "activation", "dtype", "tokens", "d_model", "d_ff", "tasks")
"""All that a case has but provider and density."""


@dataclass(frozen=True)
class Verdict:
    """A figure against its target: ``missed`` is the share by which the median is below it, 0 when it is not.

    ``prefix`` of the fields of the figure: ``device_`` where the device alone was timed, else empty (as called).
    """

    row: Row
    missed: float
    within_spread: bool
    prefix: str = ""

    @property
    def met(self) -> bool:
        """Whether the median reaches the target."""
        return self.missed == 0


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Of every row of ours with a target and a measured speed-up."""
    found = []
    for row in of_kind(rows, "operator"):
        prefix = "device_" if has_device_time(row) else ""
        target, speedup = row.get("target"), row.get(f"{prefix}speedup")
        if target is None or speedup is None or not row.get("ours"):
            continue
        missed = max(0.0, 1 - speedup / target)
        found.append(Verdict(row, missed, (row.get(f"{prefix}speedup_high") or speedup) >= target, prefix))
    return sorted(found, key=lambda v: rank(OPERATORS, v.row.get("operator")))


@dataclass(frozen=True)
class Loss:
    """Ours against a provider that was faster: ``ratio`` < 1 is our speed-up over it."""

    row: Row
    winner: str
    ratio: float
    within_spread: bool


def losses(rows: Sequence[Row]) -> list[Loss]:
    """Where ours is slower than what it is compared with, the worst first.

    Operators and profiling: the fastest of all providers of the case, by medians, when it is not ours. Within the spread
    means that the intervals of the two overlap. Steps and growth with tasks are not in here: their tables show all rows.
    """
    found = []
    cases = groups(of_kind(rows, "operator"), lambda row: (*operator_case(row), row.get("density")))
    for members in cases.values():
        measured = [row for row in members if row.get("speedup")]
        others = [row for row in measured if not row.get("ours")]
        for ours in filter(is_ours, measured):
            best = max(others, key=lambda row: row["speedup"], default=None)
            if best is not None and best["speedup"] > ours["speedup"]:
                overlap = (ours.get("speedup_high") or 0) >= (best.get("speedup_low") or math.inf)
                found.append(Loss(ours, str(best.get("provider")), ours["speedup"] / best["speedup"], overlap))
    return sorted(found, key=lambda loss: (rank(OPERATORS, loss.row.get("operator")), loss.ratio))


def fastest_other(rows: Iterable[Row]) -> Row | None:
    """The fastest provider that is neither ours nor the baseline."""
    others = [r for r in rows if not r.get("ours") and r.get("provider") != r.get("baseline") and r.get("speedup")]
    return max(others, key=lambda row: row["speedup"], default=None)


def break_even(pairs: Iterable[tuple[float, float]]) -> float | None:
    """The density up to which something is at least as fast as dense.

    Args:
        pairs: (density, speed-up). The line between two neighbours is taken for what lies between them.

    Returns:
        The first density, from the lowest up, where the speed-up falls below 1; the highest measured one where it never
        does; None where even the lowest is slower, or nothing was measured.
    """
    points = sorted(pairs)
    if not points or points[0][1] < 1:
        return None
    for (left, above), (right, below) in zip(points, points[1:]):
        if below < 1:
            return left + (right - left) * (above - 1) / (above - below)
    return points[-1][0]


def block_share(rows: Iterable[Row]) -> float | None:
    """The share of the feed-forward blocks in the dense step's time, from the first row that has it."""
    return next((row["feed_forward_share"] for row in rows if row.get("feed_forward_share") is not None), None)


def amdahl(share: float, density: float) -> float:
    """The most that a step gains when a ``share`` of its time shrinks to ``density`` of itself: 1 / (1 - f (1 - p))."""
    return 1 / (1 - share * (1 - density))


@dataclass(frozen=True)
class Roof:
    """How near a provider is to what the device can do: ``share`` of the best possible speed; ``bound`` names which."""

    share: float
    bound: str


def ceilings(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """(``matmul`` or ``memory``, dtype) -> flop/s or bytes/s."""
    found = {}
    for row in of_kind(rows, "ceiling"):
        if row.get("per_second"):
            found[str(row.get("what")), str(row.get("dtype") or "")] = float(row["per_second"])
    return found


def roof(row: Row, limits: dict[tuple[str, str], float]) -> Roof | None:
    """The time that flops and bytes of the shapes would take at the measured ceilings, over the time that was taken.

    The memory ceiling is taken from any dtype (bytes are bytes), the products' only from the row's own. None where a
    ceiling, a count or the time is missing. Above 1 the data came from caches, which memory's ceiling knows nothing of.
    The time is that of the device alone where it is known.
    """
    memory = max((limit for (what, _), limit in limits.items() if what == "memory"), default=None)
    matmul = limits.get(("matmul", str(row.get("dtype"))))
    milliseconds = row.get("device_milliseconds") or row.get("milliseconds")
    flops, moved = row.get("flops"), row.get("bytes")
    if not milliseconds or memory is None or moved is None or (flops and matmul is None):
        return None
    computing = flops / matmul if flops and matmul else 0.0
    moving = moved / memory
    return Roof(max(computing, moving) / (milliseconds / 1e3), "matmul" if computing >= moving else "memory")


@dataclass(frozen=True)
class Agreement:
    """Two runs of the same cases at one commit: how many, how many with overlapping spreads, and the ratios' extremes."""

    cases: int
    overlapping: int
    lowest: float
    highest: float


def agreement(rows: Iterable[Row]) -> Agreement | None:
    """Of every case's newest run with the one before it, on the same device, at the same commit and torch.

    Baselines are left out (their speed-up is 1 by definition). None where nothing was run twice.
    """

    def key(row: Row) -> Hashable:
        return (case_of(row), row.get("commit"), row.get("torch"))

    ratios, overlapping = [], 0
    compared = [r for r in rows if r.get("speedup") and r.get("speedup_low") != r.get("speedup_high")]
    for members in groups(compared, key).values():
        runs = sorted({row.get("date"): row for row in members}.items(), key=lambda item: item[0] or "")
        if len(runs) > 1:
            before, after = runs[-2][1], runs[-1][1]
            ratios.append(after["speedup"] / before["speedup"])
            low, high = (
                max(r["speedup_low"] for r in (before, after)),
                min(r["speedup_high"] for r in (before, after)),
            )
            overlapping += low <= high
    return Agreement(len(ratios), overlapping, min(ratios), max(ratios)) if ratios else None
