"""The files of a run folder as readers outside the chain take them: only as the run wrote them.

Importing this module loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nspec.files import read_json, sha256
from nspec.run.config import Config
from nspec.run.yaml import WRITE_ANEW, flatten, parse_given
from nspec.yaml_text import read_text


def check_run(run: Path, given: str) -> None:
    """Raises ValueError where there is no run in a folder.

    Args:
        run: the folder.
        given: how the command takes it, for the message: ``RUN`` or ``--run``.
    """
    if not run.is_dir():
        raise ValueError(f"{given} {run}: there is no such folder")
    if (run / "config.yaml").is_file():
        return
    around = next((place for place in run.resolve().parents if (place / "config.yaml").is_file()), None)
    hint = f"; the one that it is a part of is {around}" if around else ""
    raise ValueError(f"{given} {run}: there is no run in that folder, as it has no config.yaml{hint}")


def read_config(run: Path) -> tuple[Config, str]:
    """The configuration of a run, and its text; not validated.

    ``config.yaml`` holds every option, so that one that is missing is damage and not its default. Newer files say how
    many there are (:func:`~nspec.run.yaml.render_complete`); to older ones the records of the stages say which.

    Raises:
        OSError: it cannot be read.
        ValueError: it is broken, or lacks an option.
    """
    path = run / "config.yaml"
    text = read_text(path)
    config, given = parse_given(text, str(path))
    missing = sorted(_recorded(run) - given)
    if missing or not given:
        lacks = f"{missing[0]}, with which the run was made" if missing else "every option"
        raise ValueError(f"{path} is damaged: it lacks {lacks}; {WRITE_ANEW}")
    return config, text


def _recorded(run: Path) -> set[str]:
    """The options that the finished stages of a run wrote down, those that this version knows."""
    found: set[str] = set()
    for pattern in ("*/stage.json", "*/*/stage.json"):
        for path in run.glob(pattern):
            record = read_json(path)
            noted = record.get("options") if isinstance(record, dict) else None
            found.update(noted if isinstance(noted, dict) else ())
    return found & set(flatten(Config()))


def check_written(path: Path, record: Path, remedy: str) -> None:
    """Compares a file, or what is in a folder, with what the stage that wrote it wrote down.

    Args:
        path: below the folder of the record.
        record: ``stage.json`` of the stage; where it is not there, or of an older version, nothing is compared.
        remedy: what to do, for the message.

    Raises:
        ValueError: the first file that is gone or has changed (by SHA-256; of large files, by size).
    """
    outputs = _outputs(record)
    name = path.relative_to(record.parent).as_posix()
    for part, before in outputs.items():
        if part != name and not part.startswith(f"{name}/"):
            continue
        file = record.parent / part
        if not file.is_file():
            raise ValueError(f"{file} is gone: {remedy}")
        if before != (file.stat().st_size if isinstance(before, int) else sha256(file)):
            state = "has changed" if file.stat().st_size else "is empty, and was not"
            raise ValueError(f"{file} {state} since it was written: {remedy}")


def _outputs(record: Path) -> dict[str, Any]:
    content = read_json(record) if record.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{record} holds {type(content).__name__}, expected a JSON object; remove it and run again")
    outputs = content.get("outputs")
    return outputs if isinstance(outputs, dict) else {}
