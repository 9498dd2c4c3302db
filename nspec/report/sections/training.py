"""What each system costs, beside what it scores; its loss and its speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nspec.report import drawing, words
from nspec.report.run_data import RunData, SystemData
from nspec.report.words import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "–"
_UNITS = ("B", "kB", "MB", "GB", "TB")
_POINTS = 200  # of a training curve; a longer log is averaged down to these


def section(data: RunData) -> dict[str, Any]:
    """``costs``, ``loss`` (a figure, empty before anything has been trained), ``speed`` and ``smoothing``."""
    dense = data.systems.get("dense")
    trained = continued_systems(data) or (dense and (dense.training or dense.validation))
    return {
        "costs": cost_rows(data),
        "loss": drawing.render(loss, "Training and validation loss", "loss", data) if trained else "",
        "speed": _speed(data),
        "smoothing": data.config.train.label_smoothing,
    }


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
        row |= {"seconds": _duration(summary.get("train_seconds")), "density": density(summary)}
        rows.append(row)
    return rows


def density(summary: dict[str, Any]) -> str:
    """The mean density of a system; 1, all neurons, where it says that it has no masks."""
    if "density" not in summary:
        return MISSING
    return "1" if summary["density"] is None else f"{summary['density']:.3f}"


def size(value: float | None) -> str:
    """Bytes as a reader says them, in decimal units: ``0 B``, ``960 B``, ``1.23 MB``."""
    if value is None:
        return MISSING
    unit = 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def _count(value: float | None) -> str:
    return MISSING if value is None else words.count(value)


def _duration(value: Any) -> str:
    return words.duration(value) if isinstance(value, (int, float)) else MISSING


def loss(data: RunData) -> Figure:
    """Dense; then training and validation of everything that continues from it, apart because their scales are."""
    names = list(data.systems)
    dense = data.systems.get("dense", SystemData("dense"))
    continued = [data.systems[name] for name in continued_systems(data)]
    figure, panels = drawing.new_figure(10.4, 3.4, 3 if continued else 1)
    tint = drawing.colour("dense", names)
    drawing.style(panels[0], "updates", "loss, nats per target token", "Dense")
    _training(panels[0], dense, tint, "training")
    _validation(panels[0], dense, tint, "validation")
    if dense.training or dense.validation:
        panels[0].legend(fontsize=8.5)
    if continued:
        drawing.style(panels[1], "updates after dense", "", "Continued: training")
        drawing.style(panels[2], "updates after dense", "", "Continued: validation")
        for system in continued:
            _training(panels[1], system, drawing.colour(system.name, names), data.short(system.name))
            _validation(panels[2], system, drawing.colour(system.name, names), data.short(system.name))
        if dense.validation:
            best = min(line["valid_loss"] for line in dense.validation)
            panels[2].axhline(best, color=tint, ls=(0, (4, 3)), lw=1.2, label="dense, its best validation")
        shown = _legend(list(panels[1:]))
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(len(shown), 5), fontsize=8.5)
    for axes in panels:
        axes.set_xlim(left=0)
    return figure


def continued_systems(data: RunData) -> list[str]:
    """Systems that go on from dense as one model, so that their losses compare; a model for each direction does not."""
    return [
        name
        for name, system in data.systems.items()
        if name != "dense"
        and data.base_of(name) not in ("finetuned", "bilingual")
        and (system.training or system.validation)
    ]


def _legend(panels: Sequence[Axes]) -> dict[str, Any]:
    """Label -> line over several panels; where a label is in more than one, the last panel's line stands for it."""
    return {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels())}


def _training(axes: Axes, system: SystemData, tint: str, label: str) -> None:
    """Training loss as a thin line; of a long log, means over equal pieces."""
    if system.training:
        points = np.array([(line["step"], line["loss"]) for line in system.training], dtype=float)
        means = [piece.mean(0) for piece in np.array_split(points, min(len(points), _POINTS))]
        axes.plot(*np.transpose(means), color=tint, linewidth=1.0, label=label)


def _validation(axes: Axes, system: SystemData, tint: str, label: str) -> None:
    """Validation loss as a strong line with a marker for every measurement."""
    if system.validation:
        x, y = zip(*((line["step"], line["valid_loss"]) for line in system.validation))
        marker = drawing.MARKERS.get(system.name, "P")
        axes.plot(x, y, color=tint, label=label, marker=marker, markersize=4, linewidth=1.8)


def _speed(data: RunData) -> dict[str, Any]:
    """A row for every trained system, with its speed as a bar; and what the systems ran on."""
    trained = {name: system.summary for name, system in data.systems.items() if system.summary}
    speeds = {name: summary.get("tokens_per_second") for name, summary in trained.items()}
    top = max((speed for speed in speeds.values() if speed), default=None)
    base = "continued" if speeds.get("continued") else "dense"
    rows = []
    hardware: dict[str, list[str]] = {}
    for name, summary in trained.items():
        speed, compared = speeds[name], speeds.get(base)
        hardware.setdefault(_hardware(summary), []).append(data.name(name))
        rows.append(
            {
                "name": data.name(name),
                "colour": drawing.css_colour(name, list(data.systems)),
                "speed": words.count(speed) if speed else MISSING,
                "share": round(100 * speed / top, 1) if speed and top else 0,
                "relative": f"{speed / compared:.2f}×" if speed and compared else MISSING,
                "decoding": _duration((data.systems[name].scores or {}).get("seconds")),
                "best": _best(summary),
            }
        )
    lines = [what if len(hardware) == 1 else f"{', '.join(names)}: {what}" for what, names in hardware.items()]
    return {
        "rows": rows,
        "base": words.in_sentence(words.system_name(base)),
        "hardware": lines,
        "engines": " and ".join(
            dict.fromkeys(_engine(system.scores) for system in data.systems.values() if system.scores)
        ),
    }


def _engine(scores: dict[str, Any]) -> str:
    """What translated, by what a run wrote; older versions had one engine, and did not say so."""
    decode = scores.get("decode")
    name = str(decode.get("engine", "transformers")) if isinstance(decode, dict) else "transformers"
    return {"ctranslate2": "CTranslate2", "transformers": "Transformers"}.get(name, name)


def _hardware(summary: dict[str, Any]) -> str:
    parts = [str(summary.get("device", "unknown device")), f"{summary.get('precision', 'unknown')} precision"]
    if summary.get("threads"):
        parts.append(f"{summary['threads']} CPU threads")
    if summary.get("parameters"):
        parts.append(f"{words.count(summary['parameters'])} parameters")
    return ", ".join(parts)


def _best(summary: dict[str, Any]) -> str:
    value, metric, step = (summary.get(f"best_{key}") for key in ("value", "metric", "step"))
    return f"{metric} {value:.4g} at update {step}" if isinstance(value, (int, float)) else MISSING
