"""Where languages stand in Glottolog's tree of languages, as the package qwanqwa ships it.

Glottolog (Hammarström et al., glottolog.org) divides some branches far more finely than others: seven groups one inside
the other lead to Romance, and three to Germanic. Here a group is in a lineage if languages that have an ISO 639-1 code
part in it, if it is the top of a family, or if it is a branch that textbooks name (:data:`BRANCHES`); of groups one
inside the other that hold the same of these languages, one is. So a shared group is a place where languages part.

The package is needed when a lineage is first asked for, and takes some seconds to load. Where it is not installed, or the
tree is not to one's taste, :func:`nspec.analysis.languages.read_distances` reads distances of one's own.
"""

from __future__ import annotations

import functools
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qq import Database, Languoid

_BRANCHES = """
    Albanian, Armenic, Berber, Celtic, Chadic, Cushitic, Eastern Baltic, Germanic, Greek, Indo-Aryan, Iranian,
    Narrow Bantu, Romance, Semitic, Sinitic, Slavic
"""
BRANCHES = frozenset(name.strip() for name in _BRANCHES.split(","))
"""Groups that textbooks name, by Glottolog's names. A language is in one of them at most."""

NO_FAMILY = frozenset(
    [
        "Artificial Language",
        "Mixed Language",
        "Pidgin",
        "Sign Language",
        "Speech Register",
        "Unattested",
        "Unclassifiable",
    ]
)
"""Tops of Glottolog's tree whose languages are not related."""

_RETIRED = "Bookkeeping"  # the top above codes that Glottolog does not take for languages of their own

STANDS_FOR = {
    **{"ar": "arb", "az": "azj", "et": "ekk", "fa": "pes", "gn": "gug", "iu": "ike", "kg": "kng", "kr": "knc"},
    **{"mg": "plt", "ms": "zsm", "oj": "ojg", "om": "gaz", "or": "ory", "qu": "quy", "sc": "src", "sw": "swh"},
    **{"yi": "ydd", "zh": "cmn"},
}
"""Macrolanguages (ISO 639-1) that the tree has no place for, with the member (ISO 639-3) whose place they take here."""

EC30_GROUPS = {
    "Germanic": "de nl sv da af lb",
    "Romance": "fr es it pt ro oc",
    "Slavic": "ru cs pl bg uk sr",
    "Indo-Aryan": "hi bn kn mr sd gu",
    "Afro-Asiatic": "ar he mt ha ti am",
}
"""The groups of the EC30 data set by its authors: their Kannada is Indo-Aryan."""


@dataclass(frozen=True)
class Group:
    """A node of the tree above languages; ``is_branch`` where it is one of :data:`BRANCHES`."""

    name: str
    is_branch: bool = False


@dataclass(frozen=True)
class Language:
    """A language of the tree.

    Attributes:
        code: ISO 639-1, such as ``de``; ISO 639-3 where it has none.
        iso3: ISO 639-3, such as ``deu``; of its member for one of :data:`STANDS_FOR`.
        groups: the groups that it is in, from the family down. A language that is related to no other is its family.
    """

    code: str
    iso3: str
    groups: tuple[Group, ...]

    @property
    def family(self) -> str:
        """The name of the top of its tree, such as Indo-European."""
        return self.groups[0].name

    @property
    def branch(self) -> str:
        """The name of the branch that it is in (Germanic, Semitic); of the family where it is in none."""
        return next((group.name for group in self.groups if group.is_branch), self.family)


class NoTreeError(ValueError):
    """The package with the tree of languages is not installed."""


def short_code(code: str) -> str:
    """``pt`` of ``pt_BR``, ``por`` of ``por_Latn``: what follows the language (script, country, variant) is dropped."""
    return re.split(r"[-_@.]", code.strip())[0].lower()


@functools.cache
def language(code: str) -> Language:
    """The entry of a language.

    Args:
        code: of ISO 639-1, 639-2 or 639-3, with or without what may follow it, such as ``de``, ``deu_Latn``, ``pt-BR``.

    Raises:
        NoTreeError: qwanqwa is not installed.
        ValueError: the tree has no such language.
    """
    entry = _entry(short_code(code))
    other = "for others `nspec analyze --distances FILE` takes distances of your own"
    if entry is None:
        raise ValueError(f"the family of language {code!r} is not known: Glottolog has no such language; {other}")
    path = _path(entry)
    if (not path and not entry.glottocode) or (path and path[0].name == _RETIRED):
        raise ValueError(f"the family of language {code!r} is not known: Glottolog has no place for it; {other}")
    groups = [
        Group(node.name or node.id, node.name in BRANCHES)
        for node in path
        if node is path[0] or node.name in BRANCHES or node.id in _kept()
    ]
    if not groups or entry.name in BRANCHES:  # a language related to no other; a branch of one language
        groups.append(Group(entry.name or entry.id, entry.name in BRANCHES))
    member_of = {member: macro for macro, member in STANDS_FOR.items()}
    own = entry.iso_639_1 or entry.iso_639_3 or short_code(code)
    return Language(member_of.get(own, own), STANDS_FOR.get(own, entry.iso_639_3 or own), tuple(groups))


@functools.cache
def _database() -> Database:
    try:
        import qq
    except ImportError:
        raise NoTreeError(
            "families of languages need Glottolog's tree, which the package qwanqwa has: pip install qwanqwa"
        ) from None
    return qq.Database.load()


def _entry(code: str) -> Languoid | None:
    tree = _database()  # first: it says what to do where there is none
    from qq import DeprecatedCodeWarning, IdType

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecatedCodeWarning)  # iw for he, in for id: old data sets have them
        for kind in (IdType.BCP_47, IdType.ISO_639_3, IdType.ISO_639_2B):
            try:
                return tree.get(code, kind)
            except KeyError:
                continue
    return None


def _path(entry: Languoid) -> list[Languoid]:
    """The nodes above a language, from the family down; empty for one that is related to no other."""
    member = STANDS_FOR.get(entry.iso_639_1 or "")
    above = ((_entry(member) or entry) if member else entry).family_tree
    return [] if above and above[-1].name in NO_FAMILY else above[::-1]


@functools.cache
def _kept() -> frozenset[str]:
    """Identifiers of the nodes that are groups (see the head of this file), beside the tops of families."""
    paths = {entry.iso_639_1: _path(entry) for entry in _database().all_languoids if entry.iso_639_1}
    members: dict[str, set[str]] = {}
    for code, path in paths.items():
        for node in path:
            members.setdefault(node.id, set()).add(code)
    kept: set[str] = set()
    for path in paths.values():
        alike: dict[frozenset[str], list[Languoid]] = {}
        for node in path:
            alike.setdefault(frozenset(members[node.id]), []).append(node)
        for inside, nodes in alike.items():
            named = [node.id for node in nodes if node.name in BRANCHES]
            kept.update(named)
            if len(inside) > 1 and not named:
                kept.add(nodes[0].id)
    return frozenset(kept)
