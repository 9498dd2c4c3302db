"""Result files -> Markdown tables and figures; and the same in place in a page between markers.

    python -m bench.report runs/bench/*/rows.jsonl                   # the report on the terminal
    python -m bench.report FILES --out FOLDER                        # FOLDER/report.md and its figures
    python -m bench.report FILES --update docs/speed.md              # what stands between markers in the page

Of several measurements of a case on one device the newest is shown. A page has a fragment where it says
``<!-- bench:NAME:begin -->`` and, on a later line, ``<!-- bench:NAME:end -->``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from bench.machine import ROOT
from bench.report import figures, tables
from bench.report.cells import Lines
from bench.report.fragments import filled, fragments_of
from bench.report.summary import KINDS, by_device, check, has_device_time, of_kind, values
from bench.rows import Row, read
from nspec.files import write_text

GPU_MISSING = "GPU figures are still to be measured."
_SPEED = (
    "`1.63× [1.60, 1.66]` is time of the baseline / time of the other, the median over rounds of the ratio within a round, "
    "and the middle 80 % of the rounds (all, of fewer than ten); above 1 is faster."
)
_TWO_TIMES = (
    "Where a cell has two figures of a GPU, the first is as called, with the host's time where the device waits for it, "
    "which is what a user gets, and the second that of the device alone. Targets are about the second; a plot and a figure "
    "that stands alone are as called."
)
_HOST = (
    "Launches of Triton kernels, products of the library and other kernels of PyTorch that a call puts on a GPU, and the "
    "processor time of its Python and PyTorch on one thread of a CPU, without the driver's calls; of dense: of the dense "
    "block's forward and backward pass, the median of paired ratios and the middle 80 % of the rounds. No GPU computed."
)


class Part(NamedTuple):
    """A part of the report: the kind of its rows, how those of one device are written, what is said of an empty table."""

    title: str
    kind: str
    write: Callable[[Sequence[Row]], Lines]
    nothing: str = "Nothing to show."


_MEASURED = {
    "operator": "The operators were",
    "ceiling": "The ceilings of the device were",
    "step": "Training steps were",
    "tasks": "Growth with the number of tasks was",
    "profiling": "Profiling was",
    "probe": "Kernel by kernel nothing was",
}
PARTS: dict[str, Part] = {
    "targets": Part("Targets", "operator", tables.targets, "No case that has a target was measured."),
    "losses": Part("Where something else is faster", "operator", tables.losses, "Nothing was faster than ours."),
    "operators": Part("Operators", "operator", tables.operators),
    "providers": Part("Operators, every provider", "operator", partial(tables.operators, spread=True, every=True)),
    "step-spread": Part("Training steps", "step", partial(tables.steps, spread=True)),
    "step-parts": Part("Training steps by part", "step", tables.step_parts),
    "tasks": Part("Growth with the number of tasks", "tasks", tables.tasks),
    "profiling": Part("Profiling", "profiling", tables.profiling),
    "ceilings": Part("Ceilings", "ceiling", tables.ceilings, "No ceiling has a figure."),
    "absent": Part("What could not run", "absent", tables.absent, "No provider was left out."),
    "predictions": Part("Predicted against measured", "probe", tables.predictions, "Nothing measured was predicted."),
    "probe": Part("Kernels and products one by one", "probe", tables.probe),
}
"""The parts of the report in their order, the last two where a GPU was probed; a page may have each."""
_BLOCK = partial(tables.operators, only="block", every=True)
_ON_PAGES = {
    "block": Part("A feed-forward block", "operator", _BLOCK, "The block was not measured."),
    "steps": Part("Training steps", "step", tables.steps),
}
FIGURE_PARTS = {f"figure-{name}": name for name in figures.FIGURES}
FRAGMENTS = ("machine", "headline", *PARTS, *_ON_PAGES, *FIGURE_PARTS)


def machine(rows: Sequence[Row]) -> str:
    """One line: device, versions, commit and date of rows of one device."""
    days = sorted({str(row["date"])[:10] for row in rows if row.get("date")})
    said = lambda name: ", ".join(str(value) for value in values(rows, name) if value)
    known = [("", str(rows[0].get("device") or "unnamed device")), ("", said("driver")), ("torch ", said("torch"))]
    known += [("triton ", said("triton")), ("Python ", said("python"))]
    known += [("", " to ".join(dict.fromkeys([*days[:1], *days[-1:]]))), ("commit ", said("commit"))]
    return ", ".join(before + text for before, text in known if text)


def machines(devices: Mapping[str, Sequence[Row]]) -> Lines:
    """What was measured on, and what was not."""
    gpu = any(row.get("device_type") == "cuda" for rows in devices.values() for row in rows)
    return [*(f"* {machine(rows)}" for rows in devices.values()), *([] if gpu else ["", GPU_MISSING])]


def section(part: Part, devices: Mapping[str, Sequence[Row]]) -> Lines:
    """The tables of a part, device by device, or what was not measured."""
    lines: Lines = []
    for device, rows in devices.items():
        found = of_kind(rows, part.kind)
        missing = part.nothing if found or part.kind == "absent" else f"{_MEASURED[part.kind]} not measured."
        title = [f"**{device}**", ""] if len(devices) > 1 else []
        lines += [*title, *((part.write(found) if found else []) or [missing]), ""]
    return lines[:-1]


class Report:
    """The rows of some files, and how they are written.

    Args:
        files: that are read, in order.
        pages: Markdown files that are updated from them; they are named in the command under each fragment.
        docs: where the figures of pages lie.
    """

    def __init__(self, files: Sequence[Path], pages: Sequence[Path] = (), docs: Path = ROOT / "docs") -> None:
        self.files, self.pages, self.docs, self.rows = files, pages, docs, read(files)
        if not self.rows:
            raise ValueError(f"no rows in {', '.join(map(str, files)) or 'no files'}; measure some: make bench")
        check(self.rows)
        # Those of the host's part, on one thread, are of no device that anything else was measured on.
        self.hosts = by_device(of_kind(self.rows, "host"))
        self.devices = by_device(row for row in self.rows if row["kind"] != "host")
        self.drawing = cache(lambda name: figures.draw(name, self.devices))

    def command(self) -> str:
        """What writes the pages from the files, as seen from the checkout's root."""
        names, pages = ([shlex.quote(_relative(path, ROOT)) for path in paths] for paths in (self.files, self.pages))
        docs = [] if self.docs == ROOT / "docs" else ["--docs", shlex.quote(_relative(self.docs, ROOT))]
        return " ".join(["python -m bench.report", *names, "--update", *pages, *docs])

    def fragment(self, name: str, page: Path) -> str:
        """What stands between the markers of ``name`` in ``page``.

        Raises:
            ValueError: there is no such fragment.
        """
        if name in FIGURE_PARTS:
            lines = self._picture(FIGURE_PARTS[name], _relative(self.docs, page.parent))
        elif name == "machine":
            lines = machines(self.devices)
        elif name == "headline":
            lines = [line for rows in self.devices.values() for line in tables.headline(rows)] or ["Not measured."]
        elif part := (PARTS | _ON_PAGES).get(name):
            lines = section(part, self.devices)
        else:
            raise ValueError(f"{page}: no fragment {name!r}; there are {', '.join(FRAGMENTS)}")
        on = "" if name == "machine" else "Measured on " + "; and on ".join(map(machine, self.devices.values())) + ". "
        return "\n".join([*lines, "", f"{on}Written by `{self.command()}`."])

    def _picture(self, name: str, folder: str) -> Lines:
        words = figures.FIGURES[name][1]
        if self.drawing(name) is None:
            return [f"{words}: not measured."]
        return [f"![{words}]({'' if folder == '.' else f'{folder}/'}bench-{name}.svg)"]

    def draw(self, folder: Path, names: Iterable[str]) -> list[Path]:
        """Writes those of some figures that were measured into a folder; returns their paths."""
        drawings = {folder / f"bench-{name}.svg": found for name in names if (found := self.drawing(name)) is not None}
        for path, drawing in drawings.items():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, drawing)
        return list(drawings)

    def update(self) -> list[Path]:
        """Writes the fragments of all pages and the figures that these show; returns what was written.

        Raises:
            ValueError: a page has no markers, or there are rows of ``bench.host`` alone, which no page shows.
        """
        if not self.devices:
            raise ValueError("all rows are of bench.host, which no fragment of a page shows; leave --update out")
        texts = {page: self.updated(page, page.read_text(encoding="utf-8")) for page in self.pages}
        shown = {name for page, text in texts.items() for name in fragments_of(page, text)}
        drawn = self.draw(self.docs, [name for fragment, name in FIGURE_PARTS.items() if fragment in shown])
        for page, text in texts.items():
            write_text(page, text)
        return [*self.pages, *drawn]

    def updated(self, page: Path, text: str) -> str:
        """The text of a page with its fragments written anew.

        Raises:
            ValueError: it has no markers, or they do not match.
        """
        return filled(page, text, lambda name: self.fragment(name, page))

    def markdown(self, folder: Path | None) -> str:
        """The whole report; its figures are written into ``folder``, and linked, where one is given."""
        lines = ["# Benchmarks", ""]
        if self.devices:
            lines += [*machines(self.devices), "", _SPEED, ""]
            lines += [_TWO_TIMES, ""] if any(map(has_device_time, self.rows)) else []
        if self.devices and folder is not None:
            self.draw(folder, figures.FIGURES)
            for name, (_, words) in figures.FIGURES.items():
                lines += [f"## {words}", "", *self._picture(name, "."), ""]
        for part in PARTS.values() if self.devices else ():
            if part.kind != "probe" or of_kind(self.rows, "probe"):
                lines += [f"## {part.title}", "", *section(part, self.devices), ""]
        lines += ["## The host, without a GPU", "", _HOST, ""] if self.hosts else []
        for rows in self.hosts.values():
            lines += [f"* {machine(rows)}", "", *tables.host(rows), ""]
        if self.devices:
            lines += ["## Two runs of the same", "", tables.agreement(self.rows), ""]
        others = sorted({str(row["kind"]) for row in self.rows} - set(KINDS))
        return "\n".join(
            [*lines, *([f"Rows of these kinds are not shown: {', '.join(others)}.", ""] if others else [])]
        )


def _relative(path: Path, to: Path) -> str:
    return Path(os.path.relpath(path.resolve(), to.resolve())).as_posix()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("files", nargs="+", type=Path, metavar="FILE", help="result files, JSON lines")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="write report.md and its figures there")
    pages = f"Markdown files to write fragments into: {', '.join(FRAGMENTS)}"
    made.add_argument("--update", nargs="+", type=Path, default=[], metavar="PAGE", help=pages)
    made.add_argument("--docs", type=Path, default=ROOT / "docs", help="where figures of pages go (default: docs/)")
    return made


def main(arguments: Iterable[str] | None = None) -> int:
    """The command; returns the exit status."""
    args = parser().parse_args(None if arguments is None else list(arguments))
    try:
        report = Report(args.files, args.update, args.docs)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            write_text(args.out / "report.md", report.markdown(args.out))
            if report.devices:
                print(f"{PARTS['targets'].title}\n")
                print("\n".join(section(PARTS["targets"], report.devices)))
            print(f"\nwritten: {args.out / 'report.md'}")
        if report.pages:
            print("written:", ", ".join(str(path) for path in report.update()))
        if args.out is None and not report.pages:
            print(report.markdown(None))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
