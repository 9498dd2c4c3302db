"""Result files: JSON lines, one measured row each, stamped with the machine. Reading, writing, printing.

Every row has ``kind`` (``operator``, ``absent``, ``ceiling``, ``step``, ``tasks``, ``profiling``, ``probe``, ``host``)
and the fields of :func:`bench.machine.stamp`. Times are in milliseconds, memory in bytes; ``low`` and ``high`` are the
ends of the middle 80 % of the rounds. Rows of a GPU may have ``device_...`` beside them, the same of the kernels alone
(``bench/timing.py``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.machine import stamp
from bench.timing import Spread

Row = dict[str, Any]


def timing_fields(milliseconds: Spread, speedup: Spread, rounds: int, prefix: str = "") -> Row:
    """The fields of a time and of its ratio to the baseline's; with the prefix ``device_`` those of the device time."""
    fields: Row = {f"{prefix}rounds": rounds}
    for name, value in ((f"{prefix}milliseconds", milliseconds), (f"{prefix}speedup", speedup)):
        fields[name] = round(value.median, 4)
        fields[name + "_low"], fields[name + "_high"] = round(value.low, 4), round(value.high, 4)
    return fields


class Writer:
    """Appends stamped rows to a file, each complete on disk before the next is measured; without a file it only stamps.

    A last line that a killed process has left half written is taken off first, with a warning: it is no row, and the next
    row would be lost behind it.
    """

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self._path, self._device = path, device
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _mend(path)

    def __call__(self, row: Mapping[str, Any]) -> Row:
        """Writes and returns the row with its stamp."""
        whole = {**row, **stamp(self._device)}
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(whole) + "\n")
        return whole


def torn(text: str) -> bool:
    """Whether the last line is the beginning of a row, as a process leaves it that is killed while it writes."""
    last = text[text.rfind("\n") + 1 :]
    if not last.startswith("{"):
        return False
    try:
        json.loads(last)
    except json.JSONDecodeError:
        return True
    return False


def _mend(path: Path) -> None:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if torn(text):
        _warn(path, len(text.splitlines()), "taken off")
        with open(path, "r+b") as file:
            file.truncate(len(text[: text.rfind("\n") + 1].encode()))
    elif text and not text.endswith("\n"):
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n")


def _warn(path: Path, number: int, done: str) -> None:
    said = "is cut short, as by a process that was killed while it wrote"
    print(f"warning: {path}, line {number} {said}; {done}", file=sys.stderr, flush=True)


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of some files, in order; a last line that was cut short is left out, with a warning.

    Raises:
        ValueError: a line that is no row, named by file and number.
    """
    rows = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        if torn(text):
            _warn(path, len(lines), "left out")
            lines.pop()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); expected one row a line") from None
            if not isinstance(row, dict) or "kind" not in row:
                raise ValueError(f"{path}, line {number}: a row without `kind`; was it written by this suite?")
            rows.append(row)
    return rows


def figure(row: Mapping[str, Any], prefix: str = "") -> str:
    """``1.63x [1.60, 1.66]``: a row's speed-up over the baseline with its spread; ``device_`` for that of the device."""
    median, low, high = (row[f"{prefix}speedup{end}"] for end in ("", "_low", "_high"))
    return f"{median:.2f}x [{low:.2f}, {high:.2f}]"
