"""Result files: JSON lines, one measured row each, stamped with the machine. Reading, writing, printing.

Every row has ``kind`` (``operator``, ``absent``, ``ceiling``, ``step``, ``tasks``, ``profiling``, ``probe``, ``host``)
and the fields of :func:`bench.machine.stamp`. Times are in milliseconds, memory in bytes; ``low`` and ``high`` are the
ends of the middle 80 % of the rounds. Rows of a GPU may have ``device_...`` beside them, the same of the kernels alone
(``bench/timing.py``).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.machine import stamp
from bench.timing import spread

Row = dict[str, Any]

TIMES = ("milliseconds", "milliseconds_low", "milliseconds_high", "speedup", "speedup_low", "speedup_high")


def timing_fields(base: Sequence[float], own: Sequence[float], prefix: str = "", calls: int = 1) -> Row:
    """The fields of a time and of its ratio to the baseline's, of the rounds in which both are known; of three at least.

    Args:
        base: seconds of the baseline in each round, NaN where it has no figure.
        own: the same of what the row is about.
        prefix: of the fields: ``device_`` for those of the device time.
        calls: of which each is the time of so many.
    """
    both = [(b, o) for b, o in zip(base, own, strict=True) if not math.isnan(b + o)]
    if len(both) < 3:
        return {}
    spreads = spread([1e3 * o / calls for _, o in both]), spread([b / o for b, o in both])
    ends = [round(end, 4) for found in spreads for end in found]
    return {f"{prefix}rounds": len(both)} | {f"{prefix}{name}": end for name, end in zip(TIMES, ends)}


class Writer:
    """Appends stamped rows to a file, each complete on disk before the next is measured; without a file it only stamps.

    A last line that a killed process has left half written is taken off first: the next row would be lost behind it.
    """

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self._path, self._stamp = path, stamp(device)  # of the start: threads may change between rows
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() and (text := path.read_text(encoding="utf-8")):
                path.write_text("".join(f"{line}\n" for line in _whole(path, text)), encoding="utf-8")

    def __call__(self, row: Mapping[str, Any]) -> Row:
        """Writes and returns the row with its stamp."""
        whole = {**row, **self._stamp}
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(whole) + "\n")
        return whole


def _whole(path: Path, text: str) -> list[str]:
    """The lines of a file without a last one that is the beginning of a row, of which it warns."""
    lines = text.splitlines()
    if lines and lines[-1].startswith("{") and not text.endswith("\n"):
        try:
            json.loads(lines[-1])
        except json.JSONDecodeError:
            said = "is cut short, as by a process that was killed while it wrote; left out"
            print(f"warning: {path}, line {len(lines)} {said}", file=sys.stderr, flush=True)
            lines.pop()
    return lines


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of some files, in order; a last line that was cut short is left out, with a warning.

    Raises:
        ValueError: a line that is no row, named by file and number.
    """
    rows = []
    for path in paths:
        for number, line in enumerate(_whole(path, path.read_text(encoding="utf-8")), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); expected one row a line") from None
            if not isinstance(row, dict) or "kind" not in row:
                raise ValueError(f"{path}, line {number}: a row without `kind`; was it written by this suite?")
            rows.append(row)
    return rows


def figure(row: Mapping[str, Any], name: str = "speedup") -> str:
    """``1.63x [1.60, 1.66]``: a row's speed-up over the baseline with its spread, or another ratio."""
    median, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{median:.2f}x [{low:.2f}, {high:.2f}]"


def line(name: str, row: Mapping[str, Any], *more: str) -> str:
    """A row as it is printed when it has been measured: time, speed-up, those of the device, rate, memory, what is more."""
    said = [f"  {name:<40}"]
    if row.get("milliseconds") is not None:
        said.append(f"{row['milliseconds']:9.3f} ms {figure(row):>20}")
    if row.get("device_speedup") is not None:
        said.append(f"device {row['device_milliseconds']:9.3f} ms {figure(row, 'device_speedup'):>20}")
    if row.get("tokens_per_second") is not None:
        said.append(f"{row['tokens_per_second']:8.0f} tokens/s")
    if row.get("peak_bytes") is not None:
        said.append(f"{row['peak_bytes'] / 2**20:8.1f} MiB")
    return "  ".join([*said, *filter(None, more)])
