"""Layers by patterns of their names. Importing this module does not load torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matching(layers: Sequence[str], patterns: Iterable[str]) -> list[str]:
    """The layers that a pattern matches, in the order of ``layers``.

    A pattern matches a layer whose name, or a part of whose name between dots, is of that shape: ``encoder.layers.1``
    matches ``model.encoder.layers.1.fc1`` but not ``model.encoder.layers.10.fc1``. ``*``, ``?``, ``[12]`` and ``[!0]`` are
    as in a shell, where a dot is a character like others; capitals count.

    Args:
        layers: qualified names of fc1.
        patterns: one or more, such as ``encoder`` or ``decoder.layers.[12]``.

    Raises:
        ValueError: no pattern, or one that matches no layer; the message names the layers that there are.
        TypeError: ``patterns`` is a text itself.

    Example:
        >>> matching([f"model.decoder.layers.{i}.fc1" for i in range(12)], ["layers.1", "*.1?"])
        ['model.decoder.layers.1.fc1', 'model.decoder.layers.10.fc1', 'model.decoder.layers.11.fc1']
    """
    if isinstance(patterns, str):
        raise TypeError(f"patterns is {patterns!r}, expected a list of texts such as [{patterns!r}]")
    kept: set[str] = set()
    for pattern in patterns:
        found = [layer for layer in layers if _matches(layer, pattern)]
        if not found:
            raise ValueError(f"no layer matches {pattern!r}; there are {', '.join(layers)}")
        kept.update(found)
    if not kept:
        raise ValueError(f"patterns is empty, expected some that match layers out of {', '.join(layers)}")
    return [layer for layer in layers if layer in kept]


def _matches(layer: str, pattern: str) -> bool:
    """Whether the name, or a run of its parts between dots, is of that shape."""
    parts = layer.split(".")
    runs = itertools.combinations(range(len(parts) + 1), 2)
    return any(fnmatchcase(".".join(parts[start:stop]), pattern) for start, stop in runs)
