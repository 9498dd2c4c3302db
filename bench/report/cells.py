"""How the figures of rows are written, and Markdown tables, whose columns are padded for whom reads them in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.report.summary import forced, has_device_time
from bench.rows import Row

Lines = list[str]
Columns = Mapping[str, Callable[[Row], str]]
"""Header -> what a row has under it."""
NONE = "–"


def table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> Lines:
    """A Markdown table, nothing without rows; the first column is text, and those whose header begins with ``<``."""
    header, rows = list(header), list(rows)
    if not rows:
        return []
    left = [index == 0 or name.startswith("<") for index, name in enumerate(header)]
    cells = [[name.removeprefix("<") for name in header], *rows]
    widths = [max(3, *(len(row[index]) for row in cells)) for index in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = (c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(row, widths, left))
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (width + 2) if is_left else "-" * (width + 1) + ":" for width, is_left in zip(widths, left))
    return [line(cells[0]), f"|{rule}|", *map(line, cells[1:])]


def table_of(rows: Iterable[Row], columns: Columns) -> Lines:
    """A line for each row."""
    return table(columns, [[cell(row).replace("|", "/") for cell in columns.values()] for row in rows])


def titled(tables: Iterable[tuple[str, Lines]]) -> Lines:
    """Tables under one another, each with a line above it."""
    return [line for title, lines in tables for line in (title, "", *lines, "")][:-1]


def known(value: float | None, how: str = "", unit: str = "") -> str:
    """A number with its unit, or a dash."""
    return NONE if value is None else f"{value:{how}}{unit}"


def of(name: str, how: str = "", unit: str = "") -> Callable[[Row], str]:
    """A cell: a field, or a dash where it is null, missing or empty."""
    return lambda row: known(row.get(name) if row.get(name) != "" else None, how, unit)


def speedup(row: Row | None, spread: bool = True, name: str = "speedup") -> str:
    """``1.63× [1.60, 1.66]``, or the median alone; with the name ``device_speedup`` that of the device."""
    median, low, high = ((row or {}).get(f"{name}{end}") for end in ("", "_low", "_high"))
    ends = f" [{low:.2f}, {high:.2f}]" if spread and None not in (median, low, high) else ""
    return known(median, ".2f", "×") + ends


def both_speedups(row: Row | None, spread: bool = True) -> str:
    """``1.63× / 1.80×``: as called and of the device, where both were measured."""
    called = speedup(row, spread)
    return f"{called} / {speedup(row, spread, 'device_speedup')}" if row and has_device_time(row) else called


def milliseconds(value: float | None) -> str:
    """With three digits: ``0.0412 ms``, ``12.3 ms``, ``1240 ms``."""
    return known(value, ".0f" if (value or 0) >= 100 else ".3g", " ms")


def size(value: float | None) -> str:
    """Bytes as ``0.4 MiB``, ``41 MiB``, ``1.2 GiB``."""
    if value is None:
        return NONE
    unit, scale = next((u for u in (("GiB", 2**30), ("MiB", 2**20)) if value >= u[1]), ("KiB", 2**10))
    return f"{value / scale:.{1 if value < 10 * scale else 0}f} {unit}"


def size_range(found: Sequence[float]) -> str:
    """``41–63 MiB``: least and most over the densities."""
    low, high = size(min(found, default=None)), size(max(found, default=None))
    short = low.split()[0] if low.split()[-1] == high.split()[-1] else low
    return low if low == high else f"{short}–{high}"


def per_second(row: Row) -> str:
    """A ceiling in its unit."""
    value = row["per_second"]
    return f"{value / 1e12:.3g} TFLOP/s" if row["what"] == "matmul" else f"{value / 1e9:.0f} GB/s"


density_of = of("density", "g")
took, tokens_per_second = lambda row: milliseconds(row.get("milliseconds")), of("tokens_per_second", ".0f")
peak = lambda row: size(row.get("peak_bytes"))


def shape_of(row: Row) -> str:
    """``4096 × 512 × 2048`` (tokens × d × d_ff; AdamW has no tokens), an activation other than ReLU, tasks in the batch."""
    named = ("d_model", "d_ff") if row.get("operator") == "row_sparse_adamw" else ("tokens", "d_model", "d_ff")
    text = " × ".join(str(row[name]) for name in named if row.get(name))
    text += f", {row['activation']}" if row.get("activation", "relu") != "relu" else ""
    return text if (row.get("tasks") or 1) == 1 else f"{text}, {row['tasks']} tasks"


def provider_name(row: Row) -> str:
    """The provider, with the backend where one was forced from outside."""
    asked = forced(row)
    return f"{row.get('provider')} (NSPEC_BACKEND={asked})" if asked else f"{row.get('provider')}"


def distinct(rows: Iterable[Row], field: str) -> str:
    return ", ".join(dict.fromkeys(str(row[field]) for row in rows if row.get(field))) or NONE


def baseline_of(rows: Iterable[Row]) -> str:
    found = distinct(rows, "baseline")
    return "an unnamed baseline" if found == NONE else found


def model_name(row: Row) -> str:
    """``Transformer-base, scaled down (d 256, d_ff 1024, 2 + 2 layers)``."""
    named = (("d", "d_model"), ("d_ff", "d_ff"), ("heads", "heads"))
    sizes = [f"{name} {row[key]}" for name, key in named if row.get(key)]
    layers = [row.get("encoder_layers"), row.get("decoder_layers")]
    sizes += [] if None in layers else [f"{layers[0]} + {layers[1]} layers"]
    sizes += [f"vocabulary {row['vocabulary']}"] if row.get("vocabulary") else []
    scaled = ", scaled down" if row.get("scaled") else ""
    return f"Transformer-{row.get('shape')}{scaled}" + (f" ({', '.join(sizes)})" if sizes else "")


def batch_name(row: Row) -> str:
    """``one task`` or ``8 tasks`` in a batch."""
    return "one task" if row["batch"] == "pure" else f"{row.get('tasks_in_batch') or 'several'} tasks"


def is_baseline_step(row: Row) -> bool:
    """Whether a step is what the others are compared with."""
    return bool(row.get("baseline") == f"{row['system']}, {row['optimizer']}")
