"""What each system costs, beside what it scores."""

from __future__ import annotations

from typing import Any

from nspec.report import words
from nspec.report.run_data import METRICS, RunData

MISSING = "–"
_UNITS = ("B", "kB", "MB", "GB", "TB")


def cost_rows(data: RunData) -> list[dict[str, Any]]:
    """A row of texts for every trained system; what its summary does not say (older runs) is a dash."""
    rows = []
    for name, system in data.systems.items():
        if not system.summary:
            continue
        summary = system.summary
        average = system.scores["average"]["all"] if system.scores else {}
        row: dict[str, Any] = {metric: f"{average[metric]:.2f}" if average else MISSING for metric in METRICS}
        row |= {
            key: _count(summary.get(key)) for key in ("parameters_added", "parameters_trained", "updates", "tokens")
        }
        row |= {"name": data.name(name), "id": name, "is_baseline": name == data.baseline}
        row |= {"masks": size(summary.get("mask_bytes")), "speed": _count(summary.get("tokens_per_second"))}
        seconds = summary.get("train_seconds")
        row["seconds"] = MISSING if seconds is None else words.duration(seconds)
        row["density"] = density(summary)
        rows.append(row)
    return rows


def density(summary: dict[str, Any]) -> str:
    """The mean density of a system; 1, all neurons, where it says that it has no masks."""
    if "density" not in summary:
        return MISSING
    value = summary["density"]
    return "1" if value is None else f"{value:.3f}" if _number(value) else MISSING


def size(value: Any) -> str:
    """Bytes as a reader says them, in decimal units: ``0 B``, ``960 B``, ``1.23 MB``."""
    if not _number(value):
        return MISSING
    unit = 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count(value: Any) -> str:
    return words.count(value) if _number(value) else MISSING
