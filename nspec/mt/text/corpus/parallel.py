"""Files that hold one language pair each (Moses, TSV) or rows that name their languages (JSONL); read as streams."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nspec.files import sha256
from nspec.mt.languages import language_code
from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus.base import EMPTY_SIDE, Corpus, CorpusError, Pair, Segment, clean, names, pair_of
from nspec.mt.text.corpus.lines import read_columns, read_lines


class Source(ABC):
    """One place that text comes from."""

    paths: tuple[Path, ...]

    @abstractmethod
    def rows(self, pair: Pair) -> Iterator[tuple[int, str, str]]:
        """Yields (line number, text in ``pair[0]``, text in ``pair[1]``), as they stand in the file."""


@dataclass(frozen=True)
class MosesSource(Source):
    """Two files with one sentence a line; ``files`` maps language codes to them."""

    files: dict[str, Path]

    @property
    def paths(self) -> tuple[Path, ...]:  # type: ignore[override]
        return tuple(self.files[code] for code in sorted(self.files))

    def rows(self, pair: Pair) -> Iterator[tuple[int, str, str]]:
        first, second = (read_lines(self.files[code]) for code in pair)
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
            f"{self.files[pair[0]]} has {first} lines and {self.files[pair[1]]} has {second}; "
            "line n of one must be the translation of line n of the other"
        )


@dataclass(frozen=True)
class TsvSource(Source):
    """One file of source<TAB>target; a first line that is the two codes themselves says their order, and is no text."""

    path: Path
    columns: tuple[str, str]

    @property
    def paths(self) -> tuple[Path, ...]:  # type: ignore[override]
        return (self.path,)

    def rows(self, pair: Pair) -> Iterator[tuple[int, str, str]]:
        columns = self.columns
        for number, first, second in read_columns(self.path, f"{self.columns[0]}<TAB>{self.columns[1]}"):
            header = (language_code(first), language_code(second)) if number == 1 else None
            if header in (pair, pair[::-1]):
                columns = pair if header == pair else pair[::-1]
            else:
                yield (number, first, second) if columns == pair else (number, second, first)


@dataclass(frozen=True)
class JsonlSource(Source):
    """One file of JSON objects that all hold the same two languages."""

    path: Path

    @property
    def paths(self) -> tuple[Path, ...]:  # type: ignore[override]
        return (self.path,)

    def rows(self, pair: Pair) -> Iterator[tuple[int, str, str]]:
        for number, found in read_objects(self.path):
            row = by_code(found, f"{self.path}, line {number}")
            missing = [code for code in pair if code not in row]
            if missing:
                raise CorpusError(
                    f"{self.path}, line {number}: no text for {names(missing)}; found the keys {names(row)}, "
                    f"expected {pair[0]} and {pair[1]}"
                )
            first, second = (text_of(row[code], code, f"{self.path}, line {number}") for code in pair)
            yield number, first, second


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, texts by language) of a JSONL file: the object itself, or what is under "translation".

    Blank lines at the end are none.
    """
    blank = 0
    for number, line in read_lines(path):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise CorpusError(f"{path}, line {blank}: not valid JSON (the line is blank, and not at the end)")
        row = parse_json(line, f"{path}, line {number}:", unique_keys(f"{path}, line {number}"))
        if isinstance(row, dict) and "translation" in row:
            row = row["translation"]
        if not isinstance(row, dict):
            raise CorpusError(
                f"{path}, line {number}: expected an object of texts by language, found a {type(row).__name__}"
            )
        yield number, row


def parse_json(text: str, where: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """JSON text as a value.

    Args:
        text: the JSON.
        where: the beginning of error messages.
        pairs: makes the value of an object; None: a dict.

    Raises:
        CorpusError: it is no JSON, is nested too deeply or holds a number of thousands of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise CorpusError(f"{where} not valid JSON (nested too deeply)") from None
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where} not valid JSON ({error})") from error
    except CorpusError:  # of ``pairs``
        raise
    except ValueError as error:  # Python reads no whole number of more than 4300 digits
        raise CorpusError(f"{where} not valid JSON (a number has too many digits)") from error


def unique_keys(where: str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """For :func:`parse_json`: objects as dicts, and a CorpusError where a key comes again, as JSON says nothing of that."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            name, number = Counter(name for name, _ in pairs).most_common(1)[0]
            raise CorpusError(f"{where}: {shown(name)} stands there {number} times; keep one")
        return found

    return once


def by_code(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row with its keys as codes of a run: ``zh-Hans`` becomes ``zh_Hans``; what is no code stays.

    Raises:
        CorpusError: two keys are the same code.
    """
    spelled: dict[str, str] = {}
    for key in row:
        code = language_code(key) or key
        if code in spelled:
            raise CorpusError(f"{where}: the keys {spelled[code]} and {key} are the same language; keep one")
        spelled[code] = key
    return {code: row[key] for code, key in spelled.items()}


def text_of(value: Any, code: str, where: str) -> str:
    """A text, or an error that says where something else stands; null is an empty text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise CorpusError(f"{where}: the text for {code} is {shown(value)}, expected a string")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where}: the text for {code} has half a character (the lone surrogate U+{ord(value[error.start]):04X} at "
            f"position {error.start + 1}); write the line anew from its source"
        ) from None
    return value


def shown(value: Any) -> str:
    """A value of JSON for an error message, cut where it is long."""
    try:
        text = repr(value)
    except RecursionError:
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


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
            return f"{paths} has no segment with text in both languages"
        return self.looked_for(pair, split)
