"""Rows of decoding as tables, and in the places that pages have for them between ``serving:NAME`` markers."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench.machine import ROOT
from bench.report import cells
from bench.report.__main__ import machine
from bench.report.cells import Lines, speedup, table
from bench.report.fragments import filled
from bench.report.summary import REAL_DENSITY, fields, groups, of_kind, values
from bench.rows import Row, figure
from nspec.files import write_text

_MODEL = ("engine", "dtype")
_SEARCH = ("batch", "beam")
_CASE = ("device", "shape", "threads", *_SEARCH, *_MODEL, "form", "density")


def line(row: Row) -> str:
    """A row as it is printed when it has been measured."""
    name = f"{row['engine']} {row['dtype']}, {row['form']}"
    name += "" if row["form"] == "dense" else f" {row['density']:g}"
    setting = f"batch {row['batch']}, beam {row['beam']}, {row['threads']} threads"
    speed = f"{row['sentences_per_second']:9.2f} sentences/s {figure(row):>20} of dense"
    return f"  {name:<36} {setting:<30} {speed}, peak {cells.size(row['peak_bytes'])}"


def fragments(rows: Sequence[Row], files: Sequence[Path], pages: Sequence[Path]) -> list[Path]:
    """Writes the tables into the pages that have places for them; returns these.

    Raises:
        ValueError: no rows of decoding, a page without a place, or a name of a place that there is not.
    """
    found = of_kind(rows, "serving")
    if not found:
        raise ValueError(f"no rows of bench.serving in {', '.join(map(str, files))}; they have `kind` serving")
    newest = [max(same, key=lambda row: row["date"]) for same in groups(found, fields(*_CASE)).values()]
    command = " ".join(["python -m bench.serving --from", *map(_named, files), "--update", *map(_named, pages)])
    ways: dict[str, Callable[[Sequence[Row]], Lines]] = {"headline": headline, "tables": tables}

    def text(name: str) -> str:
        if name not in ways:
            raise ValueError(f"there is no fragment serving:{name}; there are {', '.join(ways)}")
        lines = [
            part for of_one in groups(newest, fields("device", "shape")).values() for part in [*ways[name](of_one), ""]
        ]
        on = "; and on ".join(
            f"{machine(of_one)}, ctranslate2 {cells.distinct(of_one, 'ctranslate2')}"
            for of_one in groups(newest, fields("device")).values()
        )
        return "\n".join([*lines, f"Measured on {on}. Written by `{command}`."])

    texts = {page: filled(page, page.read_text(encoding="utf-8"), text, "serving") for page in pages}
    for page, written in texts.items():
        write_text(page, written)
    return list(texts)


def _named(path: Path) -> str:
    return shlex.quote(Path(os.path.relpath(path.resolve(), ROOT)).as_posix())


def _titles(densities: Iterable[float]) -> list[str]:
    return [f"{d:g}" + (" (published masks)" if d == REAL_DENSITY else "") for d in densities]


def _compact(rows: Sequence[Row]) -> list[float]:
    return sorted(values([row for row in rows if row["form"] == "compact"], "density"))


def headline(rows: Sequence[Row]) -> Lines:
    """One line: what a compact model gains in CTranslate2 in float32, of the most threads, sentences and beams."""
    own = [row for row in rows if row["engine"] == "ctranslate2" and row["dtype"] == "float32"]
    most = max((row["threads"], row["batch"], row["beam"]) for row in own)
    own = [row for row in own if (row["threads"], row["batch"], row["beam"]) == most]
    densities, at = _compact(own), {row["density"]: row for row in own if row["form"] == "compact"}
    what = f"decoding in CTranslate2, beam {most[2]}, {most[1]} sentences a batch"
    body = [[what, "compact", *(speedup(at[density], spread=False) for density in densities)]]
    return table(["", "<model", *_titles(densities)], body)


def tables(rows: Sequence[Row]) -> Lines:
    """Sentences per second and speed-ups by threads, then memory and size."""
    densities, one = _compact(rows), rows[0]
    lines = [
        f"M2M100's form, d {one['d_model']}, d_ff {one['d_ff']}, {one['layers']} + {one['layers']} layers, vocabulary "
        f"{one['vocabulary']}, random weights and masks; {one['source_tokens']} tokens in, {one['target_tokens']} out.",
        "",
    ]
    header = ["batch, beam", "<engine", "dense, sentences/s", "× Transformers", "merged", *_titles(densities)]
    for threads, mine in sorted(groups(rows, fields("threads")).items()):
        body = []
        for (batch, beam, engine, dtype), cell in groups(mine, fields(*_SEARCH, *_MODEL)).items():
            dense, merged = ([row for row in cell if row["form"] == form] for form in ("dense", "merged"))
            at = {row["density"]: row for row in cell if row["form"] == "compact"}
            body.append(
                [
                    f"{batch}, {beam}",
                    f"{engine}, {dtype}",
                    *(f"{row['sentences_per_second']:.1f}" for row in dense),
                    *(speedup(row, spread=False, name="over_transformers") for row in dense),
                    *(speedup(row, spread=False) for row in merged),
                    *(speedup(at.get(density)) for density in densities),
                ]
            )
        said = f"**{threads[0]} thread{'s' if threads[0] > 1 else ''}**"
        lines += [f"{said}: speed-up of merged and, by density, compact over dense", "", *table(header, body), ""]
    return [*lines, *_memory(rows, densities)]


def _memory(rows: Sequence[Row], densities: Sequence[float]) -> Lines:
    """Peaks are of the most threads, so those of the first number of threads serve."""
    searches = sorted(groups(rows, fields(*_SEARCH)))
    searches = list(dict.fromkeys([searches[0], searches[-1]]))
    body = []
    for (engine, dtype), mine in groups(rows, fields(*_MODEL)).items():
        forms = [("dense", 1.0), *(("compact", density) for density in densities)]
        for form, density in forms:
            same = [row for row in mine if (row["form"], row["density"]) == (form, density)]
            peaks = [next(row for row in same if (row["batch"], row["beam"]) == search) for search in searches]
            name = form if form == "dense" else f"{form}, {density:g}"
            body.append([f"{engine}, {dtype}", name, cells.size(same[0]["saved_bytes"]), *map(cells.peak, peaks)])
    header = ["engine", "<model", "folder", *(f"peak, batch {batch}, beam {beam}" for batch, beam in searches)]
    said = "Size on disk, and the most memory of a process beyond that of one that has loaded no model:"
    return [said, "", *table(header, body)]
