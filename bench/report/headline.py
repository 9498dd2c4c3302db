"""The short table of the first page: what a block and a whole step gain in each mode, by density."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.cells import Lines, model_name, shape_of, speedup, table
from bench.report.summary import REAL_DENSITY, fields, groups, of_kind, values
from bench.rows import Row

MODES = ("forward", "update")


def headline(rows: Sequence[Row]) -> Lines:
    """Speed-up over dense: the block and the step that were measured first in float32, ReLU and AdamW; else nothing."""
    exact = [row for row in rows if row.get("dtype") == "float32" and row.get("density") is not None]
    blocks = [row for row in of_kind(exact, "operator") if row.get("operator") == "block" and row.get("tasks") == 1]
    blocks = _first([row for row in blocks if row.get("activation", "relu") == "relu"], "tokens", "d_model", "d_ff")
    steps = [row for row in of_kind(exact, "step") if row["batch"] == "pure" and row["optimizer"] == "adamw"]
    steps = _first(steps, "shape", "scaled", "d_model", "d_ff", "tokens")
    named = [(f"block {shape_of(row)}", "provider", f"mode {mode}", blocks) for row in blocks[:1] for mode in MODES]
    named += [
        (f"step of {model_name(row).split(' (')[0]}", "system", mode, steps) for row in steps[:1] for mode in MODES
    ]
    found = [(what, [row for row in of if row[field] == name]) for what, field, name, of in named]
    densities = values([row for _, measured in found for row in measured], "density")
    body = []
    for (what, measured), (_, _, name, _) in zip(found, named):
        at = {row["density"]: row for row in measured}
        body.append([what, f"`{name.split()[-1]}`", *(speedup(at.get(density), spread=False) for density in densities)])
    titles = [f"{density:g}" + (" (published masks)" if density == REAL_DENSITY else "") for density in densities]
    return ["Speed-up over dense by density, float32:", "", *table(["", "<mode", *titles], body)] if densities else []


def _first(rows: Sequence[Row], *names: str) -> list[Row]:
    """The rows of the case that comes first."""
    return next(iter(groups(rows, fields(*names)).values()), [])
