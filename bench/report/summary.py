"""What result rows say, before it is written as tables or drawn: newest rows, groups, bounds.

Nothing here formats or draws. A field that a row lacks, or that is null, is "not measured" and never an error.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

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
_OPERATOR = ("operator", "activation", "provider", "tokens", "d_model", "d_ff", "tasks", "dtype", "density")
_CASE: dict[str, tuple[str, ...]] = {
    "operator": _OPERATOR,
    "absent": _OPERATOR,
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
        if missing := [name for name in NEEDED.get(row["kind"], ()) if row.get(name) is None]:
            what = f"row {number}, of kind {row['kind']}, has no {', '.join(missing)}"
            said = "was it written by this version of the suite? Measure again, or leave its file out"
            raise ValueError(f"{what}; {said}")


def case_of(row: Row) -> Hashable:
    """What a row measures, as a key: equal for two runs of one case on one device."""
    named = _CASE.get(row["kind"], tuple(sorted(row)))
    # What could not run and runs later, or the other way round, is one thing.
    kind = "operator" if row["kind"] == "absent" else row["kind"]
    return (kind, row.get("device"), forced(row), *map(repr, fields(*named)(row)))


def forced(row: Row) -> str:
    """The backend that NSPEC_BACKEND asked for, or empty."""
    asked = str(row.get("backend_asked") or "auto")
    return "" if asked == "auto" else asked


def fields(*names: str) -> Callable[[Row], tuple[Any, ...]]:
    """A key for :func:`groups`: the values of some fields, what older rows mean or None where a row lacks one."""
    return lambda row: tuple(row.get(name, _OLDER.get(name)) for name in names)


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of several measurements of a case on a device the newest, in the order in which cases first appear.

    Not a mean over runs: a figure then belongs to one commit, and a run of a part replaces just that part.
    """
    return [max(reversed(found), key=lambda row: row.get("date") or "") for found in groups(rows, case_of).values()]


def by_device(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Device -> its newest rows; GPUs first, else in order of appearance."""
    found = groups(newest(rows), lambda row: str(row.get("device") or "unnamed device"))
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
    return bool(row.get("ours")) and not forced(row) and not str(row.get("provider")).startswith("ours: ")


def has_device_time(row: Row) -> bool:
    """Whether the device alone was timed too; rows of a CPU, and older ones, have one time."""
    return row.get("device_speedup") is not None


OPERATOR_CASE = ("operator", "activation", "dtype", "tokens", "d_model", "d_ff", "tasks")
operator_case = fields(*OPERATOR_CASE)
"""All that a case has but provider and density."""


def step_key(row: Row) -> tuple[Any, ...]:
    """Sorts rows of a step: system, optimiser, batches of one task first, density."""
    order = (rank(SYSTEMS, row["system"]), rank(OPTIMIZERS, row["optimizer"]), row["batch"] != "pure")
    return (*order, row.get("tasks_in_batch") or 0, row["density"])


def near_real(densities: Sequence[float]) -> float | None:
    """The density that the published masks have, or the measured one nearest to it."""
    return min(densities, key=lambda density: abs(density - REAL_DENSITY), default=None)


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
            return float(np.interp(1, [below, above], [right, left]))
    return points[-1][0]


def block_share(rows: Iterable[Row]) -> float | None:
    """The share of the feed-forward blocks in the dense step's time, from the first row that has it."""
    return next((row["feed_forward_share"] for row in rows if row.get("feed_forward_share") is not None), None)


def amdahl(share: float, density: float) -> float:
    """The most that a step gains when a ``share`` of its time shrinks to ``density`` of itself: 1 / (1 - f (1 - p))."""
    return 1 / (1 - share * (1 - density))


Limits = dict[tuple[str, str], float]


def ceilings(rows: Iterable[Row]) -> Limits:
    """(``matmul`` or ``memory``, dtype) -> flop/s or bytes/s."""
    known = (row for row in of_kind(rows, "ceiling") if row.get("per_second"))
    return {(str(row.get("what")), str(row.get("dtype") or "")): float(row["per_second"]) for row in known}


def roof(row: Row, limits: Limits) -> tuple[float, str] | None:
    """How near a row is to what the device can do: the share of the best possible speed, and which ceiling bounds it.

    The time that flops and bytes of the shapes would take at the measured ceilings, over the time that was taken, that of
    the device alone where it is known. The memory ceiling is taken from any dtype (bytes are bytes), the products' only
    from the row's own. None where a ceiling, a count or the time is missing. Above 1 the data came from caches, which
    memory's ceiling knows nothing of.
    """
    memory = max((limit for (what, _), limit in limits.items() if what == "memory"), default=None)
    matmul = limits.get(("matmul", str(row.get("dtype"))))
    milliseconds = row.get("device_milliseconds") or row.get("milliseconds")
    flops, moved = row.get("flops"), row.get("bytes")
    if not milliseconds or memory is None or moved is None or (flops and matmul is None):
        return None
    computing, moving = flops / matmul if flops and matmul else 0.0, moved / memory
    return max(computing, moving) / (milliseconds / 1e3), "matmul" if computing >= moving else "memory"


def part_names(rows: Iterable[Row]) -> list[str]:
    """The parts of a step in their order, and others that rows have."""
    return list(dict.fromkeys([*STEP_PARTS, *(name for row in rows for name in row.get("parts") or {})]))
