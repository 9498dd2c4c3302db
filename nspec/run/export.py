"""The directions of a run's system as folders that other tools serve."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nspec.files import read_json, sha256
from nspec.run.read import check_run
from nspec.run.trained import TrainedSystem, trained_model
from nspec.serving.export import Settings, check_absent, new_folder, write

Progress = Callable[[str, int, int], None]


def export_run(
    run: Path,
    system: str,
    task: str | None,
    out: Path | None,
    settings: Settings,
    progress: Progress = lambda text, done, total: None,
) -> tuple[Path, list[str]]:
    """Writes a direction of a system, or all of them.

    Args:
        run: the run folder.
        system: its name.
        task: the direction; None: all that the run has. A system that computes the same for all gives one folder then,
            any other one a folder for each inside ``out``, in which files that are the same are one file (hard links).
        out: must not be there yet; None: in the run's folder ``export``.
        settings: of the format; beam and length penalty are those of the run.
        progress: is told the direction, how many are done and how many there are.

    Returns:
        The folder, and the directions in it.

    Raises:
        ValueError: no run, no such system or direction, a system that is not trained to its end or that no plain model
            computes, a folder that is there.
        ImportError: CTranslate2 is not installed.
    """
    found, chosen, settings = trained(run, system, task, settings)
    place = out if out is not None else place_of(run, system, task or "all", settings)
    check_absent(place)

    def fill(tasks: Sequence[str], folder: Path, model: Any, tokenizer: Any) -> None:
        write(model, tasks, folder, settings, tokenizer, pieces_of(run))

    from nspec.mt.model import load_system
    from nspec.mt.plain import decodes_by_task

    model, tokenizer = loaded(found, system)
    with new_folder(place) as part:
        if len(chosen) == 1 or not (found.each or decodes_by_task(model)):
            fill(chosen, part, model, tokenizer)
            return place, chosen
        for number, each in enumerate(chosen):
            progress(each, number, len(chosen))
            if found.each and number:
                del model
                gc.collect()
                model, tokenizer = load_system(trained_model(run, system, each).folder, made_by=found.made_by)
            (part / each).mkdir()
            fill([each], part / each, model, tokenizer)
        _link(part)
        progress("", len(chosen), len(chosen))
    return place, chosen


def trained(run: Path, system: str, task: str | None, settings: Settings) -> tuple[TrainedSystem, list[str], Settings]:
    """The model of a system, the directions that are meant (None: all), and settings with what the run says.

    Raises:
        ValueError, ImportError: see :func:`export_run`.
    """
    settings.check()
    tasks = _tasks(run)
    if task is not None and task not in tasks:
        raise ValueError(f"--task {task}: {run} has the directions {', '.join(tasks)}")
    chosen = tasks if task is None else [task]
    found = trained_model(run, system, chosen[0])
    if not (run / "systems" / system / "stage.json").is_file():
        raise ValueError(f"--system {system} is not trained to its end in {run}: `nspec run` goes on with it")
    decode = found.config.decode
    unshown = [f"`no_repeat_ngram_size={decode.no_repeat_ngram_size}`"] if decode.no_repeat_ngram_size else []
    unshown += [f"`repetition_penalty={decode.repetition_penalty:g}`"] if decode.repetition_penalty != 1 else []
    settings = replace(
        settings, beam=decode.beam, length_penalty=decode.length_penalty, unshown=" and ".join(unshown), system=system
    )
    return found, chosen, replace(settings, base=found.config.model.pretrained)


def loaded(found: TrainedSystem, system: str) -> tuple[Any, Any]:
    """The model and its tokenizer.

    Raises:
        ValueError: no plain model computes what it does.
    """
    from nspec.mt.model import load_system
    from nspec.mt.plain import why_not_plain

    model, tokenizer = load_system(found.folder, made_by=found.made_by)
    if reason := why_not_plain(model):
        raise ValueError(f"--system {system} cannot be exported: {reason}; `nspec translate` serves it")
    return model, tokenizer


def _tasks(run: Path) -> list[str]:
    path = run / "prepared" / "meta.json"
    check_run(run, "RUN")
    if not path.is_file():
        raise ValueError(
            f"{run} has no prepared text ({path} is not there): it is no run of translation, or has not begun"
        )
    described = read_json(path)
    tasks = described.get("tasks") if isinstance(described, dict) else None
    if not isinstance(tasks, list) or not tasks:
        raise ValueError(f"{path} names no directions; make it anew with `nspec run` and --redo prepare")
    return [str(task) for task in tasks]


def place_of(run: Path, system: str, name: str, settings: Settings) -> Path:
    """Where an export goes if nothing is said."""
    kind = f"{settings.format}-{settings.quantization}" if settings.quantization else settings.format
    return run / "export" / f"{system}-{kind}" / name


def pieces_of(run: Path) -> Path | None:
    """The SentencePiece model of a vocabulary that the run made."""
    from nspec.mt.text.vocabulary import MODEL_FILE

    path = run / "prepared" / "tokenizer" / MODEL_FILE
    return path if path.is_file() else None


def _link(folder: Path) -> None:
    """Makes files of the folders in ``folder`` that hold the same one file, where the file system can."""
    first: dict[str, Path] = {}
    for path in sorted(folder.glob("*/*")):
        known = first.setdefault(sha256(path), path)
        if known is not path:
            beside = path.with_name(f".{path.name}.link")
            try:
                os.link(known, beside)
            except OSError:  # a file system without hard links
                return
            os.replace(beside, path)
