"""Files that are either whole or not there: written beside their place and renamed, so that a kill loses nothing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON writes it; two that belong together are one character


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

    A reader sees the old file or the new one, never a part. Folders are made as needed. A symbolic link stays one, and
    what it points to is replaced. What is there and no regular file (a named pipe, a device) is yielded itself, and written
    straight to.

    Raises:
        OSError: what the operating system said (disk full, no permission), naming ``path``; the old file is intact.
    """
    straight = is_special(path)
    place = Path(path) if straight else Path(os.path.realpath(path))
    part = place if straight else place.with_name(f".{place.name}.{os.getpid()}.part")
    kept = "" if straight else "; what was there is unchanged"
    try:
        if not straight:
            place.parent.mkdir(parents=True, exist_ok=True)
        yield part
        if not straight:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, place)
    except OSError as error:
        raise disk_error(error, path, kept) from error
    finally:
        if not straight:
            part.unlink(missing_ok=True)


_FULL = 1 << 20  # bytes; libraries stop with a file cut off at the last free block


def disk_error(error: BaseException, path: str | os.PathLike[str], kept: str = "") -> OSError:
    """What went wrong when ``path`` was written, as an OSError that names a full disk whatever a library said of it.

    Args:
        error: that was raised; one of an operating system or of a library.
        path: of the file or folder that was being written.
        kept: to add at the end, such as what is unchanged.
    """
    number = getattr(error, "errno", None)
    place = Path(os.path.abspath(path))
    while not place.is_dir() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if number == errno.ENOSPC or (number is None and ("no space left" in said.lower() or free < _FULL)):
        said, number = os.strerror(errno.ENOSPC), errno.ENOSPC
    if number in (errno.ENOSPC, errno.EDQUOT) and not is_special(path):
        said = f"{said} ({free >> 20} MiB free)"
    kind = type(error) if isinstance(error, OSError) else OSError
    text = f"cannot write {path}: {said}{kept}"
    return kind(text) if number is None else kind(number, text)


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether there is something at ``path`` that is neither a regular file nor a folder, such as a pipe or a device."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def check_output(option: str, path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Checks where a command is to write, before its work: only the last part of the path may be new.

    Args:
        option: its name, for the message.
        path: of a file, or of a folder that holds what is written.
        folder: which of the two.

    Raises:
        ValueError: there is no folder around it, a folder where a file is to be, or the other way round.
    """
    place = Path(os.path.realpath(path)) if os.path.islink(path) and not is_special(path) else Path(path).absolute()
    if not place.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {place.parent}; make it first")
    if not folder and place.is_dir():
        raise ValueError(f"{option} {path} is a folder; give the name of a file in it")
    if folder and place.exists() and not place.is_dir():
        raise ValueError(f"{option} {path} is not a folder")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text through :func:`replacing`.

    Raises:
        OSError: see there.
        ValueError: the text has half a character; what was there is unchanged.
    """
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"cannot write {path}: the text has {_half(error)}") from None
    with replacing(path) as part:
        part.write_bytes(content)


def _half(error: UnicodeEncodeError) -> str:
    return f"half a character (the lone surrogate U+{ord(error.object[error.start]):04X})"


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes indented UTF-8 JSON; see :func:`write_text`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, or has half a character, which no text that is made of it could hold; the
            message names the file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise ValueError(f"{path} has {_half(error)}; write it anew") from None
    except (ValueError, RecursionError) as error:  # also numbers of too many digits, and brackets within brackets
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
