"""What every corpus offers, the text clean-up that all of them share, and the directions that a run translates."""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain, combinations, islice
from typing import Any

from nspec.mt.languages import CODE, language_code, languages_of_task, task_of
from nspec.mt.languages import FILE_CODE as FILE_CODE
from nspec.mt.text.config import SPLITS, CorpusConfig

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
Segment = tuple[str, str, str]

# The options that tell what the text is. A path does not: what is read there is hashed instead.
FINGERPRINTED = (
    *("type", "languages", "pivot", "directions", "name", "subset", "valid_split", "test_split"),
    *("train_sentences", "valid_sentences", "test_sentences"),
)
EMPTY_SIDE = "empty side"


class CorpusError(ValueError):
    """Something is wrong with the data or with what was asked of it; the message says where, and what to do."""


def clean(text: str) -> str:
    """NFC, stripped, every run of white space (line breaks and no-break spaces too) one plain space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def pair_of(first: str, second: str) -> Pair:
    """The two codes of a pair, sorted."""
    return (first, second) if first < second else (second, first)


def split_direction(direction: str) -> Pair:
    """``"en-de"`` as ``("en", "de")``: source, then target; see :func:`~nspec.mt.languages.languages_of_task`.

    Raises:
        ValueError: it is not two different language codes joined by "-".
    """
    try:
        source, target = languages_of_task(direction)
    except ValueError:
        source = target = ""
    if source == target or not (CODE.fullmatch(source) and CODE.fullmatch(target)):
        raise ValueError(
            f"corpus.directions: {direction!r} is not a direction; expected two different language codes such as en-de "
            "(write '_' in a code: en-pt_BR)"
        )
    return source, target


def requested_languages(config: CorpusConfig) -> list[str]:
    """The languages that the options name, in their order; empty where the corpus is to give all that it has.

    Raises:
        ValueError: a code or a direction is not well formed, or a direction needs a language that is neither listed nor
            the pivot.
    """
    listed = list(dict.fromkeys(map(_code, config.languages)))
    needed = list(dict.fromkeys(code for direction in config.directions for code in split_direction(direction)))
    pivot = pivot_of(config)
    if config.directions:
        for code in needed:
            if listed and code not in (*listed, pivot):
                raise ValueError(f"corpus.directions needs {code}, which corpus.languages ({', '.join(listed)}) lacks")
        return list(dict.fromkeys([*listed, *needed]))
    if listed and pivot and pivot not in listed:
        listed.append(pivot)
    return listed


def pivot_of(config: CorpusConfig) -> str:
    """The code of ``corpus.pivot``, or "" where there is none.

    Raises:
        ValueError: it is not a code.
    """
    return _code(config.pivot) if config.pivot else ""


def _code(text: str) -> str:
    code = language_code(text) if isinstance(text, str) else None
    if not code:
        raise ValueError(f"corpus.languages: {text!r} is not a language code; expected one such as de or pt_BR")
    return code


class Corpus(ABC):
    """Parallel text in training, validation and test parts.

    Attributes:
        config: the options that it was opened with.
        seed: of the samples that the size limits take of the training text; ``config.seed`` is that of the other two parts.
        languages: the codes it has, in the order asked for.
        pairs: sorted code pairs that it has training data for, sorted.
        notes: what a person should know of how the text was read, a line each.
    """

    def __init__(self, config: CorpusConfig, seed: int, languages: list[str], pairs: Iterable[Pair]) -> None:
        self.config = config
        self.seed = seed
        self.languages = languages
        self.pairs = sorted(set(pairs))
        self.notes: list[str] = []
        self._skipped: dict[object, Counter[str]] = {}

    @abstractmethod
    def segments(self, pair: Pair, split: str) -> Iterator[Segment]:
        """All segments of a pair in corpus order as (id, text in ``pair[0]``, text in ``pair[1]``), clean, no limit."""

    @abstractmethod
    def identity(self) -> Any:
        """JSON-able facts that determine the text beside the options: file hashes, versions, seeds."""

    def explain_missing(self, pair: Pair, split: str) -> str:
        """Why ``pair`` has nothing in ``split``, for the error message."""
        return "every segment lacks one of the two texts"

    def limit(self, split: str) -> int:
        """The most segments of one pair in ``split``; 0: no limit."""
        return {
            "train": self.config.train_sentences,
            "valid": self.config.valid_sentences,
            "test": self.config.test_sentences,
        }[split]

    def read(self, pair: Pair, split: str) -> Iterator[Pair]:
        """Yields (text in ``pair[0]``, text in ``pair[1]``) in corpus order.

        A size limit keeps the segments whose ids hash lowest, whatever the pair: a smaller limit takes part of what a
        larger one takes, and a multiway corpus gives every pair the same segments.

        Args:
            pair: two codes, sorted, one of :attr:`pairs`.
            split: "train", "valid" or "test".

        Raises:
            ValueError: there is no such split or pair.
            CorpusError: a file is malformed; the message names file and line.
        """
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}; expected train, valid or test")
        if pair not in self.pairs:
            raise ValueError(f"the corpus has no pair {'-'.join(pair)}; it has {names(map('-'.join, self.pairs))}")
        self._skipped[pair, split] = Counter()
        limit, segments = self.limit(split), self.segments(pair, split)
        start = list(islice(segments, limit + 1)) if limit else []
        if len(start) <= limit:  # nothing to choose: no ranks, no sorting
            for _, first, second in chain(start, segments):
                yield first, second
            return
        keyed = (
            (self._rank(split, name), order, first, second)
            for order, (name, first, second) in enumerate(chain(start, segments))
        )
        for _, _, first, second in sorted(heapq.nsmallest(limit, keyed), key=lambda segment: segment[1]):
            yield first, second

    def seed_of(self, split: str) -> int:
        """The seed of a part of the text."""
        return self.seed if split == "train" else self.config.seed

    def _rank(self, split: str, name: str) -> bytes:
        return hashlib.blake2b(f"{self.seed_of(split)} {split} {name}".encode(), digest_size=8).digest()

    def note(self, text: str) -> None:
        """Says something of how the text is read, at once and in ``meta.json``."""
        logger.warning("%s", text)
        self.notes.append(text)

    def skip(self, key: object, reason: str, count: int = 1) -> None:
        """Counts segments that were left out; ``key`` tells what was being read (a pair and split, a file)."""
        self._skipped.setdefault(key, Counter())[reason] += count

    @property
    def skipped(self) -> dict[str, int]:
        """How many segments were left out so far, by reason. Reading a pair and split again does not add to it."""
        return dict(sum(self._skipped.values(), Counter()))  # adding drops the reasons that never occurred

    def check(self, pair: Pair) -> None:
        """Makes sure that a pair has text in every split.

        Raises:
            CorpusError: it has not; the message names pair and split, and what was looked for.
        """
        for split, part in zip(SPLITS, ("training", "validation", "test")):
            if pair not in self.pairs or next(self.segments(pair, split), None) is None:
                why = self.explain_missing(pair, split)
                raise CorpusError(f"there is no {part} data for {'-'.join(pair)}: {why}")

    def fingerprint(self) -> str:
        """A SHA-256 over everything that determines the text: equal fingerprints mean equal text."""
        options = {field: getattr(self.config, field) for field in FINGERPRINTED}
        seeds = {} if self.config.seed == self.seed else {"evaluation_seed": self.config.seed}
        facts = {"options": options, "seed": self.seed, **seeds, "identity": self.identity()}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class AlignedCorpus(Corpus):
    """Segments with ids in memory; the same id is the same content in every language.

    Args:
        config: the options.
        seed: see :class:`Corpus`.
        texts: clean, non-empty text by language and id.
        parts: by split, the ids in corpus order.
    """

    def __init__(
        self, config: CorpusConfig, seed: int, texts: dict[str, dict[str, str]], parts: dict[str, Iterable[str]]
    ) -> None:
        super().__init__(config, seed, list(texts), combinations(sorted(texts), 2))
        self.texts = texts
        self.parts = parts

    def segments(self, pair: Pair, split: str) -> Iterator[Segment]:
        first, second = self.texts[pair[0]], self.texts[pair[1]]
        for name in self.parts[split]:
            if name in first and name in second:
                yield name, first[name], second[name]


def names(items: Iterable[str], most: int = 40) -> str:
    """Up to ``most`` items with commas, and how many more there are; "nothing" where there are none."""
    listed = list(items)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more if listed else "nothing"


def check_languages(asked: Iterable[str], present: Iterable[str], where: str) -> None:
    """Raises :class:`CorpusError` where a language asked for is not there, naming it and those present."""
    present = sorted(present)
    missing = [code for code in asked if code not in present]
    if missing:
        raise CorpusError(f"{where} has no {names(missing)}; it has {names(present, 100)}")


def tasks_of(config: CorpusConfig, corpus: Corpus) -> list[str]:
    """The directions of a run such as ``"en-de"``.

    They are ``config.directions`` where given; else to and from ``config.pivot``; else every pair both ways.
    Languages that were not named in the options and have no data with the pivot are left out.

    Raises:
        ValueError: a direction is malformed.
        CorpusError: the corpus lacks a pair that is asked for, or there is no direction at all.
    """
    for direction in config.directions:
        source, target = split_direction(direction)
        check_languages([source, target], corpus.languages, "the corpus")
        if pair_of(source, target) not in corpus.pairs:
            raise _no_pair(corpus, pair_of(source, target))
    if config.directions:
        return list(dict.fromkeys(task_of(*split_direction(direction)) for direction in config.directions))
    pivot, asked = pivot_of(config), set(map(_code, config.languages))
    if not pivot:
        tasks = [task for first, second in corpus.pairs for task in (task_of(first, second), task_of(second, first))]
        paired = {code for pair in corpus.pairs for code in pair}
        for code in sorted(asked):
            if code not in paired:
                raise CorpusError(f"{code} has no training data with another language; pairs: {_pairs(corpus)}")
    else:
        check_languages([pivot], corpus.languages, "corpus.pivot: the corpus")
        tasks = []
        for code in corpus.languages:
            if code != pivot and pair_of(code, pivot) in corpus.pairs:
                tasks += [task_of(pivot, code), task_of(code, pivot)]
            elif code != pivot and code in asked:
                raise _no_pair(corpus, pair_of(code, pivot))
    if not tasks:
        raise CorpusError(f"there is no direction: languages {names(corpus.languages)}, pivot {pivot or 'none'}")
    return tasks


def _pairs(corpus: Corpus) -> str:
    return names(map("-".join, corpus.pairs))


def _no_pair(corpus: Corpus, pair: Pair) -> CorpusError:
    why = corpus.explain_missing(pair, "train")
    return CorpusError(
        f"there is no training data for {'-'.join(pair)}: {why}; pairs with training data: {_pairs(corpus)}"
    )
