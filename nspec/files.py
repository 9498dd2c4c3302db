"""Files that are either whole or not there: written beside their place and renamed, so that a kill loses nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def expand_path(path: str) -> str:
    """``path`` with the home folder for ``~`` or ``~user`` at its start; all else, environment variables too, stays.

    Done once where a path comes in, as some libraries expand ``~`` and others do not. A path that they would still take
    for a home folder (``./~x``) comes out absolute.

    Raises:
        ValueError: there is no such user.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ValueError(f"there is no home folder {user}; a folder of that name here is written ./{user}")
    return os.path.abspath(expanded) if os.path.normpath(expanded).startswith("~") else expanded


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; a clean exit renames it to ``path``, an error removes it.

    A reader sees the old file or the new one, never a part. Folders are made as needed.

    Raises:
        OSError: what the operating system said (disk full, no permission), naming ``path``; the old file is intact.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror}; what was there is unchanged") from error
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text through :func:`replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes indented UTF-8 JSON through :func:`replacing`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also numbers of too many digits, and brackets within brackets
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
