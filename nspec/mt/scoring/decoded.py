"""The translations of a test set, a file for each direction, and what is noted beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nspec.files import read_json, sha256


def record_of(folder: Path, task: str) -> Path:
    """The file of a direction that says how it was translated."""
    return folder / f"{task}.decode.json"


def decoding(folder: Path, task: str) -> dict[str, Any]:
    """What translating a direction left about itself.

    Raises:
        ValueError: it is broken, or the translations are not those that it is of; the message names the file, what was
            found and what was expected.
    """
    found = read_json(record_of(folder, task))
    for key in ("sentences", "seconds"):
        value: Any = found.get(key) if isinstance(found, dict) else None
        if type(value) not in (int, float) or not 0 <= value < float("inf"):
            expected = '{"sentences": number, "seconds": number}'
            raise ValueError(f"{record_of(folder, task)} holds {repr(found)[:60]}, expected {expected}")
    known, path = found.get("sha256"), folder / f"{task}.hyp.txt"
    if known is not None and path.is_file() and known != sha256(path):  # older versions wrote none
        raise ValueError(f"{path} has other contents than were written")
    return dict(found)


def engine_of(record: dict[str, Any]) -> str:
    """What searched, by what :func:`decoding` gives; older versions wrote nothing and had one."""
    return str(record.get("engine", "transformers"))


def translations(folder: Path, task: str, sentences: int) -> list[str]:
    """The translations of a direction.

    Raises:
        ValueError: there are not as many as sentences.
    """
    path = folder / f"{task}.hyp.txt"
    lines = path.read_bytes().decode().split("\n")[:-1]  # read_text would end a line at a carriage return too
    if len(lines) != sentences:
        raise ValueError(f"{path} has {len(lines)} lines, expected the {sentences} sentences of the test set")
    return lines
