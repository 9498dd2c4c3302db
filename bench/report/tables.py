"""Result rows of one device as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.cases import OPERATORS
from bench.gpu.predictions import DEVICE
from bench.report import cells, summary
from bench.report.cells import NONE, Columns, Lines, of, speedup, table, table_of, titled
from bench.report.summary import fields, groups, has_device_time, is_ours, of_kind, rank, values
from bench.rows import Row

MODES = ("forward", "update")


def headline(rows: Sequence[Row]) -> Lines:
    """What a block and a whole step gain in each mode: those that were measured first in float32, ReLU and AdamW."""
    exact = [row for row in rows if row.get("dtype") == "float32" and row.get("density") is not None]
    blocks = [row for row in of_kind(exact, "operator") if row.get("operator") == "block" and row.get("tasks") == 1]
    blocks = _first([row for row in blocks if row.get("activation", "relu") == "relu"], "tokens", "d_model", "d_ff")
    steps = [row for row in of_kind(exact, "step") if row["batch"] == "pure" and row["optimizer"] == "adamw"]
    steps = _first(steps, "shape", "scaled", "d_model", "d_ff", "tokens")
    found = []
    for mode in MODES:
        for own in [row for row in blocks if row["provider"] == f"mode {mode}"][:1]:
            found.append(
                (f"block {cells.shape_of(own)}", mode, [r for r in blocks if r["provider"] == own["provider"]])
            )
    for mode in MODES:
        for own in [row for row in steps if row["system"] == mode][:1]:
            name = f"step of {cells.model_name(own).split(' (')[0]}"
            found.append((name, mode, [row for row in steps if row["system"] == mode]))
    densities = values([row for *_, measured in found for row in measured], "density")
    body = []
    for what, mode, measured in found:
        at = {row["density"]: row for row in measured}
        body.append([what, f"`{mode}`", *(speedup(at.get(density), spread=False) for density in densities)])
    titles = [
        f"{density:g}" + (" (published masks)" if density == summary.REAL_DENSITY else "") for density in densities
    ]
    return ["Speed-up over dense by density, float32:", "", *table(["", "<mode", *titles], body)] if densities else []


def _first(rows: Sequence[Row], *names: str) -> list[Row]:
    """The rows of the case that comes first."""
    return next(iter(groups(rows, fields(*names)).values()), [])


def operators(rows: Sequence[Row], only: str = "", spread: bool = False, every: bool = False) -> Lines:
    """Speed-up over the baseline by density.

    Args:
        rows: of one device.
        only: this operator; empty for all.
        spread: the middle 80 % in brackets, peak memory, backend and what is computed.
        every: every provider of a case; else ours, and the fastest of the others.
    """
    found = groups(of_kind(rows, "operator"), lambda row: str(row.get("operator")))
    made = []
    for operator in sorted(found, key=lambda name: rank(OPERATORS, name)):
        if only not in ("", operator):
            continue
        members = found[operator]
        densities = values(members, "density")
        header = ["dtype", "<shape", "<provider"]
        header += ["speed-up"] if densities == [1] else [f"{density:g}" for density in densities]
        header += ["<computes", "<backend", "peak memory"] if spread else []
        body = []
        for case in groups(members, summary.operator_case).values():
            place = [str(case[0].get("dtype")), cells.shape_of(case[0])]
            for name, own in groups(case, cells.provider_name).items():
                ours, at = is_ours(own[0]), {row.get("density"): row for row in own}
                if not (ours or every):
                    continue
                line = [
                    _operator_cell(at.get(density), name == own[0].get("baseline"), spread) for density in densities
                ]
                if spread:
                    peaks = [row["peak_bytes"] for row in own if row.get("peak_bytes") is not None]
                    line += [cells.distinct(own, "computes"), cells.distinct(own, "backend"), cells.size_range(peaks)]
                body.append([*place, f"**{name}**" if ours else name, *line])
            best = [_fastest_other(row for row in case if row.get("density") == density) for density in densities]
            if not every and any(best):
                named = (f"{cells.both_speedups(row, False)} {row.get('provider')}" if row else NONE for row in best)
                body.append([*place, "fastest other", *named])
        two = "; as called / device alone" if any(map(has_device_time, members)) else ""
        made.append((f"`{operator}`, over {cells.baseline_of(members)}{two}:", table(header, body)))
    return titled(made)


def _operator_cell(row: Row | None, is_baseline: bool, spread: bool) -> str:
    """The baseline shows its time, the others their speed-up over it."""
    if not is_baseline or row is None:
        return cells.both_speedups(row, spread)
    called = cells.milliseconds(row.get("milliseconds"))
    return f"{called} / {cells.milliseconds(row.get('device_milliseconds'))}" if has_device_time(row) else called


def _fastest_other(rows: Iterable[Row]) -> Row | None:
    """The fastest provider that is neither ours nor the baseline."""
    others = [r for r in rows if not r.get("ours") and r.get("provider") != r.get("baseline") and r.get("speedup")]
    return max(others, key=lambda row: row["speedup"], default=None)


def targets(rows: Sequence[Row]) -> Lines:
    """Every figure of ours that has a target, of the device where that was timed, and whether its median reaches it."""
    wanted = [row for row in of_kind(rows, "operator") if row.get("target") is not None and row.get("ours")]
    which = lambda row: "device_speedup" if has_device_time(row) else "speedup"
    measured = [row for row in wanted if row.get(which(row)) is not None]

    def verdict(row: Row) -> str:
        target, found = row["target"], row[which(row)]
        if found >= target:
            return "met"
        within = ", within the spread" if (row.get(f"{which(row)}_high") or found) >= target else ""
        return f"missed by {100 * (1 - found / target):.2g} %{within}"

    mode = lambda row: "" if row.get("provider") == "ours" else f", {cells.provider_name(row)}"
    columns: dict[str, Callable[[Row], str]] = {"operator": lambda row: f"`{row.get('operator')}`{mode(row)}"}
    columns |= {"<dtype": of("dtype"), "<shape": cells.shape_of, "density": cells.density_of}
    columns |= {"target": of("target", ".2f", "×"), "measured": lambda row: speedup(row, name=which(row))}
    if any(map(has_device_time, measured)):
        columns["<of"] = lambda row: "device" if has_device_time(row) else "as called"
    columns |= {"<over": of("baseline"), "<verdict": verdict}
    return table_of(sorted(measured, key=lambda row: rank(OPERATORS, row.get("operator"))), columns)


def losses(rows: Sequence[Row]) -> Lines:
    """Where ours is slower than the fastest of all providers of the case, by medians; by operator, the worst first.

    Within the spread means that the intervals of the two overlap. Steps and growth with tasks are not in here: their tables
    show all rows.
    """
    found = []
    key = fields(*summary.OPERATOR_CASE, "density")
    for members in groups(of_kind(rows, "operator"), key).values():
        measured = [row for row in members if row.get("speedup")]
        best = max((r for r in measured if not r.get("ours")), key=lambda row: row["speedup"], default={"speedup": 0})
        for row in filter(is_ours, measured):
            if (ratio := row["speedup"] / best["speedup"] if best["speedup"] else 1) < 1:
                overlap = (row.get("speedup_high") or 0) >= (best.get("speedup_low") or math.inf)
                slower = f"{100 * (1 - ratio):.0f} %" + (", within the spread" if overlap else "")
                line = [
                    f"`{row.get('operator')}`",
                    cells.provider_name(row),
                    str(row.get("dtype")),
                    cells.shape_of(row),
                ]
                line += [cells.density_of(row), cells.both_speedups(row), str(best.get("provider")), slower]
                found.append((rank(OPERATORS, row.get("operator")), ratio, line))
    header = ["operator", "<ours", "<dtype", "<shape", "density", "over the baseline", "<fastest", "<ours is slower by"]
    return table(header, [line for *_, line in sorted(found, key=lambda one: one[:2])])


def _step_groups(rows: Sequence[Row]) -> Iterable[tuple[str, list[Row]]]:
    """The steps of each model, sorted, with its name and batch."""
    key = fields("shape", "scaled", "d_model", "d_ff", "dtype", "tokens")
    for members in groups(of_kind(rows, "step"), key).values():
        members = sorted(members, key=summary.step_key)
        tokens = f", batches of {members[0]['tokens']} tokens" if members[0].get("tokens") else ""
        yield f"{cells.model_name(members[0])}, {members[0]['dtype']}{tokens}", members


def steps(rows: Sequence[Row], spread: bool = False) -> Lines:
    """Speed-up of a whole training step over dense by system, optimiser, batch and density; break-even; the bound."""
    made = []
    for title, members in _step_groups(rows):
        densities = values((row for row in members if row["system"] != "dense"), "density")
        real = summary.near_real(densities)
        at_real = "" if real is None else f" at {real:g}"
        header = ["system", "<optimiser", "<batch", *(f"{density:g}" for density in densities)]
        header += [f"tokens/s{at_real}", f"peak memory{at_real}", "masks", "break-even density"]
        body = []
        for found in groups(members, lambda row: (row["system"], row["optimizer"], cells.batch_name(row))).values():
            first, at = found[0], {row["density"]: row for row in found}
            line = [speedup(at.get(density), spread) for density in densities]
            if cells.is_baseline_step(first):
                line = ["1" if density == 1 else NONE for density in densities]
            line += [_at(found, real, "tokens_per_second", lambda value: f"{value:.0f}")]
            line += [_at(found, real, "peak_bytes", cells.size)]
            line += [NONE if first["system"] == "dense" else _at(found, real, "mask_bytes", cells.size)]
            body.append([first["system"], first["optimizer"], cells.batch_name(first), *line, _break_even(found)])
        took = (cells.took(row) for row in members if cells.is_baseline_step(row))
        lines = [*table(header, body), "", _bound(members, densities)]
        made.append((f"{title}; over {cells.baseline_of(members)}, {next(took, NONE)} a step:", lines))
    return titled(made)


def _at(rows: Sequence[Row], density: float | None, field: str, how: Callable[[float], str]) -> str:
    """A figure at a density, or, where it was not measured there, at the nearest one, which is named then."""
    measured = [row for row in rows if row.get(field) is not None]
    if not measured or density is None:
        return how(measured[0][field]) if measured else NONE
    row = min(measured, key=lambda row: abs(row["density"] - density))
    elsewhere = row["density"] != density and row["system"] != "dense"
    return how(row[field]) + (f" (at {cells.density_of(row)})" if elsewhere else "")


def _break_even(rows: Sequence[Row]) -> str:
    pairs = {row["density"]: row["speedup"] for row in rows if row.get("speedup") is not None}
    if rows[0]["system"] == "dense" or len(pairs) < 2:
        return NONE
    found = summary.break_even(pairs.items())
    return "slower at each" if found is None else "slower at none" if found == max(pairs) else f"{found:.2f}"


def _bound(rows: Sequence[Row], densities: Sequence[float]) -> str:
    """What a step can gain at most, since only products of the feed-forward blocks shrink."""
    share, said = summary.block_share(rows), []
    if share is None:
        return "The share of the feed-forward blocks in the dense step was not measured."
    for mode in MODES if any(density < 1 for density in densities) else ():
        saved = share * summary.PRODUCTS_SAVED[mode]
        most = (f"{summary.amdahl(saved, density):.2f}× at {density:g}" for density in densities if density < 1)
        said.append(f" in mode `{mode}` {', '.join(most)}")
    bound = f": with AdamW and nothing lost, a step could gain{' and'.join(said)}" if said else ""
    return f"The feed-forward blocks take {100 * share:.0f} % of the dense step{bound}."


def step_parts(rows: Sequence[Row]) -> Lines:
    """Milliseconds by part of a step, every row."""
    part = lambda name: lambda row: cells.milliseconds((row.get("parts") or {}).get(name))
    first: dict[str, Any] = {"system": of("system"), "<optimiser": of("optimizer"), "<batch": cells.batch_name}
    first |= {"density": cells.density_of, "step": cells.took}
    last = {"tokens/s": cells.tokens_per_second, "peak memory": cells.peak}
    columns = lambda rows: first | {name: part(name) for name in summary.part_names(rows)} | last
    return titled((f"{title}:", table_of(members, columns(members))) for title, members in _step_groups(rows))


def tasks(rows: Sequence[Row]) -> Lines:
    """What a step costs as the model has more tasks."""
    made = []
    key = fields("shape", "scaled", "d_model", "d_ff", "density", "dtype")
    for members in groups(of_kind(rows, "tasks"), key).values():
        members = sorted(members, key=lambda row: (rank(summary.SYSTEMS, row["system"]), row["tasks"]))
        at = f", density {cells.density_of(members[0])}" if members[0].get("density") else ""
        columns = {
            "system": of("system"),
            "tasks": of("tasks"),
            "masks": lambda row: cells.size(row.get("mask_bytes")) + (" (computed)" if row.get("computed") else ""),
            "specialise": of("specialize_seconds", ".2g", " s"),
            "switch of task": of("task_switch_microseconds", ".0f", " µs"),
            "step": cells.took,
            f"over that of {min(row['tasks'] for row in members)} tasks": speedup,
        }
        made.append((f"{cells.model_name(members[0])}{at}:", table_of(members, columns)))
    return titled(made)


def profiling(rows: Sequence[Row]) -> Lines:
    """Counting activations: ours, the release's way, and no counting."""
    padding = {"include": "counted too", "exclude": "left out"}
    counted = lambda row: NONE if row["way"] == "no counting" else padding.get(str(row.get("padding")), NONE)
    columns: Columns = {"way": of("way"), "<padding": counted, "batch": cells.took, "speed-up": speedup}
    columns = {**columns, "tokens/s": cells.tokens_per_second, "peak memory": cells.peak}
    made = []
    key = fields("shape", "scaled", "d_model", "d_ff", "dtype", "sentences", "tokens")
    for members in groups(of_kind(rows, "profiling"), key).values():
        first = members[0]
        corpus = "".join(f", {first[name]} {name}" for name in ("sentences", "tokens", "batches") if first.get(name))
        title = f"{cells.model_name(first)}, {first['dtype']}{corpus}; over {cells.baseline_of(members)}:"
        made.append((title, table_of(members, columns)))
    return titled(made)


def ceilings(rows: Sequence[Row]) -> Lines:
    """The best that the device sustained."""
    found = [row for row in of_kind(rows, "ceiling") if row.get("per_second")]
    what = lambda row: {"matmul": "matrix product"}.get(row["what"], str(row["what"]))
    return table_of(found, {"ceiling": what, "<dtype": of("dtype"), "best sustained": cells.per_second})


def absent(rows: Sequence[Row]) -> Lines:
    """Providers that could not run, raised or were wrong: in which case, or in how many, and why."""
    found = groups(of_kind(rows, "absent"), fields("operator", "provider", "reason"))
    case = lambda row: f"{cells.shape_of(row)}, {row.get('dtype') or NONE}, density {cells.density_of(row)}"
    columns: Columns = {
        "operator": lambda row: f"`{row['operator']}`",
        "<provider": of("provider"),
        "<case": lambda row: case(row) if row["count"] == 1 else f"{row['count']} cases",
        "<why it is not here": of("reason"),
    }
    return table_of([{**members[0], "count": len(members)} for members in found.values()], columns)


def host(rows: Sequence[Row]) -> Lines:
    """What each call costs the host (``bench.host``)."""
    columns: dict[str, Any] = {"call": of("name"), "<dtype": of("dtype")}
    columns |= {name: of(name) for name in ("launches", "products", "kernels")}
    columns |= {"processor time": of("microseconds", ".0f", " us"), "of dense": lambda r: speedup(r, name="ratio")}
    return table_of(rows, columns)


EXPECTED = (
    f"What is expected comes from arithmetic for an {DEVICE}, for 16384 tokens in bfloat16; none of it was measured. It is "
    "compared with what was measured on that device at full size, and with nothing else."
)


def expected_range(row: Row) -> str:
    """``120 to 135 us``: what arithmetic says that a kernel takes."""
    low, high = row["expected_low"], row["expected_high"]
    before = ", before a change" if row.get("expected_before") else ""
    return (f"{low:g} us" if low == high else f"{low:g} to {high:g} us") + before


def is_predicted(row: Row) -> bool:
    """Whether something was predicted of a measurement of the probe."""
    return row.get("expected_low") is not None and row.get("expected_high") is not None


def is_compared(row: Row) -> bool:
    """Whether what was expected is of the device that was measured, and of that size. Older rows are of full size."""
    device = str(row.get("expected_device") or DEVICE)
    return is_predicted(row) and not row.get("small") and device in str(row.get("device"))


_probed: Columns = {"experiment": of("experiment"), "<what": of("name")}
_took = of("microseconds", ".1f", " us")


def probe(rows: Sequence[Row]) -> Lines:
    """Every measurement of the probe of a GPU (``bench.gpu.probe``)."""
    share = lambda row: NONE if row.get("roof_share") is None else f"{100 * row['roof_share']:.0f} %"
    note = lambda row: str(row.get("reason") or row.get("absent") or row.get("note") or NONE)
    more: Columns = {"measured": _took, "<of": of("of"), "share of the roof": share, "<note": note}
    return table_of(of_kind(rows, "probe"), {**_probed, **more})


def predictions(rows: Sequence[Row]) -> Lines:
    """What was expected of the probe's measurements, from arithmetic for an H100, against what was found."""

    def verdict(row: Row) -> str:
        low, high, found = row["expected_low"], row["expected_high"], row.get("microseconds")
        if found is None:
            return f"failed: {row['reason']}" if row.get("reason") else "not measured"
        if not is_compared(row):
            tiny = "at tiny sizes " if row.get("small") else ""
            return f"not compared: measured {tiny}on {row.get('device') or 'an unnamed device'}"
        if 0.95 * low <= found <= 1.05 * high:
            return "as expected"
        return f"{low / found:.2f} times as fast" if found < low else f"{found / high:.2f} times as slow"

    more: Columns = {"expected": expected_range, "measured": _took, "<verdict": verdict}
    written = table_of(filter(is_predicted, of_kind(rows, "probe")), {**_probed, **more})
    return [EXPECTED, "", *written] if written else []


def agreement(rows: Iterable[Row]) -> str:
    """Of every case's newest run with the one before it, on the same device, at the same commit and torch.

    Baselines are left out (their speed-up is 1 by definition).
    """
    ratios, overlapping = [], 0
    compared = [r for r in rows if r.get("speedup") and r.get("speedup_low") != r.get("speedup_high")]
    key = lambda row: (summary.case_of(row), row.get("commit"), row.get("torch"))
    for members in groups(compared, key).values():
        runs = sorted({row.get("date") or "": row for row in members}.items())
        if len(runs) > 1:
            both = [row for _, row in runs[-2:]]
            ratios.append(both[1]["speedup"] / both[0]["speedup"])
            overlapping += max(r["speedup_low"] for r in both) <= min(r["speedup_high"] for r in both)
    if not ratios:
        return "No case was measured twice at one commit."
    return (
        f"{len(ratios)} figures were measured twice at one commit, and the newest run is shown. The spreads overlap in "
        f"{overlapping} of them; the newer speed-up is {min(ratios):.2f} to {max(ratios):.2f} times the older."
    )
