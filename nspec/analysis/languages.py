"""Families of languages, and how far apart they are in the tree of languages.

The tree is a short table written by hand, :mod:`nspec.analysis.lineages`; where it does not do, :func:`read_distances`
takes distances from a file.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from nspec.analysis.lineages import ALIASES, EC30_GROUPS, TREE
from nspec.analysis.overlap import Floats

Grouping = Literal["branch", "family", "ec30"]


@dataclass(frozen=True)
class Group:
    """A node of the tree above languages; ``is_branch`` where it is one that textbooks name, such as Germanic."""

    name: str
    is_branch: bool


@dataclass(frozen=True)
class Language:
    """A language of the table.

    Attributes:
        code: ISO 639-1, such as ``de``.
        iso3: ISO 639-3, such as ``deu``.
        script: ISO 15924, the script that it is mostly written in, such as ``Latn``.
        name: in English.
        groups: the groups that it is in, from the family down.
    """

    code: str
    iso3: str
    script: str
    name: str
    groups: tuple[Group, ...]

    @property
    def family(self) -> str:
        """The name of the top of its tree, such as Indo-European."""
        return self.groups[0].name

    @property
    def branch(self) -> str:
        """The name of the branch that it is in (Germanic, Semitic); of the family where no branch is marked."""
        return next((group.name for group in self.groups if group.is_branch), self.family)


@functools.cache
def known() -> dict[str, Language]:
    """Every language of the table by its ISO 639-1 code, in order of codes."""
    found: dict[str, Language] = {}
    path: list[Group] = []
    for line in TREE.strip("\n").splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        del path[depth:]
        if line.lstrip()[0].isupper():
            path.append(Group(line.removesuffix(" *").strip(), line.endswith(" *")))
        else:
            code, iso3, script, *name = line.split()
            found[code] = Language(code, iso3, script, " ".join(name), tuple(path))
    return dict(sorted(found.items()))


def normalize(code: str) -> str:
    """The ISO 639-1 code of a language: ``pt_BR``, ``por`` and ``por_Latn`` are ``pt``.

    What follows the language (script, country, variant) is dropped. Individual languages that stand for a macrolanguage
    in common data sets (``arb``, ``cmn``, ``pes``, ``swh``) are known as well.

    Raises:
        ValueError: the table does not have the language; the message lists those that it has.
    """
    table = known()
    first = re.split(r"[-_@.]", code.strip())[0].lower()
    names = {language.iso3: language.code for language in table.values()} | ALIASES
    short = names.get(first, first)
    if short in table:
        return short
    other = "for others `nspec analyze --distances FILE` takes distances of your own"
    raise ValueError(f"the family of language {code!r} is not known; known are {' '.join(table)}; {other}")


def is_known(code: str) -> bool:
    """Whether the table has a language."""
    try:
        return normalize(code) in known()
    except ValueError:
        return False


def language(code: str) -> Language:
    """The entry of a language, whose code may be written in any way that :func:`normalize` reads.

    Raises:
        ValueError: the table does not have it; the message lists those that it has.
    """
    return known()[normalize(code)]


def group_of(code: str, grouping: Grouping = "branch") -> str:
    """The name of the group of a language.

    Args:
        code: of the language.
        grouping: ``branch`` (Germanic, Romance, Semitic, ...), ``family`` (Indo-European, Afro-Asiatic, ...), or ``ec30``,
            the five groups of the EC30 data set by its authors, who count Kannada (Dravidian) as Indo-Aryan.

    Raises:
        ValueError: the language, or such a grouping, is not known, or EC30 does not have the language.
    """
    if grouping not in get_args(Grouping):
        raise ValueError(f"grouping is {grouping!r}, expected one of {', '.join(get_args(Grouping))}")
    entry = language(code)
    if grouping == "branch":
        return entry.branch
    if grouping == "family":
        return entry.family
    for name, codes in EC30_GROUPS.items():
        if entry.code in codes.split():
            return name
    raise ValueError(f"EC30 has no group for language {code!r}; it has {' '.join(EC30_GROUPS.values())}")


def genetic_distance(a: str, b: str) -> float:
    """How far up the tree two languages meet: 1 / (1 + the number of groups that they share), in [0, 1].

    It is 0 for the same language, 1 for languages of two families, 1/2 for those that share the family alone, 1/3 with
    one group more, and so on. It depends on where the two meet and on nothing below, so that a language inside a group
    is never farther than one outside (the distances are ultrametric). The genetic distance of URIEL (Littell et al.,
    EACL 2017) and others that divide what is shared by the depth of lineages lack that: English would be closer to
    German than Dutch is, if Dutch is divided more finely. It counts splits, not years, and linguists have divided some
    branches more finely than others: compare it by order rather than by size (rank correlation).

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
    ``de nl 0.2``. The order of the two does not matter. Empty lines and what follows ``#`` are passed by.

    Returns:
        A function like :func:`genetic_distances`. It raises ValueError if the file lacks a pair of the languages that it
        is given.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is something else, the distance is negative or not finite, or one pair has two distances; the
            message names file and line.
    """
    far: dict[frozenset[str], float] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}") from None
    for number, line in enumerate(lines, 1):
        cells = line.partition("#")[0].split()
        if not cells:
            continue
        try:
            a, b, value = cells[0], cells[1], float(cells[2])
        except (IndexError, ValueError):
            value = math.nan
        if len(cells) != 3 or a == b or not 0 <= value < math.inf:
            found = " ".join(cells)
            raise ValueError(
                f"{path} line {number}: expected two languages and their distance, such as de nl 0.2; found {found!r}"
            )
        if far.setdefault(frozenset((a, b)), value) != value:
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


def script_of(code: str) -> str:
    """The script of a language (ISO 15924): that which the code names (``sr_Latn``), else the usual one.

    Raises:
        ValueError: the language is not known.
    """
    usual = language(code).script
    named = re.search(r"[-_]([A-Za-z]{4})(?=[-_]|$)", code.strip())
    return named[1].title() if named else usual


def script_distances(codes: Sequence[str]) -> Floats:
    """0 where two languages share a script, else 1: float64 [n, n]. A control for partial tests.

    Raises:
        ValueError: a language is not known.
    """
    scripts = [script_of(code) for code in codes]
    return np.array([[float(a != b) for b in scripts] for a in scripts])
