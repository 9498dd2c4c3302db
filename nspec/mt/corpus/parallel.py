"""Files that hold one language pair each (Moses, TSV) or rows that name their languages (JSONL); read as streams."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from nspec.files import sha256
from nspec.mt.config import CorpusConfig
from nspec.mt.corpus.base import (
    EMPTY_SIDE,
    FILE_CODE,
    Corpus,
    CorpusError,
    Pair,
    Segment,
    clean,
    names,
    pair_of,
)
from nspec.mt.corpus.lines import read_columns, read_lines


class Source(ABC):
    """One place that text comes from."""

    paths: tuple[Path, ...]

    @abstractmethod
    def rows(self, pair: Pair) -> Iterator[tuple[int, str, str]]:
        """Yields (line number, text in ``pair[0]``, text in ``pair[1]``), as they stand in the file."""


@dataclass(frozen=True)
class MosesSource(Source):
    """Two files with one sentence a line; ``sides`` maps language codes to them."""

    sides: dict[str, Path]

    @property
    def paths(self) -> tuple[Path, ...]:  # type: ignore[override]
        return tuple(self.sides[code] for code in sorted(self.sides))

    def rows(self, pair: Pair) -> Iterator[tuple[int, str, str]]:
        first, second = (read_lines(self.sides[code]) for code in pair)
        number = 0
        for number, text in first:
            other = next(second, None)
            if other is None:
                self._unequal(pair, number + sum(1 for _ in first), number - 1)
            else:
                yield number, text, other[1]
        if rest := sum(1 for _ in second):
            self._unequal(pair, number, number + rest)

    def _unequal(self, pair: Pair, first: int, second: int) -> None:
        raise CorpusError(
            f"{self.sides[pair[0]]} has {first} lines and {self.sides[pair[1]]} has {second}; "
            "line n of one must be the translation of line n of the other"
        )


@dataclass(frozen=True)
class TsvSource(Source):
    """One file of source<TAB>target."""

    path: Path
    columns: tuple[str, str]

    @property
    def paths(self) -> tuple[Path, ...]:  # type: ignore[override]
        return (self.path,)

    def rows(self, pair: Pair) -> Iterator[tuple[int, str, str]]:
        swapped = self.columns != pair
        for number, first, second in read_columns(self.path, f"{self.columns[0]}<TAB>{self.columns[1]}"):
            yield (number, second, first) if swapped else (number, first, second)


@dataclass(frozen=True)
class JsonlSource(Source):
    """One file of JSON objects that all hold the same two languages."""

    path: Path

    @property
    def paths(self) -> tuple[Path, ...]:  # type: ignore[override]
        return (self.path,)

    def rows(self, pair: Pair) -> Iterator[tuple[int, str, str]]:
        for number, row in read_objects(self.path):
            missing = [code for code in pair if code not in row]
            if missing:
                raise CorpusError(
                    f"{self.path}, line {number}: no text for {names(missing)}; found the keys {names(row)}, "
                    f"expected {pair[0]} and {pair[1]}"
                )
            first, second = (text_of(row[code], code, f"{self.path}, line {number}") for code in pair)
            yield number, first, second


@dataclass
class MixedJsonlSource(Source):
    """One file of JSON objects, each with its own languages; read once and kept in memory."""

    path: Path
    wanted: frozenset[str]
    texts: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    pairs: set[Pair] = field(default_factory=set)

    def __post_init__(self) -> None:
        for number, row in read_objects(self.path):
            codes = [c for c in row if c in self.wanted or (isinstance(row[c], str) and re.fullmatch(FILE_CODE, c))]
            if len(codes) < 2:
                raise CorpusError(
                    f"{self.path}, line {number}: found the keys {names(row)}, expected text in two languages or more, "
                    'such as {"translation": {"en": "...", "de": "..."}}'
                )
            kept = [code for code in codes if not self.wanted or code in self.wanted]
            where = f"{self.path}, line {number}"
            self.texts.append((number, {code: text_of(row[code], code, where) for code in kept}))
            self.pairs.update(combinations(sorted(kept), 2))

    @property
    def paths(self) -> tuple[Path, ...]:  # type: ignore[override]
        return (self.path,)

    def rows(self, pair: Pair) -> Iterator[tuple[int, str, str]]:
        for number, row in self.texts:
            if pair[0] in row and pair[1] in row:
                yield number, row[pair[0]], row[pair[1]]


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, texts by language) of a JSONL file: the object itself, or what is under "translation"."""
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{path}, line {number}: not valid JSON ({error})") from error
        if isinstance(row, dict) and "translation" in row:
            row = row["translation"]
        if not isinstance(row, dict):
            raise CorpusError(
                f"{path}, line {number}: expected an object of texts by language, found a {type(row).__name__}"
            )
        yield number, row


def text_of(value: Any, code: str, where: str) -> str:
    """A text, or an error that says where something else stands; null is an empty text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(f"{where}: the text for {code} is {value!r}, expected a string")
    return value


class PairCorpus(Corpus):
    """Text read from sources as streams: nothing is kept in memory but mixed JSONL files.

    Args:
        config: the options.
        seed: of samples.
        languages: the codes of the corpus.
        sources: by pair and split, where the text is; a segment's id is its line number, counted through them.
        looked_for: (pair, split) -> the names that data was looked for under, for the error about missing data.
        needed: a pair belongs to the corpus if it has text in one of these splits.
    """

    def __init__(
        self,
        config: CorpusConfig,
        seed: int,
        languages: list[str],
        sources: dict[Pair, dict[str, list[Source]]],
        looked_for: Callable[[Pair, str], str],
        needed: Sequence[str] = ("train",),
    ) -> None:
        there = [pair for pair, splits in sources.items() if any(splits.get(split) for split in needed)]
        super().__init__(config, seed, languages, there)
        self.sources = sources
        self.looked_for = looked_for

    def segments(self, pair: Pair, split: str) -> Iterator[Segment]:
        before = 0
        for source in self.sources.get(pair, {}).get(split, []):
            number = 0
            for number, first, second in source.rows(pair):
                first, second = clean(first), clean(second)
                if first and second:
                    yield str(before + number), first, second
                else:
                    self.skip((pair, split), EMPTY_SIDE)
            before += number

    def identity(self) -> Any:
        found: dict[str, list[str]] = defaultdict(list)
        sizes: dict[Path, list[Any]] = {}
        for pair, splits in self.sources.items():
            for split, sources in splits.items():
                for path in (path for source in sources for path in source.paths):
                    sizes.setdefault(path, [path.stat().st_size, sha256(path)])
                    found[f"{'-'.join(pair)} {split}"].append(path.name)
        return {"files": found, "content": {path.name: sizes[path] for path in sizes}}

    def explain_missing(self, pair: Pair, split: str) -> str:
        sources = self.sources.get(pair_of(*pair), {}).get(split, [])
        if sources:
            paths = names(str(path) for source in sources for path in source.paths)
            return f"{paths} has no segment with text on both sides"
        return self.looked_for(pair, split)
