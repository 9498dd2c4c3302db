"""Result rows of one device as Markdown tables, lists of lines; columns are padded, for whom reads them in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.cases import OPERATORS
from bench.report.summary import (
    OPTIMIZERS,
    PRODUCTS_SAVED,
    REAL_DENSITY,
    STEP_PARTS,
    SYSTEMS,
    amdahl,
    block_share,
    break_even,
    fastest_other,
    fields,
    groups,
    has_device_time,
    is_ours,
    losses,
    of_kind,
    operator_case,
    rank,
    shape_of,
    values,
    verdicts,
)
from bench.rows import Row

Lines = list[str]
NONE = "–"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    """A Markdown table; the first column is text, the others are aligned as their header says (``<`` first: left)."""
    left = [index == 0 or name.startswith("<") for index, name in enumerate(header)]
    cells = [[name.removeprefix("<") for name in header], *(list(row) for row in rows)]
    widths = [max(3, *(len(row[index]) for row in cells)) for index in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(row, widths, left))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 2) if is_left else "-" * (width + 1) + ":" for width, is_left in zip(widths, left))
    return [line(cells[0]), f"|{rule}|", *map(line, cells[1:])]


def times(value: float | None) -> str:
    """``1.63×``."""
    return NONE if value is None else f"{value:.2f}×"


def speedup(row: Row | None, spread: bool = True, prefix: str = "") -> str:
    """``1.63× [1.60, 1.66]``, or the median alone; with the prefix ``device_`` that of the device."""
    median, low, high = ((row or {}).get(f"{prefix}speedup{end}") for end in ("", "_low", "_high"))
    if median is None:
        return NONE
    if not spread or low is None or high is None:
        return times(median)
    return f"{median:.2f}× [{low:.2f}, {high:.2f}]"


def both_speedups(row: Row | None, spread: bool = True) -> str:
    """``1.63× / 1.80×``: as called and of the device, where both were measured."""
    called = speedup(row, spread)
    return f"{called} / {speedup(row, spread, 'device_')}" if row is not None and has_device_time(row) else called


def milliseconds(value: float | None) -> str:
    """With three digits: ``0.0412 ms``, ``12.3 ms``, ``1240 ms``."""
    if value is None:
        return NONE
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def size(value: float | None) -> str:
    """Bytes as ``0.4 MiB``, ``41 MiB``, ``1.2 GiB``."""
    if value is None:
        return NONE
    unit, scale = next((u for u in (("GiB", 2**30), ("MiB", 2**20)) if value >= u[1]), ("KiB", 2**10))
    return f"{value / scale:.1f} {unit}" if value < 10 * scale else f"{value / scale:.0f} {unit}"


def size_range(found: Sequence[float]) -> str:
    """``41–63 MiB``: least and most over the densities."""
    if not found:
        return NONE
    low, high = size(min(found)), size(max(found))
    if low == high:
        return low
    return f"{low.split()[0]}–{high}" if low.split()[1] == high.split()[1] else f"{low}–{high}"


def rate(value: float | None) -> str:
    """Tokens per second, whole."""
    return NONE if value is None else f"{value:.0f}"


def per_second(row: Row) -> str:
    """A ceiling in its unit."""
    value = row["per_second"]
    if row["what"] == "matmul":
        return f"{value / 1e12:.3g} TFLOP/s"
    return f"{value / 1e9:.0f} GB/s"


def density_of(row: Row) -> str:
    """``0.5``, or a dash."""
    return f"{row['density']:g}" if row.get("density") is not None else NONE


def near_real(densities: Sequence[float]) -> float | None:
    """The density that the published masks have, or the measured one nearest to it."""
    return min(densities, key=lambda density: abs(density - REAL_DENSITY), default=None)


def provider_name(row: Row) -> str:
    """The provider, with the backend where one was forced from outside."""
    asked = row.get("backend_asked") or "auto"
    return f"{row.get('provider')}" if asked == "auto" else f"{row.get('provider')} (NSPEC_BACKEND={asked})"


def _cases(rows: Iterable[Row]) -> dict[str, dict[tuple[Any, ...], list[Row]]]:
    """Operator -> case -> rows, operators in their order."""
    found = groups(of_kind(rows, "operator"), lambda row: str(row.get("operator")))
    ordered = sorted(found.items(), key=lambda item: rank(OPERATORS, item[0]))
    return {operator: groups(members, operator_case) for operator, members in ordered}


def _baseline(rows: Iterable[Row]) -> str:
    return ", ".join(dict.fromkeys(str(row["baseline"]) for row in rows if row.get("baseline")))


def _titles(densities: Sequence[float]) -> list[str]:
    """Density columns; an operator that is not measured at densities has one column."""
    return ["speed-up"] if len(densities) == 1 and densities[0] == 1 else [f"{density:g}" for density in densities]


def operators(
    rows: Sequence[Row], only: Sequence[str] = (), spread: bool = False, all_providers: bool = False
) -> Lines:
    """Speed-up over the baseline by density.

    Args:
        rows: of one device.
        only: these operators; empty for all.
        spread: the middle 80 % in brackets, peak memory, backend and what is computed.
        all_providers: every provider of a case; else ours, and the fastest of the others.
    """
    lines: Lines = []
    for operator, cases in _cases(rows).items():
        if only and operator not in only:
            continue
        members = [row for case in cases.values() for row in case]
        densities = values(members, "density")
        header = ["dtype", "<shape", "<provider", *_titles(densities)]
        header += ["<computes", "<backend", "peak memory"] if spread else []
        body = []
        for case in cases.values():
            by_provider = groups(case, provider_name)
            if not all_providers:
                by_provider = {name: found for name, found in by_provider.items() if is_ours(found[0])}
            first = case[0]
            place = [str(first.get("dtype")), shape_of(first)]
            for name, found in by_provider.items():
                at = {row.get("density"): row for row in found}
                is_baseline = name == found[0].get("baseline")
                cells = [_operator_cell(at.get(density), is_baseline, spread) for density in densities]
                row = [*place, f"**{name}**" if is_ours(found[0]) else name, *cells]
                if spread:
                    row += [_distinct(found, "computes"), _distinct(found, "backend")]
                    row.append(size_range([r["peak_bytes"] for r in found if r.get("peak_bytes") is not None]))
                body.append(row)
            if not all_providers:
                best = [fastest_other([r for r in case if r.get("density") == density]) for density in densities]
                if any(best):
                    body.append([*place, "fastest other", *map(_named, best)])
        two = "; as called / device alone" if any(map(has_device_time, members)) else ""
        lines += [
            f"`{operator}`, over {_baseline(members) or 'an unnamed baseline'}{two}:",
            "",
            *table(header, body),
            "",
        ]
    return lines[:-1]


def _operator_cell(row: Row | None, is_baseline: bool, spread: bool) -> str:
    """The baseline shows its time, the others their speed-up over it."""
    if not is_baseline or row is None:
        return both_speedups(row, spread)
    called = milliseconds(row.get("milliseconds"))
    return f"{called} / {milliseconds(row.get('device_milliseconds'))}" if has_device_time(row) else called


def _named(row: Row | None) -> str:
    return NONE if row is None else f"{both_speedups(row, spread=False)} {row.get('provider')}"


def _distinct(rows: Iterable[Row], field: str) -> str:
    return ", ".join(dict.fromkeys(str(row[field]) for row in rows if row.get(field))) or NONE


def targets(rows: Sequence[Row]) -> Lines:
    """Every figure that has a target, and whether it is met."""
    body, found = [], verdicts(rows)
    two = any(verdict.prefix for verdict in found)
    for verdict in found:
        row = verdict.row
        said = "met" if verdict.met else f"missed by {100 * verdict.missed:.2g} %"
        said += ", within the spread" if not verdict.met and verdict.within_spread else ""
        name = f"`{row.get('operator')}`" + ("" if row.get("provider") == "ours" else f", {provider_name(row)}")
        where = [str(row.get("dtype")), shape_of(row), density_of(row)]
        figure = [speedup(row, prefix=verdict.prefix)]
        figure += ["device" if verdict.prefix else "as called"] if two else []
        body.append([name, *where, f"{row['target']:.2f}×", *figure, str(row.get("baseline") or NONE), said])
    header = ["operator", "<dtype", "<shape", "density", "target", "measured", *(["<of"] if two else [])]
    header += ["<over", "<verdict"]
    return table(header, body) if body else []


def loss_table(rows: Sequence[Row]) -> Lines:
    """Where a provider was faster than ours."""
    body = []
    for loss in losses(rows):
        row = loss.row
        where = [f"`{row.get('operator')}`", provider_name(row), str(row.get("dtype")), shape_of(row)]
        said = f"{100 * (1 - loss.ratio):.0f} %" + (", within the spread" if loss.within_spread else "")
        body.append([*where, density_of(row), both_speedups(row), loss.winner, said])
    header = ["operator", "<ours", "<dtype", "<shape", "density", "over the baseline", "<fastest", "<ours is slower by"]
    return table(header, body) if body else []


def model_name(row: Row) -> str:
    """``base, scaled down: d 256, d_ff 1024, 2 + 2 layers``."""
    scaled = ", scaled down" if row.get("scaled") else ""
    layers = [row.get("encoder_layers"), row.get("decoder_layers")]
    sizes = [
        f"{name} {row[key]}" for name, key in (("d", "d_model"), ("d_ff", "d_ff"), ("heads", "heads")) if row.get(key)
    ]
    if None not in layers:
        sizes.append(f"{layers[0]} + {layers[1]} layers")
    if row.get("vocabulary"):
        sizes.append(f"vocabulary {row['vocabulary']}")
    return f"Transformer-{row.get('shape')}{scaled}" + (f" ({', '.join(sizes)})" if sizes else "")


_step_group = fields("shape", "scaled", "d_model", "d_ff", "dtype", "tokens")


def step_key(row: Row) -> tuple[Any, ...]:
    """Sorts rows of a step: system, optimiser, batches of one task first, density."""
    order = (rank(SYSTEMS, row["system"]), rank(OPTIMIZERS, row["optimizer"]), row["batch"] != "pure")
    return (*order, row.get("tasks_in_batch") or 0, row["density"])


def batch_name(row: Row) -> str:
    """``one task`` or ``8 tasks`` in a batch."""
    return "one task" if row["batch"] == "pure" else f"{row.get('tasks_in_batch') or 'several'} tasks"


def is_baseline_step(row: Row) -> bool:
    """Whether a step is what the others are compared with."""
    return row.get("baseline") == f"{row['system']}, {row['optimizer']}"


def steps(rows: Sequence[Row], spread: bool = False) -> Lines:
    """Speed-up of a whole training step over dense by system, optimiser, batch and density; break-even; the bound."""
    lines: Lines = []
    for members in groups(of_kind(rows, "step"), _step_group).values():
        members = sorted(members, key=step_key)
        densities = values((row for row in members if row["system"] != "dense"), "density")
        real = near_real(densities)
        at_real = "" if real is None else f" at {real:g}"
        header = ["system", "<optimiser", "<batch", *(f"{density:g}" for density in densities)]
        header += [f"tokens/s{at_real}", f"peak memory{at_real}", "masks", "break-even density"]
        body = []
        for found in groups(members, lambda row: (row["system"], row["optimizer"], batch_name(row))).values():
            first, at = found[0], {row["density"]: row for row in found}
            pairs = [(density, row["speedup"]) for density, row in at.items() if row.get("speedup") is not None]
            dense = first["system"] == "dense"
            limit = NONE if dense or len(pairs) < 2 else _break_even(pairs)
            cells = [speedup(at.get(density), spread) for density in densities]
            if is_baseline_step(first):
                cells = ["1" if density == 1 else NONE for density in densities]
            tail = [_at(found, real, "tokens_per_second", rate), _at(found, real, "peak_bytes", size)]
            tail += [NONE if dense else _at(found, real, "mask_bytes", size), limit]
            body.append([first["system"], first["optimizer"], batch_name(first), *cells, *tail])
        base = next((milliseconds(row.get("milliseconds")) for row in members if is_baseline_step(row)), NONE)
        lines += [f"{_step_title(members[0])}; over {_baseline(members)}, {base} a step:", "", *table(header, body), ""]
        lines += [*_bound(members, densities), ""]
    return lines[:-1]


def _at(rows: Sequence[Row], density: float | None, field: str, how: Callable[[float], str]) -> str:
    """A figure at a density, or, where it was not measured there, at the nearest one, which is named then."""
    known = [row for row in rows if row.get(field) is not None]
    if not known or density is None:
        return how(known[0][field]) if known else NONE
    row = min(known, key=lambda row: abs(row["density"] - density))
    elsewhere = row["density"] != density and row["system"] != "dense"
    return how(row[field]) + (f" (at {density_of(row)})" if elsewhere else "")


def _step_title(row: Row) -> str:
    tokens = f", batches of {row['tokens']} tokens" if row.get("tokens") else ""
    return f"{model_name(row)}, {row['dtype']}{tokens}"


def _break_even(pairs: Sequence[tuple[float, float]]) -> str:
    found = break_even(pairs)
    if found is None:
        return "slower at each"
    if found == max(density for density, _ in pairs):
        return "slower at none"
    return f"{found:.2f}"


def _bound(rows: Sequence[Row], densities: Sequence[float]) -> Lines:
    """What a step can gain at most, since only products of the feed-forward blocks shrink."""
    share = block_share(rows)
    if share is None:
        return ["The share of the feed-forward blocks in the dense step was not measured."]
    text = f"The feed-forward blocks take {100 * share:.0f} % of the dense step"
    named = [density for density in densities if density < 1]
    said = []
    for system in ("forward", "update"):
        most = (f"{amdahl(share * PRODUCTS_SAVED[system], density):.2f}× at {density:g}" for density in named)
        said.append(f"`{system}` {', '.join(most)}")
    bound = f": with AdamW and nothing lost, a step could gain in mode {' and in mode '.join(said)}" if named else ""
    return [f"{text}{bound}."]


def step_parts(rows: Sequence[Row]) -> Lines:
    """Milliseconds by part of a step, every row."""
    lines: Lines = []
    for members in groups(of_kind(rows, "step"), _step_group).values():
        members = sorted(members, key=step_key)
        named = dict.fromkeys([*STEP_PARTS, *(name for row in members for name in row.get("parts") or {})])
        header = ["system", "<optimiser", "<batch", "density", "step", *named, "tokens/s", "peak memory"]
        body = []
        for row in members:
            parts = row.get("parts") or {}
            cells = [row["system"], row["optimizer"], batch_name(row), density_of(row)]
            cells += [milliseconds(row.get("milliseconds")), *(milliseconds(parts.get(name)) for name in named)]
            body.append([*cells, rate(row.get("tokens_per_second")), size(row.get("peak_bytes"))])
        lines += [f"{_step_title(members[0])}:", "", *table(header, body), ""]
    return lines[:-1]


def tasks(rows: Sequence[Row]) -> Lines:
    """What a step costs as the model has more tasks."""
    lines: Lines = []
    for members in groups(
        of_kind(rows, "tasks"), fields("shape", "scaled", "d_model", "d_ff", "density", "dtype")
    ).values():
        members = sorted(members, key=lambda row: (rank(SYSTEMS, row["system"]), row["tasks"]))
        over = f"over that of {min(row['tasks'] for row in members)} tasks"
        body = []
        for row in members:
            masks = size(row.get("mask_bytes")) + (" (computed)" if row.get("computed") else "")
            cells = [row["system"], str(row["tasks"]), masks, _unit(row.get("specialize_seconds"), ".2g", "s")]
            cells.append(_unit(row.get("task_switch_microseconds"), ".0f", "µs"))
            body.append([*cells, milliseconds(row.get("milliseconds")), speedup(row)])
        first = members[0]
        at = f", density {first['density']:g}" if first.get("density") else ""
        header = ["system", "tasks", "masks", "specialise", "switch of task", "step", over]
        lines += [f"{model_name(first)}{at}:", "", *table(header, body), ""]
    return lines[:-1]


def _unit(value: float | None, how: str, unit: str) -> str:
    return NONE if value is None else f"{value:{how}} {unit}"


def profiling(rows: Sequence[Row]) -> Lines:
    """Counting activations: ours, the release's way, and no counting."""
    lines: Lines = []
    key = fields("shape", "scaled", "d_model", "d_ff", "dtype", "sentences", "tokens")
    for members in groups(of_kind(rows, "profiling"), key).values():
        header = ["way", "<padding", "batch", "speed-up", "tokens/s", "peak memory"]
        padding = {"include": "counted too", "exclude": "left out"}
        body = []
        for row in members:
            counted = NONE if row["way"] == "no counting" else padding.get(str(row.get("padding")), NONE)
            cells = [row["way"], counted, milliseconds(row.get("milliseconds")), speedup(row)]
            body.append([*cells, rate(row.get("tokens_per_second")), size(row.get("peak_bytes"))])
        first = members[0]
        corpus = "".join(f", {first[name]} {name}" for name in ("sentences", "tokens", "batches") if first.get(name))
        lines += [
            f"{model_name(first)}, {first['dtype']}{corpus}; over {_baseline(members)}:",
            "",
            *table(header, body),
            "",
        ]
    return lines[:-1]


def ceilings(rows: Sequence[Row]) -> Lines:
    """The best that the device sustained."""
    found = [row for row in of_kind(rows, "ceiling") if row.get("per_second")]
    names = {"matmul": "matrix product", "memory": "memory"}
    body = [[names.get(row["what"], str(row["what"])), str(row.get("dtype") or NONE), per_second(row)] for row in found]
    return table(["ceiling", "<dtype", "best sustained"], body) if body else []


def absent(rows: Sequence[Row]) -> Lines:
    """Providers that could not run, raised or were wrong: in which case, or in how many, and why."""
    found = groups(of_kind(rows, "absent"), fields("operator", "provider", "reason"))
    body = []
    for (operator, provider, reason), members in found.items():
        own = members[0]
        case = f"{shape_of(own)}, {own.get('dtype') or NONE}, density {density_of(own)}"
        where = case if len(members) == 1 else f"{len(members)} cases"
        body.append([f"`{operator}`", str(provider), where, str(reason).replace("|", "/")])
    return table(["operator", "<provider", "<case", "<why it is not here"], body) if body else []
