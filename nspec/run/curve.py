"""Size and speed against quality: a direction with fewer and fewer neurons, without training, on the validation set."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import nspec
from nspec.files import write_json, write_text
from nspec.run.export import loaded, pieces_of, place_of, trained
from nspec.run.systems import config_of, profile_folder, system_of
from nspec.serving.export import Settings, check_absent, new_folder, write

Progress = Callable[[str, int, int], None]
ROUNDS = 3
"""How often each model translates the validation set, in turn with the others: speed is the median of the rounds."""
DENSE = "dense"
_COLUMNS = (
    *("name", "k", "density", "parameters", "bytes", "bleu", "bleu_low", "bleu_high"),
    *("bleu_p", "chrf", "chrf_low", "chrf_high", "chrf_p"),
    *("sentences_per_second", "sentences_per_second_low", "sentences_per_second_high", "speedup", "engine", "threads"),
)


@dataclass(frozen=True)
class SizeQuality:
    """What was measured.

    Attributes:
        folder: with ``curve.json``, ``curve.tsv``, ``curve.svg`` and the models.
        facts: the contents of ``curve.json``: the search, the signatures of sacreBLEU, and ``points``, dense first.
    """

    folder: Path
    facts: dict[str, Any]


def shares_of(text: str) -> list[float]:
    """The numbers of ``0.5,0.7,0.9``, rising.

    Raises:
        ValueError: something else than different shares in (0, 1].
    """
    found = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            raise ValueError(f"--k {text}: {part.strip()!r} is no share in (0, 1]; expected such as 0.5,0.7,0.9,0.95")
        if value in found:
            raise ValueError(f"--k {text}: {value:g} is there twice; give each share once")
        found.append(value)
    return sorted(found)


def export_curve(
    run: Path,
    system: str,
    task: str,
    ks: Sequence[float],
    out: Path | None,
    settings: Settings,
    progress: Progress = lambda text, done, total: None,
) -> SizeQuality:
    """Exports a direction with the neurons that ``nspec.select`` keeps at each ``k``, and measures each model.

    Nothing is trained. The first point, ``dense``, is the direction as the system computes it, as wide as the dense model;
    the neurons of the others are selected from the counts of the run, by the rule ``share``, and the rest is left out.
    Each model translates the validation set of the run, in the format that it is written in.

    Args:
        run: the run folder.
        system: its name.
        task: the direction.
        ks: shares of the activations that are kept, as of ``select.k``, each in (0, 1].
        out: must not be there yet; None: in the run's folder ``export``. It gets a folder for each point, and
            ``curve.json``, ``curve.tsv`` and ``curve.svg``.
        settings: of the format.
        progress: is told what is done, how many sentences of how many.

    Raises:
        ValueError: see :func:`nspec.run.export.export_run`, no counts for the system, nothing to compare (no validation
            text), or a search that the format cannot do.
        ImportError: CTranslate2 is not installed.
    """
    found, _, settings = trained(run, system, task, settings)
    config = found.config
    place = out if out is not None else place_of(run, system, f"{task}-curve", settings)
    check_absent(place)
    counts = _counts(run, system, task, config)

    from nspec.mt.plain import plain
    from nspec.mt.scoring.ctranslate2_search import why_not
    from nspec.mt.text.prepared import PreparedData

    if settings.format == "ctranslate2" and (reason := why_not(config.decode)):
        raise ValueError(f"--format ctranslate2 --k: {reason}; take --format transformers")

    sources, references = PreparedData(run / "prepared").text("valid", task)
    if not sources:
        raise ValueError(f"{run} has no validation sentences of {task}, on which models could be compared")
    model, tokenizer = loaded(found, system)
    base = plain(model, task, compact=False)
    with new_folder(place) as part:
        points: dict[str, dict[str, Any]] = {}
        translators = {}
        for k in (None, *ks):
            name = DENSE if k is None else f"k-{k:g}"
            masks = None if k is None else nspec.select(counts, k)
            one: Any = base if masks is None else nspec.specialize(base, masks, mode="forward")
            (part / name).mkdir()
            write(one, [task], part / name, settings, tokenizer, pieces_of(run))
            served = base if masks is None else nspec.merge(one, task, compact=True)
            translators[name] = _translator(served, tokenizer, config.decode, settings)
            points[name] = {"name": name, "k": k, "density": 1.0 if masks is None else _density(masks, task)}
            points[name]["parameters"] = sum(p.numel() for p in served.parameters())
            points[name]["bytes"] = sum(path.stat().st_size for path in (part / name).iterdir())
            if masks is not None:
                nspec.despecialize(base)
        hypotheses, seconds = _translate(translators, sources, task, progress)
        facts = _facts(run, system, task, config, settings, len(sources))
        facts |= _scored(points, hypotheses, references, task, config)
        for name, point in points.items():
            point |= _speed(len(sources), seconds[name], seconds[DENSE])
        facts["points"] = list(points.values())
        _write(part, facts)
    return SizeQuality(place, facts)


def _counts(run: Path, system: str, task: str, config: Any) -> nspec.ActivationCounts:
    """The counts of the one direction, of the layers that the system specialises."""
    folder = run / profile_folder(config, system)
    if system_of(config, system).scratch and system != DENSE:
        raise ValueError(
            f"--system {system} has no counts: those of the run are of the dense model, and it was trained from new weights"
        )
    try:
        counts = nspec.ActivationCounts.load(folder)
    except FileNotFoundError:
        raise ValueError(
            f"--system {system} has no counts of activations: {folder} has no counts.safetensors. A run that has a system "
            "with masks, such as forward, makes them"
        ) from None
    if task not in counts.tasks:
        raise ValueError(f"{folder} has counts of {', '.join(counts.tasks)}, none of {task}")
    layers = config_of(config, system).select.layers
    counts = counts.only(layers) if layers else counts
    return nspec.ActivationCounts({task: counts[task]})


def _density(masks: nspec.NeuronMasks, task: str) -> float:
    """The share of the neurons of the layers with masks that is kept."""
    kept = [(int(mask.sum()), len(mask)) for mask in masks[task].values()]
    return sum(one for one, _ in kept) / sum(of for _, of in kept)


def _translator(model: Any, tokenizer: Any, decode: Any, settings: Settings) -> Any:
    """What translates with a plain model as it is in its format."""
    from nspec.mt.scoring.translate import Translator

    return Translator(model, tokenizer, decode, engine=settings.format, quantization=settings.quantization)


def _translate(
    translators: dict[str, Any], sources: list[str], task: str, progress: Progress
) -> tuple[dict[str, list[str]], dict[str, list[float]]]:
    """The translations of each model, and its seconds in each round."""
    hypotheses: dict[str, list[str]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in translators}
    done, total = 0, ROUNDS * len(translators) * len(sources)
    for translator in translators.values():
        list(translator.translate(sources[:1], task))  # what is done once is no part of the speed
    for number in range(ROUNDS):
        names = list(translators)
        for name in (*names[number:], *names[:number]):
            progress(name, done, total)
            began = time.perf_counter()
            hypotheses[name] = list(translators[name].translate(sources, task))
            seconds[name].append(time.perf_counter() - began)
            done += len(sources)
    progress("", total, total)
    return hypotheses, seconds


def _speed(sentences: int, seconds: list[float], dense: list[float]) -> dict[str, float]:
    """Sentences/s of the median round, the slowest and the fastest; the median over rounds of the ratio to dense."""
    return {
        "sentences_per_second": sentences / median(seconds),
        "sentences_per_second_low": sentences / max(seconds),
        "sentences_per_second_high": sentences / min(seconds),
        "speedup": median(a / b for a, b in zip(dense, seconds)),
    }


def _scored(
    points: dict[str, dict[str, Any]], hypotheses: dict[str, list[str]], references: list[str], task: str, config: Any
) -> dict[str, Any]:
    """Puts scores into the points; returns the signatures and what was warned of."""
    from nspec.mt.scoring.scores import score_system

    for name, lines in hypotheses.items():
        baseline = None if name == DENSE else (DENSE, {task: hypotheses[DENSE]})
        found = score_system({task: lines}, {task: references}, config.score, "", baseline)
        own = found["tasks"][task]
        for metric in ("bleu", "chrf"):
            points[name] |= {f"{metric}{end}": own[f"{metric}{end}"] for end in ("", "_low", "_high")}
            points[name][f"{metric}_p"] = own["baseline"][f"{metric}_p"] if own["baseline"] else None
    return {
        "signatures": {name: own[f"{name}_signature"] for name in ("bleu", "chrf")},
        "warnings": [said["text"] for said in found["warnings"]],
    }


def _facts(run: Path, system: str, task: str, config: Any, settings: Settings, sentences: int) -> dict[str, Any]:
    import torch

    from nspec.mt.scoring.engine import Engine

    return {
        "run": str(run),
        "system": system,
        "task": task,
        "split": "valid",
        "sentences": sentences,
        "format": settings.format,
        "version": Engine(settings.format, "").version,
        "quantization": settings.quantization,
        "decode": {name: value for name, value in vars(config.decode).items() if name != "engine"},
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
    }


def _write(folder: Path, facts: dict[str, Any]) -> None:
    from nspec.report.curve import draw, engine_of
    from nspec.report.drawing import svg_file

    write_json(folder / "curve.json", facts)
    same = {"engine": engine_of(facts), "threads": facts["threads"]}
    rows = [[(point | same)[column] for column in _COLUMNS] for point in facts["points"]]
    lines = ["\t".join("" if cell is None else f"{cell}" for cell in row) for row in (_COLUMNS, *rows)]
    write_text(folder / "curve.tsv", "\n".join(lines) + "\n")
    write_text(folder / "curve.svg", svg_file(draw, "curve", facts))
