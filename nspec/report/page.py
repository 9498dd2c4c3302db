"""Builds the report page of a run: one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nspec import analysis
from nspec.analysis.blocks import block_order
from nspec.files import write_text
from nspec.report import published, words
from nspec.report.cells import main_groups, score_cell
from nspec.report.run_data import METRICS, RunData, load_run
from nspec.report.sections import masks as figures
from nspec.report.sections.averages import level_section, transfer_section
from nspec.report.sections.group_tables import family_section
from nspec.report.sections.heads import head_section
from nspec.report.sections.relations import relation_section
from nspec.report.sections.training import cost_rows
from nspec.report.sections.variants import ablation_section
from nspec.report.tables import write_overlap, write_scores

TEMPLATES = Path(__file__).parent / "templates"
_SAMPLES = 40  # directions of which a translated sentence is shown


def build_report(run: Path) -> Path:
    """Writes ``report/index.html``, ``scores.tsv`` and, where there are masks, ``density.tsv`` and ``iou.tsv``.

    A run that is not finished gets a page too, which says what is missing. The same run gives the same bytes.

    Args:
        run: a run folder.

    Returns:
        The path of the page.

    Raises:
        ValueError: ``run`` is no run folder, or a file in it is broken; nothing is written then.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    data = load_run(Path(run))
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.filters["group_name"] = words.group_name
    html = environment.get_template("report.html.j2").render(context(data))
    folder = data.folder / "report"
    write_scores(data.scored, data.tasks, folder / "scores.tsv")
    if data.masks is not None:
        write_overlap(data, folder)
    write_text(folder / "index.html", html)
    return folder / "index.html"


def context(data: RunData) -> dict[str, Any]:
    """All that the template shows, as plain values."""
    return {
        "name": data.folder.resolve().name,
        "headline": words.headline(data),
        "setup": words.setup_sentence(data),
        "findings": [
            {"system": data.name(name), "colour": figures.css_colour(name, list(data.systems)), "text": text}
            for name in data.systems
            if (text := words.finding(data, name))
        ],
        "missing": data.missing,
        "baseline": words.in_sentence(data.name(data.baseline)),
        "systems": _systems(data),
        "groups": main_groups(data),
        "averages": _averages(data),
        "directions": [_directions(data, metric) for metric in METRICS] if data.scored else [],
        "signatures": _signatures(data),
        "warnings": _warnings(data),
        "bleu": data.metric_names["bleu"],
        "masks": _masks(data),
        "loss": _loss(data),
        "speed": _speed(data),
        "costs": cost_rows(data),
        "levels": level_section(data) if data.scored else None,
        "families": family_section(data) if data.scored else None,
        "transfer": transfer_section(data),
        "ablations": ablation_section(data),
        "relations": relation_section(data),
        "heads": head_section(data),
        "test_sentence": words.test_sentence(data),
        "two_sided": words.two_sided(data),
        "samples": _samples(data),
        "stages": [_stage(record) for record in data.stages],
        "versions": _versions(data),
        "config": data.config_text,
        "bootstrap": data.config.score.bootstrap,
        "k": data.config.select.k,
        "pivot": data.pivot,
        "smoothing": data.config.train.label_smoothing,
    }


def _systems(data: RunData) -> list[dict[str, Any]]:
    return [
        {
            "id": name,
            "name": data.name(name),
            "meaning": _meaning(data, name),
            "colour": figures.css_colour(name, list(data.systems)),
        }
        for name in data.systems
    ]


def _meaning(data: RunData, name: str) -> str:
    if name in data.variants:
        return f"a variant of {words.in_sentence(words.system_name(data.base_of(name)))}, with other options"
    return words.SYSTEMS.get(name, ("", ""))[1]


def _averages(data: RunData) -> list[dict[str, Any]]:
    """A row for every system: average scores over all directions, and BLEU and chrF++ by side of the pivot."""
    rows = []
    groups = main_groups(data)
    entries = {name: scores["average"] for name, scores in data.scored.items()}
    for name in data.systems:
        cells = {}
        for group in groups:
            for metric in METRICS:
                present = [entry[group][metric] for entry in entries.values() if group in entry]
                best = max(present) if len(present) > 1 else None
                about = f"{data.name(name)}, average of {words.group_name(group)}"
                cells[f"{group} {metric}"] = score_cell(data, entries.get(name, {}).get(group), metric, best, about)
        rows.append({"id": name, "name": data.name(name), "cells": cells, "is_baseline": name == data.baseline})
    return rows


def _directions(data: RunData, metric: str) -> dict[str, Any]:
    """The table of one metric: a row for every direction, a column for every scored system."""
    rows = []
    names = list(data.scored)
    several = len(names) > 1
    for task in data.tasks:
        entries = {name: data.scored[name]["tasks"].get(task) for name in names}
        present = [entry[metric] for entry in entries.values() if entry]
        if not present:
            continue
        best = max(present) if several else None
        cells = [score_cell(data, entries[name], metric, best, f"{task}, {data.name(name)}") for name in names]
        sentences = next(entry["sentences"] for entry in entries.values() if entry)
        rows.append({"task": task, "sentences": words.count(sentences), "cells": cells})
    heads = [
        {"name": data.short(name), "title": data.name(name), "is_baseline": name == data.baseline} for name in names
    ]
    return {"metric": data.metric_names[metric], "heads": heads, "rows": rows}


def _signatures(data: RunData) -> list[dict[str, str]]:
    """Every signature that occurs, with the directions that it belongs to where they are not all."""
    found: dict[tuple[str, str], set[str]] = {}
    for scores in data.scored.values():
        for task, entry in scores["tasks"].items():
            for metric in METRICS:
                found.setdefault((metric, entry[f"{metric}_signature"]), set()).add(task)
    return [
        {
            "metric": data.metric_names[metric],
            "text": text,
            "tasks": "" if len(tasks) == len(data.tasks) else ", ".join(t for t in data.tasks if t in tasks),
        }
        for (metric, text), tasks in found.items()
    ]


def _warnings(data: RunData) -> list[dict[str, str]]:
    """What was warned of while scoring, with the systems and directions that it is said of."""
    found: dict[str, list[str]] = {}
    for name, scores in data.scored.items():
        for warning in scores.get("warnings", ()):
            found.setdefault(warning["text"], []).append(f"{data.short(name)}: {', '.join(warning['directions'])}")
    return [{"text": text, "where": "; ".join(where)} for text, where in found.items()]


def _masks(data: RunData) -> dict[str, Any] | None:
    """Figures and numbers about the masks; None where there are none."""
    if data.masks is None:
        return None
    tasks, blocks = block_order(data.masks.tasks, data.pivot)
    shares = analysis.density(data.masks, tasks=tasks)
    heats = []
    for side in figures.SIDES if len(tasks) > 1 else ():
        layers = analysis.side_layers(data.masks, side)
        if layers:
            iou = analysis.mean_pairwise(analysis.layer_iou(data.masks, layers, tasks)).mean()
            sizes = [analysis.density(data.masks, [layer], tasks)[:, 0] for layer in layers]
            chance = sum(float(analysis.mean_pairwise(analysis.chance_iou(size))) for size in sizes) / len(sizes)
            svg = figures.draw(f"heat_{side}", data)
            heats.append({"side": side, "svg": svg, "mean": f"{iou:.3f}", "chance": f"{chance:.3f}"})
    return {
        "masked": figures.draw("masked", data),
        "published": bool(data.pivot),
        "source": published.SOURCE,
        "blocks": len({block.name for block in blocks}) > 1,
        "published_iou": figures.draw("published_iou", data) if data.pivot and len(tasks) > 1 else "",
        "published_iou_k": f"{published.IOU_K:g}",
        "mean": f"{shares.mean():.3f}",
        "low": f"{shares.min():.3f}",
        "high": f"{shares.max():.3f}",
        "heats": heats,
        "wide": len(tasks) > 20,
        "iou": figures.draw("mean_iou", data) if heats else "",
    }


def _loss(data: RunData) -> str:
    dense = data.systems.get("dense")
    if not figures.continued_systems(data) and not (dense and (dense.training or dense.validation)):
        return ""
    return figures.draw("loss", data)


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
        decoding = (data.systems[name].scores or {}).get("seconds")
        hardware.setdefault(_hardware(summary), []).append(data.name(name))
        rows.append(
            {
                "name": data.name(name),
                "colour": figures.css_colour(name, list(data.systems)),
                "speed": words.count(speed) if speed else "–",
                "share": round(100 * speed / top, 1) if speed and top else 0,
                "relative": f"{speed / compared:.2f}×" if speed and compared else "–",
                "decoding": words.duration(decoding) if isinstance(decoding, (int, float)) else "–",
                "best": _best(summary),
            }
        )
    lines = [what if len(hardware) == 1 else f"{', '.join(names)}: {what}" for what, names in hardware.items()]
    return {"rows": rows, "base": words.in_sentence(words.system_name(base)), "hardware": lines}


def _hardware(summary: dict[str, Any]) -> str:
    parts = [str(summary.get("device", "unknown device")), f"{summary.get('precision', 'unknown')} precision"]
    if summary.get("threads"):
        parts.append(f"{summary['threads']} CPU threads")
    if summary.get("parameters"):
        parts.append(f"{words.count(summary['parameters'])} parameters")
    return ", ".join(parts)


def _best(summary: dict[str, Any]) -> str:
    value, metric, step = (summary.get(f"best_{key}") for key in ("value", "metric", "step"))
    return f"{metric} {value:.4g} at update {step}" if isinstance(value, (int, float)) else "–"


def _samples(data: RunData) -> list[dict[str, Any]]:
    """The first test sentence of each direction with every system's translation, where the texts are there."""
    samples = []
    for task in data.tasks[:_SAMPLES]:
        source, _, target = task.partition("-")
        pair = "-".join(sorted((source, target)))
        text = data.folder / "prepared" / "text" / "test"
        lines = [("source", _first_line(text / f"{pair}.{source}.txt"), source)]
        lines.append(("reference", _first_line(text / f"{pair}.{target}.txt"), target))
        for name in data.scored:
            said = _first_line(data.folder / "scores" / name / f"{task}.hyp.txt")
            lines.append((data.name(name), said, target))
        if all(said is not None for _, said, _ in lines[:2]):
            rows = [{"who": who, "said": said, "lang": lang} for who, said, lang in lines if said is not None]
            samples.append({"task": task, "rows": rows})
    return samples


def _first_line(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline().rstrip("\n")


def _stage(record: dict[str, Any]) -> dict[str, Any]:
    inputs = record.get("inputs") if isinstance(record.get("inputs"), dict) else {}
    seconds = record.get("seconds")
    return {
        "name": record.get("stage", "?"),
        "folder": record["folder"],
        "seconds": words.duration(seconds) if isinstance(seconds, (int, float)) else "–",
        "inputs": [{"name": name, "short": str(sha)[:12], "sha": str(sha)} for name, sha in (inputs or {}).items()],
    }


def _versions(data: RunData) -> list[dict[str, str]]:
    """Versions of software, each with the stages that used it where stages differ."""
    found: dict[tuple[str, str], list[str]] = {}
    recorded = [record for record in data.stages if isinstance(record.get("versions"), dict)]
    for record in recorded:
        for package, version in record["versions"].items():
            found.setdefault((package, str(version)), []).append(str(record.get("stage", record["folder"])))
    return [
        {"package": package, "version": version, "stages": "" if len(stages) == len(recorded) else ", ".join(stages)}
        for (package, version), stages in found.items()
    ]
