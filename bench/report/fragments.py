"""Places between markers in pages: ``<!-- bench:NAME:begin -->`` and, on a later line, ``<!-- bench:NAME:end -->``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path


def fragments_of(page: Path, text: str, mark: str = "bench") -> list[str]:
    """The names of the fragments that a page has places for.

    Args:
        page: is named in errors.
        text: of it.
        mark: the word that the markers begin with.

    Raises:
        ValueError: a marker without its partner, twice, or one inside another.
    """
    marks = re.findall(rf"<!-- {mark}:([\w-]+):(begin|end) -->", text)
    names = [name for name, _ in marks[::2]]
    if marks != [(name, side) for name in names for side in ("begin", "end")] or len(set(names)) < len(names):
        found = ", ".join(":".join(mark) for mark in marks)
        raise ValueError(
            f"{page}: markers are {found}; expected each NAME once, its begin directly followed by its end"
        )
    return names


def filled(page: Path, text: str, write: Callable[[str], str], mark: str = "bench") -> str:
    """The text of a page with what ``write`` gives for each name between its markers.

    Raises:
        ValueError: it has no markers, or they do not match.
    """
    found = fragments_of(page, text, mark)
    if not found:
        raise ValueError(f"{page}: no markers; put <!-- {mark}:NAME:begin --> and <!-- {mark}:NAME:end --> into it")
    for name in found:
        parts = rf"(<!-- {mark}:{name}:begin -->).*(<!-- {mark}:{name}:end -->)"
        between = f"\n{write(name)}\n"
        text = re.sub(parts, lambda marks: marks[1] + between + marks[2], text, flags=re.S)  # noqa: B023
    return text
