"""Sentences composed from CLDR data: any locale, any size, no file and no download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations, count
from typing import Any

from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus.base import Corpus, CorpusError, Pair, Segment
from nspec.mt.text.corpus.base import requested_languages as requested
from nspec.mt.text.corpus.cldr_content import VERSION, Composer, Fragment, Inventory
from nspec.mt.text.corpus.cldr_render import BABEL_VERSION, Renderer, inventory

DEFAULT_LANGUAGES = ("fa", "pl", "ar", "he", "nl", "de", "it", "es", "en")
DEFAULT_SIZES = {"train": 20000, "valid": 200, "test": 200}
# English words of a sentence.
LEAST_WORDS, MOST_WORDS = 4, 20
# The English text decides which split a content belongs to: of 20 parts one is valid, one test.
BUCKETS = 20
# Where so large a share of contents cannot be said in a language, its locale holds too little to be of use.
MOST_TRIES = 20


class CldrCorpus(Corpus):
    """The same contents said in every language, from dates, amounts, names and lists of CLDR.

    A segment is number n of a stream of contents that only the seed and the split determine. No English text is in two
    splits, whatever the seeds. A pair takes the first segments that both languages can say, so that all pairs of
    languages with complete data have the same ones.
    """

    def __init__(self, config: CorpusConfig, seed: int) -> None:
        languages = requested(config) or list(DEFAULT_LANGUAGES)
        super().__init__(config, seed, languages, combinations(sorted(languages), 2))
        self.renderers = {code: Renderer(code) for code in languages}
        self.streams = {split: _Stream(self.seed_of(split), split) for split in DEFAULT_SIZES}
        self.said: dict[tuple[str, str], list[str | None]] = {(code, s): [] for code in languages for s in self.streams}

    def limit(self, split: str) -> int:
        return 0  # segments() stops by itself

    def size(self, split: str) -> int:
        """How many segments every pair has in ``split``."""
        return super().limit(split) or DEFAULT_SIZES[split]

    def segments(self, pair: Pair, split: str) -> Iterator[Segment]:
        size, found = self.size(split), 0
        for number in count():
            if found == size:
                return
            if number >= 1000 + MOST_TRIES * size:
                raise CorpusError(
                    f"CLDR has too little data to compose {size} sentences for {'-'.join(pair)}: only {found} of "
                    f"{number} contents can be said in both; take another language"
                )
            first, second = (self._text(code, split, number) for code in pair)
            if first and second:
                found += 1
                yield str(number), first, second

    def texts(self, code: str, split: str, most: int) -> Iterator[str]:
        """The sentences of one language alone: what can be said in it of the first ``most`` contents of a split."""
        for number in range(most):
            if text := self._text(code, split, number):
                yield text

    def _text(self, code: str, split: str, number: int) -> str | None:
        said = self.said[code, split]
        while len(said) <= number:
            said.append(self.renderers[code].say(*self.streams[split][len(said)]))
        return said[number]

    def identity(self) -> Any:
        # A sample of the text stands for frames and CLDR data, should either change under the same version.
        sample = [self._text(code, split, number) for code, split in self.said for number in range(20)]
        digest = hashlib.sha256("\n".join(map(str, sample)).encode()).hexdigest()
        return {"babel": BABEL_VERSION, "contents": VERSION, "languages": self.languages, "sample": digest}


class _Stream:
    """The contents of a split, drawn as they are asked for."""

    def __init__(self, seed: int, split: str) -> None:
        self.split = split
        self.composer = Composer(shared_inventory(), f"nspec cldr {VERSION} {seed} {split}")
        self.english = Renderer("en")
        self.contents: list[tuple[list[str], list[Fragment]]] = []
        self.seen: set[str] = set()

    def __getitem__(self, number: int) -> tuple[list[str], list[Fragment]]:
        while len(self.contents) <= number:
            content = self.composer.content()
            text = self.english.say(*content)
            if not text or not LEAST_WORDS <= len(text.split()) <= MOST_WORDS:
                continue
            if text not in self.seen and split_of(text) == self.split:
                self.seen.add(text)
                self.contents.append(content)
        return self.contents[number]


def split_of(english: str) -> str:
    """The one split that an English text may be in."""
    bucket = int.from_bytes(hashlib.blake2b(english.encode(), digest_size=8).digest(), "big") % BUCKETS
    return {0: "test", 1: "valid"}.get(bucket, "train")


@lru_cache(maxsize=1)
def shared_inventory() -> Inventory:
    """The codes of every run: those that all default languages have names for."""
    return inventory(sorted(DEFAULT_LANGUAGES, key=lambda code: code != "en"))
