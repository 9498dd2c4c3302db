"""What a stage of a run leaves of itself in its folder."""

from __future__ import annotations

import contextlib
import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from nspec import __version__
from nspec.files import read_json
from nspec.run.stages import Stage

_PACKAGES = ("torch", "transformers", "accelerate", "sentencepiece", "ctranslate2", "sacrebleu", "numpy")


def redo_hint(stage: Stage) -> str:
    """How to make a stage anew, for a message."""
    return f"--redo {stage.name} to make it and all that follows from it anew (the old folders are kept as *.old-N)"


def read_record(path: Path) -> dict[str, Any]:
    """What a stage wrote of itself.

    Raises:
        ValueError: it is no record; the message names the file, what was found and what was expected.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds {repr(record)[:40]}, expected an object with stage, options and inputs")
    record.setdefault("outputs", {})  # older versions wrote none
    for key in ("options", "inputs", "outputs"):
        if not isinstance(record.get(key), dict):
            raise ValueError(f"{path}: {key} is {repr(record.get(key))[:40]}, expected an object")
    if type(record.get("seconds")) not in (int, float):
        raise ValueError(f"{path}: seconds is {repr(record.get('seconds'))[:40]}, expected a number")
    return record


def was_made_of(record: Path, inputs: dict[str, str]) -> bool:
    """Whether a stage was made of inputs with these hashes; a broken record does not say so."""
    with contextlib.suppress(ValueError):
        return bool(read_record(record)["inputs"] == inputs)
    return False


def height(name: str, value: float) -> float:
    """The value of an option with which a training goes on where it is raised: a patience of 0 is the highest."""
    return math.inf if name.endswith(".patience") and value == 0 else value


def started_name(stage: Stage) -> str:
    """The file that stands in the folder of a stage while it works."""
    return stage.record.replace("stage", "started")


def stopped_early(summary: Path) -> bool:
    """Whether a finished training ended because validation stopped getting better."""
    with contextlib.suppress(ValueError):
        found = read_json(summary)
        return not isinstance(found, dict) or found.get("stopped_early") is not False
    return True  # a broken one does not say so


def holds_only_parts(folder: Path) -> bool:
    """Whether a folder holds nothing but what an interrupted write left."""
    return all(is_part(path) for path in folder.iterdir())


def is_part(path: Path) -> bool:
    """Whether a file is what :mod:`nspec.files` writes before it renames it."""
    return path.name.startswith(".") and path.name.endswith(".part")


def is_gone(process: int) -> bool:
    """Whether there is no process of that number."""
    if process == os.getpid():  # of an earlier process with the same number, as this one has written nothing yet
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


def move_aside(folder: Path) -> Path:
    """Renames a folder to the first free ``NAME.old-N``, which is returned."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(target)
    return target


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, those that are installed."""
    found = {"nspec": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
