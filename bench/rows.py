"""Result files: JSON lines, one measured row each, stamped with the machine. Reading, writing, printing.

Every row has ``kind`` (``operator``, ``absent``, ``ceiling``, ``step``, ``tasks``, ``profiling``, ``probe``) and the fields
of :func:`bench.machine.stamp`. Times are in milliseconds, memory in bytes; ``low`` and ``high`` are the ends of the middle
80 % of the rounds. Rows of a GPU may have ``device_...`` beside them, the same of the kernels alone (``bench/timing.py``).
"""

from __future__ import annotations

import json
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
    """Appends stamped rows to a file, each complete on disk before the next is measured; without a file it only stamps."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self._path, self._device = path, device
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, row: Mapping[str, Any]) -> Row:
        """Writes and returns the row with its stamp."""
        whole = {**row, **stamp(self._device)}
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(whole) + "\n")
        return whole


def read(paths: Iterable[Path]) -> list[Row]:
    """The rows of some files, in order.

    Raises:
        ValueError: a line that is no row, named by file and number.
    """
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
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
