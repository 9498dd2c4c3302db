"""The page of a run of fine-tuning: what each method gained in a language, and what it cost the others.

Changes of perplexity are ``exp(difference of mean losses) - 1``, and averages of them are taken of the differences, so that
halving and doubling cancel.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspec.files import read_json, write_json, write_text
from nspec.report import drawing, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

TEMPLATES = Path(__file__).parent / "templates"

NAMES = {
    "lape": "Neurons, LAPE",
    "specific": "Neurons, most specific",
    "top": "Neurons, most active",
    "share": "Neurons, share of activations",
    "random": "Neurons, random",
    "lora": "LoRA",
    "full": "Full fine-tuning",
}
_COLOURS = {
    "lape": "#0072b2",
    "specific": "#009e73",
    "top": "#56b4e9",
    "share": "#7f7fd0",
    "random": "#cc79a7",
    "lora": "#e69f00",
    "full": "#8c8c8c",
}
_FILES = "tuned/*/*/result.json"


@dataclass(frozen=True)
class Tuned:
    """The fine-tunings of a run.

    Attributes:
        folder: of the run.
        base: facts of the model that all start from.
        before: loss, tokens and perplexity of the base by language.
        results: what is in ``result.json``, by method and language.
        languages: in the order of the run.
    """

    folder: Path
    base: dict[str, Any]
    before: dict[str, dict[str, float]]
    results: dict[str, dict[str, dict[str, Any]]]
    languages: list[str]

    def change(self, method: str, trained: str, tested: str) -> float:
        """Difference of mean losses from the base, nats a token."""
        return float(self.results[method][trained]["perplexity"][tested]["loss"] - self.before[tested]["loss"])

    def own(self, method: str) -> dict[str, float]:
        """The change on the language that was trained, by language."""
        return {code: self.change(method, code, code) for code in self.results[method]}

    def others(self, method: str) -> dict[str, float]:
        """The mean change on the other languages, by language that was trained."""
        return {
            code: statistics.mean(self.change(method, code, other) for other in self.languages if other != code)
            for code in self.results[method]
            if len(self.languages) > 1
        }


def load(folder: Path) -> Tuned:
    """What a run folder holds.

    Raises:
        ValueError: a file is broken, or no fine-tuning is there yet.
    """
    before = read_json(folder / "base_perplexity" / "result.json")["perplexity"]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in folder.glob(_FILES):
        result = read_json(path)
        found.setdefault(result["method"], {})[result["language"]] = result
    if not found:
        raise ValueError(f"{folder} has no finished fine-tuning yet")
    languages = list(before)
    results = {
        method: {code: found[method][code] for code in languages if code in found[method]}
        for method in NAMES
        if method in found
    }
    return Tuned(folder, read_json(folder / "base" / "base.json"), before, results, languages)


def percent(difference: float) -> str:
    """A difference of losses as a change of perplexity: ``−12.3 %``."""
    value = 100 * math.expm1(min(difference, 50.0))
    return f"{value:+.1f} %".replace("-", "−")


def build_report(folder: Path) -> Path:
    """Writes ``report/index.html``, ``perplexity.tsv`` and ``perplexity.json``.

    Returns:
        The path of the page.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    data = load(folder)
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    html = environment.get_template("finetuned.html.j2").render(_context(data))
    out = folder / "report"
    write_text(out / "perplexity.tsv", _tsv(data))
    write_json(
        out / "perplexity.json",
        {
            "unit": "perplexity is exp(loss), loss the mean cross-entropy of a held-out token in nats",
            "base": data.base | {"perplexity": data.before},
            "fine-tuned": [result for of in data.results.values() for result in of.values()],
        },
    )
    write_text(out / "index.html", html)
    return out / "index.html"


def summary_table(folder: Path) -> Table:
    """A row for each method, for a terminal."""
    from rich.table import Table

    data = load(folder)
    table = Table(title="perplexity on held-out text against the base, mean over languages (less is better)")
    for head in ("method", "trained", "own language", "other languages", "saved", "tokens/s"):
        table.add_column(head, justify="left" if head == "method" else "right")
    for row in _rows(data):
        table.add_row(
            row["name"], f"{row['trained']} ({row['part']})", *(row[key] for key in ("own", "others", "bytes", "speed"))
        )
    return table


def _context(data: Tuned) -> dict[str, Any]:
    rows = _rows(data)
    best = min(rows, key=lambda row: row["own_loss"])
    return {
        "name": data.folder.resolve().name,
        "headline": _headline(rows, best),
        "setup": _setup(data),
        "picture": drawing.render(
            _picture, "Change of perplexity by method, on the language trained and on the others", "change", data
        ),
        "rows": rows,
        "peaks": any(row["peak"] != "–" for row in rows),
        "languages": data.languages,
        "before": [{"code": code, **_cell(entry, 0.0)} for code, entry in data.before.items()],
        "matrices": [_matrix(data, method) for method in data.results],
        "several": len(data.languages) > 1,
        "config": (data.folder / "config.yaml").read_text(encoding="utf-8"),
    }


def _headline(rows: list[dict[str, Any]], best: dict[str, Any]) -> str:
    said = f"{best['name']} gains most in the language trained: {best['own']} perplexity on average"
    if best["others"] != "–":
        kindest = min(rows, key=lambda row: row["others_loss"])
        said += f", and {best['others']} in the others"
        if kindest is not best:
            said += (
                f". {kindest['name']} is kindest to the others: {kindest['others']}, with {kindest['own']} in its own"
            )
    return said + "."


def _setup(data: Tuned) -> str:
    base, tokens = data.base, sum(int(entry["tokens"]) for entry in data.before.values())
    what = "a new model" if base["new"] else base["name"]
    return (
        f"{len(data.languages)} languages ({', '.join(data.languages)}). Base: {what} ({base['kind']}), "
        f"{words.count(base['parameters'])} parameters. Each method starts from it for each language. Perplexity on "
        f"{words.count(tokens)} held-out tokens; it depends on the tokenizer, so it compares models and not languages."
    )


def _rows(data: Tuned) -> list[dict[str, Any]]:
    rows = []
    for method, of in data.results.items():
        trained = statistics.mean(result["trained"] for result in of.values())
        own, others = statistics.mean(data.own(method).values()), list(data.others(method).values())
        kept = statistics.mean(others) if others else math.inf
        timed = [result for result in of.values() if result["seconds"]]
        speed = sum(r["tokens"] for r in timed) / sum(r["seconds"] for r in timed) if timed else 0
        neurons = [result["neurons"] for result in of.values() if result["neurons"] is not None]
        peak = max(result["peak_bytes"] for result in of.values())
        rows.append(
            {
                "name": NAMES[method],
                "colour": drawing.css(_COLOURS[method]),
                "neurons": words.count(round(statistics.mean(neurons))) if neurons else "–",
                "trained": words.count(round(trained)),
                "part": f"{trained / data.base['parameters']:.2%}",
                "own": percent(own),
                "own_loss": own,
                "others": percent(kept) if others else "–",
                "others_loss": kept,
                "worst": percent(max(others)) if others else "–",
                "bytes": _bytes(statistics.mean(result["bytes"] for result in of.values())),
                "speed": words.count(round(speed)) if speed else "–",
                "peak": _bytes(peak) if peak else "–",
                "empty": [code for code, result in of.items() if not result["trained"]],
            }
        )
    return rows


def _matrix(data: Tuned, method: str) -> dict[str, Any]:
    lines = []
    for code, result in data.results[method].items():
        cells = [
            {"own": other == code, **_cell(result["perplexity"][other], data.change(method, code, other))}
            for other in data.languages
        ]
        lines.append({"code": code, "neurons": result["neurons"], "cells": cells})
    return {"name": NAMES[method], "lines": lines}


def _cell(entry: dict[str, float], change: float) -> dict[str, str]:
    """A perplexity, its change, and how strongly it is tinted: fully where it changed by a factor of 1.5."""
    value = entry["perplexity"]
    strength = min(1.0, abs(change) / math.log(1.5))
    return {
        "value": f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}",
        "change": percent(change),
        "tint": f"color-mix(in srgb, var(--{'down' if change > 0 else 'up'}) {45 * strength:.0f}%, transparent)",
        "tokens": words.count(int(entry["tokens"])),
    }


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError


def _tsv(data: Tuned) -> str:
    heads = (
        "method",
        "trained_on",
        "tested_on",
        "trained_numbers",
        "tokens",
        "loss_nats",
        "perplexity",
        "base_perplexity",
        "change",
    )
    lines = ["\t".join(heads)]
    for method, of in data.results.items():
        for code, result in of.items():
            for other, entry in result["perplexity"].items():
                values = (
                    *(method, code, other, result["trained"], entry["tokens"], f"{entry['loss']:.6f}"),
                    *(f"{entry['perplexity']:.6g}", f"{data.before[other]['perplexity']:.6g}"),
                    f"{math.expm1(min(data.change(method, code, other), 50.0)):.6f}",
                )
                lines.append("\t".join(map(str, values)))
    return "\n".join(lines) + "\n"


def _picture(data: Tuned) -> Figure:
    """A line for each method: a dot for each language, and a larger one for their mean."""
    shown = [("own", "the language trained"), ("others", "the other languages")][: 2 if len(data.languages) > 1 else 1]
    figure, panels = drawing.new_figure(10.4, 1.1 + 0.42 * len(data.results), len(shown), sharey=True)
    methods = list(data.results)[::-1]
    for axes, (whose, title) in zip(panels, shown):
        drawing.style(axes, "change of perplexity, % (left: better)", "", title.capitalize(), lines="both")
        for place, method in enumerate(methods):
            values = [100 * math.expm1(min(value, 50.0)) for value in getattr(data, whose)(method).values()]
            mean = 100 * math.expm1(min(statistics.mean(getattr(data, whose)(method).values()), 50.0))
            axes.scatter(values, [place] * len(values), color=_COLOURS[method], s=18, alpha=0.45, linewidths=0)
            axes.scatter([mean], [place], color=_COLOURS[method], s=95, zorder=3)
        axes.axvline(0, color=drawing.INK, linewidth=0.9)
        axes.set_yticks(range(len(methods)), [NAMES[method] for method in methods])
        axes.set_ylim(-0.6, len(methods) - 0.4)
    return figure
