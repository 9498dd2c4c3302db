"""Layers by patterns of their names. Importing this module does not load torch."""

from __future__ import annotations

import difflib
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
        found = [layer for layer in layers if matches(layer, pattern)]
        if not found:
            raise ValueError(f"no layer matches {pattern!r}; there are {', '.join(layers)}")
        kept.update(found)
    if not kept:
        raise ValueError(f"patterns is empty, expected some that match layers out of {', '.join(layers)}")
    return [layer for layer in layers if layer in kept]


def matches(layer: str, pattern: str) -> bool:
    """Whether the name, or a run of its parts between dots, is of that shape."""
    parts = layer.split(".")
    runs = itertools.combinations(range(len(parts) + 1), 2)
    return any(fnmatchcase(".".join(parts[start:stop]), pattern) for start, stop in runs)


_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # anywhere in a name
_OUTER = {"base_model", "model"}  # at its beginning


def alike(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """For names of layers, those that a model has for them where wrappers around it, or around its parts, add to them.

    Names that are equal but for ``module``, ``_orig_mod`` and their like (data parallelism, compilation) and for
    ``base_model`` and ``model`` at the beginning (adapters, models with a head) are those of one layer. A name that the
    model has as it is stands for itself.

    Args:
        names: of masks, say.
        known: of the model.

    Returns:
        The known name of each; names without one are left out.

    Raises:
        ValueError: there are several for a name, or one for several names.

    Example:
        >>> alike(["encoder.layers.0.fc1"], ["base_model.model.model.encoder.layers.0.fc1"])
        {'encoder.layers.0.fc1': 'base_model.model.model.encoder.layers.0.fc1'}
    """
    known = list(known)
    by_inner: dict[str, list[str]] = {}
    for name in known:
        by_inner.setdefault(_inner(name), []).append(name)
    found: dict[str, str] = {}
    given: dict[str, str] = {}
    for name in names:
        candidates = [name] if name in known else by_inner.get(_inner(name), [])
        if len(candidates) > 1:
            raise ValueError(
                f"{name} may be {' or '.join(candidates)} of the model, as wrappers add to names: rename the layers first "
                "(masks.renamed(...))"
            )
        for candidate in candidates:
            if candidate in given:
                raise ValueError(
                    f"{given[candidate]} and {name} may both be {candidate} of the model, as wrappers add to names: rename "
                    "the layers first (masks.renamed(...))"
                )
            found[name], given[candidate] = candidate, name
    return found


def _inner(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(itertools.dropwhile(_OUTER.__contains__, parts))


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a message: the known names, the nearest first."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
    shown = close or names[:3]
    return f"known: {', '.join(shown)}{', ...' if len(names) > len(shown) else ''}" if names else "there are none"
