"""Builds the report page of a run: one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nspec.files import write_text
from nspec.mt.languages import languages_of_task
from nspec.report import drawing, losses, words
from nspec.report.run_data import RunData, load_run
from nspec.report.sections import averages, findings, heads, masks, relations, scores, training, variants
from nspec.report.tables import write_overlap, write_scores

SECTIONS = (findings, scores, averages, training, losses, variants, masks, relations, heads)
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
    """All that the templates show, as plain values: what each section gives under its name, and what all share."""
    parts = {module.__name__.rpartition(".")[2]: module.section(data) for module in SECTIONS}
    return parts | {
        "name": data.folder.resolve().name,
        "missing": data.missing,
        "baseline": words.in_sentence(data.name(data.baseline)),
        "bleu": data.metric_names["bleu"],
        "pivot": data.pivot,
        "systems": [_term(data, name) for name in data.systems],
        "samples": _samples(data),
        "stages": [_stage(record) for record in data.stages],
        "versions": _versions(data),
        "config": data.config_text,
    }


def _term(data: RunData, name: str) -> dict[str, str]:
    meaning = words.SYSTEMS.get(name, ("", ""))[1]
    if name in data.variants:
        meaning = f"a variant of {words.in_sentence(words.system_name(data.base_of(name)))}, with other options"
    return {"name": data.name(name), "meaning": meaning, "colour": drawing.css_colour(name, list(data.systems))}


def _samples(data: RunData) -> list[dict[str, Any]]:
    """The first test sentence of each direction with every system's translation, where the texts are there."""
    samples = []
    for task in data.tasks[:_SAMPLES]:
        source, target = languages_of_task(task)
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
