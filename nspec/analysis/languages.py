"""Families of languages, and how far apart they are: in Glottolog's tree, in their scripts, or as a file says.

The tree is in :mod:`nspec.analysis.lineages`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from nspec.analysis.lineages import EC30_GROUPS, NoTreeError, language, short_code
from nspec.analysis.overlap import Floats

_DISTANCE = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_COMMA = re.compile(r"[-+]?[0-9]*,[0-9]+")
Grouping = Literal["branch", "family", "ec30"]


def is_known(code: str) -> bool:
    """Whether the family of a language can be told: the tree is there and has it."""
    try:
        language(code)
    except ValueError:
        return False
    return True


def why_no_families() -> str:
    """Why families cannot be told here, where the tree is not installed; else empty."""
    try:
        language("en")
    except NoTreeError as error:
        return str(error)
    return ""


def group_of(code: str, grouping: Grouping = "branch") -> str:
    """The name of the group of a language.

    Args:
        code: of the language.
        grouping: ``branch`` (Germanic, Romance, Semitic, ...), ``family`` (Indo-European, Afro-Asiatic, ...), or ``ec30``,
            the five groups of the EC30 data set by its authors, who count Kannada (Dravidian) as Indo-Aryan.

    Raises:
        ValueError: the language, or such a grouping, is not known, or EC30 does not have the language.

    Example:
        >>> group_of("de", "ec30")
        'Germanic'
    """
    if grouping not in get_args(Grouping):
        raise ValueError(f"grouping is {grouping!r}, expected one of {', '.join(get_args(Grouping))}")
    if grouping == "branch":
        return language(code).branch
    if grouping == "family":
        return language(code).family
    short = short_code(code)
    if len(short) > 2 and is_known(code):  # ISO 639-1 codes need no tree here
        short = language(code).code
    for name, codes in EC30_GROUPS.items():
        if short in codes.split():
            return name
    raise ValueError(f"EC30 has no group for language {code!r}; it has {' '.join(EC30_GROUPS.values())}")


def known_group(code: str, grouping: Grouping = "branch") -> str:
    """:func:`group_of`, or empty where the language has none or is not known."""
    try:
        return group_of(code, grouping)
    except ValueError:
        return ""


def genetic_distance(a: str, b: str) -> float:
    """How far up the tree two languages meet: 1 / (1 + the number of groups that they share), in [0, 1].

    It is 0 for the same language, 1 for languages of two families, 1/2 for those that share the family alone, 1/3 with
    one group more, and so on. It depends on where the two meet and on nothing below, so that a language inside a group
    is never farther than one outside (the distances are ultrametric). The genetic distance of URIEL (Littell et al.,
    EACL 2017) and others that divide what is shared by the depth of lineages lack that: English would be closer to
    German than Dutch is, if Dutch is divided more finely. It counts places where languages part, not years: compare it
    by order rather than by size (rank correlation).

    Raises:
        ValueError: a language is not known.
    """
    one, other = language(a), language(b)
    if one.code == other.code:
        return 0.0
    return 1 / (1 + sum(x == y for x, y in zip(one.groups, other.groups)))


def genetic_distances(codes: Sequence[str]) -> Floats:
    """:func:`genetic_distance` of every two languages: float64 [n, n], symmetric, zeros on the diagonal.

    Raises:
        ValueError: a language is not known.
    """
    return np.array([[genetic_distance(a, b) for b in codes] for a in codes])


def read_distances(path: str | os.PathLike[str]) -> Callable[[Sequence[str]], Floats]:
    """Reads distances of languages from a file, for another tree or for languages that the table does not have.

    A line of UTF-8 text is two languages, as the directions name them, and their distance, with spaces or tabs between:
    ``de nl 0.2``. The order of the two does not matter, and a language may be 0 from itself. Empty lines and what follows
    ``#`` are passed by; there is no header.

    Returns:
        A function like :func:`genetic_distances`. It raises ValueError if the file lacks a pair of the languages that it
        is given.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is something else, the distance is negative or not finite, that of a language from itself is
            not 0, or one pair has two distances; the message names file and line.
    """
    far: dict[frozenset[str], float] = {}
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from None
    for number, line in enumerate(text.split("\n"), 1):
        cells = line.partition("#")[0].split()
        if not cells:
            continue
        a, b, written = cells if len(cells) == 3 else ("", "", "")
        # Not what else float() reads, such as 1_0 and nan; a number too large for it is infinite.
        value = float(written) if _DISTANCE.fullmatch(written) else math.nan
        if not 0 <= value < math.inf or (a == b and value):
            found = " ".join(cells)
            comma = "; write the number with a point" if len(cells) == 3 and _COMMA.fullmatch(written) else ""
            raise ValueError(
                f"{path} line {number}: expected two languages and their distance, such as de nl 0.2; found "
                f"{found[:80]!r}{comma}"
            )
        if a != b and far.setdefault(frozenset((a, b)), value) != value:
            raise ValueError(
                f"{path} line {number}: {a} and {b} have another distance above, {far[frozenset((a, b))]:g}"
            )

    def distances(codes: Sequence[str]) -> Floats:
        matrix = np.zeros((len(codes), len(codes)))
        for i, a in enumerate(codes):
            for j, b in enumerate(codes[:i]):
                if frozenset((a, b)) not in far:
                    raise ValueError(f"{path} has no distance of {b} and {a}; it needs one for every two languages")
                matrix[i, j] = matrix[j, i] = far[frozenset((a, b))]
        return matrix

    return distances


_MODIFIERS = {"latin": "Latn", "iqtelif": "Latn", "cyrillic": "Cyrl", "devanagari": "Deva"}


def script_of(code: str) -> str:
    """The script of a language (ISO 15924): that which the code names (``sr_Latn``), else CLDR's likely one.

    Raises:
        ValueError: CLDR knows no likely script, or Babel, which has CLDR's data, is not installed.
    """
    named = re.search(r"[-_]([A-Za-z]{4})(?=[-_@]|$)", code.strip())
    if named:
        return named[1].title()
    modifier = code.strip().lower().partition("@")[2]  # of a locale, such as sr@latin
    if modifier in _MODIFIERS:
        return _MODIFIERS[modifier]
    try:
        from babel.core import get_global
    except ImportError:
        raise ValueError(
            "scripts of languages need CLDR's data, which the package Babel has: pip install Babel"
        ) from None
    likely = get_global("likely_subtags")
    names = [short_code(code), *([language(code).code] if is_known(code) else [])]
    country = re.search(r"[-_]([A-Za-z]{2}|[0-9]{3})(?=[-_.@]|$)", code.strip())  # zh_TW is not written as zh is
    by_country = [f"{name}_{country[1].upper()}" for name in names] if country else []
    found = next((likely[name] for name in (*by_country, *names) if name in likely), None)
    if not found:
        raise ValueError(
            f"the script of language {code!r} is not known to CLDR; name it, such as {short_code(code)}_Latn"
        )
    return str(found).split("_")[1]


def script_distances(codes: Sequence[str]) -> Floats:
    """0 where two languages share a script, else 1: float64 [n, n]. A control for partial tests.

    Raises:
        ValueError: a language is not known.
    """
    scripts = [script_of(code) for code in codes]
    return np.array([[float(a != b) for b in scripts] for a in scripts])
