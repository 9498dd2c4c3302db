"""JSONL files whose rows name their languages: which keys are languages, and the text of each pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from nspec.mt.languages import is_known, plain_code
from nspec.mt.text.corpus.base import CorpusError, Pair, names
from nspec.mt.text.corpus.parallel import Source, by_code, read_objects, text_of

# Codes that are names of fields as well: of identifiers, numbers and labels, and of machine translations (Maltese: mt).
_FIELDS = frozenset(("id", "no", "ts", "lg", "cat", "run"))
_TEXT_FIELDS = frozenset(("mt",))
# A field holds identifiers where so many of its values are one word of ASCII, while others have several words so often.
_ONE_WORD, _SEVERAL_WORDS = 0.9, 0.5

Row = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class MixedJsonlSource(Source):
    """One file of JSON objects, each with its own languages; read once and kept in memory.

    Attributes:
        path: the file.
        texts: line number and texts by language of each row.
        pairs: that it has text for.
    """

    path: Path
    texts: list[tuple[int, dict[str, str]]]
    pairs: frozenset[Pair]

    @property
    def paths(self) -> tuple[Path, ...]:  # type: ignore[override]
        return (self.path,)

    def rows(self, pair: Pair) -> Iterator[tuple[int, str, str]]:
        for number, row in self.texts:
            if pair[0] in row and pair[1] in row:
                yield number, row[pair[0]], row[pair[1]]


def read_mixed(paths: Sequence[Path], wanted: Collection[str]) -> tuple[list[MixedJsonlSource], list[str]]:
    """Reads the mixed files of a folder, whose keys mean the same in all of them.

    Without ``wanted`` a key is a language where it is a known code (ISO 639, ``xyz_Latn``). One that is the name of a
    field as well, such as ``id``, is judged by its values.

    Args:
        paths: the files.
        wanted: the languages that the options name, as a run spells them; empty: none is named.

    Returns:
        A source for each file, and what is to be said of the keys.

    Raises:
        CorpusError: a line is malformed or lacks a second language, or a key may be a language or a field.
    """
    files = {path: [(n, by_code(row, f"{path}, line {n}")) for n, row in read_objects(path)] for path in paths}
    notes: list[str] = []
    taken: Collection[str] = wanted
    if not wanted and files:
        taken, notes = _languages([row for rows in files.values() for _, row in rows], paths)
    return [_source(path, rows, taken, bool(wanted)) for path, rows in files.items()], notes


def _source(path: Path, rows: list[Row], taken: Collection[str], named: bool) -> MixedJsonlSource:
    texts: list[tuple[int, dict[str, str]]] = []
    pairs: set[Pair] = set()
    for number, row in rows:
        where = f"{path}, line {number}"
        # Rows may be of two languages that the options do not name; those are passed by.
        codes = [c for c in row if c in taken or (named and isinstance(row[c], str) and plain_code(c))]
        if len(codes) < 2:
            raise CorpusError(
                f"{where}: found the keys {names(row)}, expected text in two languages or more, such as "
                '{"translation": {"en": "...", "de": "..."}}; a key that is no known code (ISO 639) is a language where '
                "corpus.languages names it"
            )
        kept = {code: text_of(row[code], code, where) for code in codes if code in taken}
        texts.append((number, kept))
        pairs.update(combinations(sorted(code for code in kept if row[code] is not None), 2))
    return MixedJsonlSource(path, texts, frozenset(pairs))


def _languages(rows: Sequence[dict[str, Any]], paths: Sequence[Path]) -> tuple[set[str], list[str]]:
    """The keys that are languages, and a line about the others."""
    present = Counter(key for row in rows for key in row)
    known = [key for key in present if plain_code(key) and is_known(key)]
    left_out = {key: "no known language code" for key in present if key not in known}
    values = {key: [row[key] for row in rows if row.get(key) is not None] for key in known}
    several = {key: _share(found, lambda text: len(text.split()) > 1) for key, found in values.items()}
    spaced = [key for key in known if several[key] >= _SEVERAL_WORDS]
    taken = set()
    for key in known:
        short = _share(values[key], lambda text: text.isascii() and len(text.split()) == 1)
        coded = _share(values[key], lambda text: any(c.isdigit() or c in "/:_@" for c in text))
        doubtful = key in _TEXT_FIELDS or (key in _FIELDS and several[key] < _SEVERAL_WORDS)
        if values[key] and not any(isinstance(value, str) for value in values[key]):
            left_out[key] = "no text"
        elif short >= _ONE_WORD and spaced and (key in _FIELDS or coded >= _SEVERAL_WORDS):
            left_out[key] = "its values look like identifiers"
        elif doubtful and any(key in row and sum(other in row for other in known) > 2 for row in rows):
            raise CorpusError(
                f"{names(path.name for path in paths)}: the key {key} may be a language or the name of a field (the first "
                f"value is {str(next(iter(values[key]), ''))[:60]!r}); set corpus.languages to the languages that you mean"
            )
        else:
            taken.add(key)
    if not left_out:
        return taken, []
    reasons = ", ".join(f"{key} ({reason})" for key, reason in left_out.items())
    return taken, [
        f"{names(path.name for path in paths)}: the languages are {names(sorted(taken))}; keys left out: {reasons}; set "
        "corpus.languages if that is wrong"
    ]


def _share(values: Sequence[Any], holds: Any) -> float:
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    return sum(map(holds, texts)) / len(texts) if texts else 0.0
