"""A small multilingual corpus made from a seed: four invented languages with words, word orders and endings of their own.

    python -m bench.gpu.synthetic_text FOLDER --train 6000

Sentences say who did what to whom, where and when. Words are strings of syllables, verb and object may change places,
adjectives may follow the noun, and plural and past are endings: a translation follows from its source, and a small model
learns it within a minute. Files are Moses pairs with the first language, as ``corpus.type=files`` of ``nspec run`` reads
them.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KINDS = {"noun": 16, "verb": 12, "adjective": 11, "place": 6, "time": 6, "preposition": 3}
"""Kinds of words, and how many there are of each."""


class Thing(NamedTuple):
    """A noun phrase: number of the noun and of the adjective (-1: none), and whether there are several."""

    noun: int
    adjective: int
    several: bool


class Meaning(NamedTuple):
    """What a sentence says; ``place`` is a preposition and a place, or None; ``time`` is -1 for none."""

    subject: Thing
    verb: int
    past: bool
    object: Thing
    place: tuple[int, int] | None
    time: int


def meaning(chance: random.Random) -> Meaning:
    """One at random; common words are drawn more often than rare ones."""
    pick = lambda kind: int(KINDS[kind] * chance.random() ** 1.5)
    thing = lambda: Thing(pick("noun"), pick("adjective") if chance.random() < 0.5 else -1, chance.random() < 0.4)
    place = (pick("preposition"), pick("place")) if chance.random() < 0.4 else None
    time = pick("time") if chance.random() < 0.4 else -1
    return Meaning(thing(), pick("verb"), chance.random() < 0.5, thing(), place, time)


class Language:
    """A language.

    Args:
        code: its name; the words follow from it.
        order: of subject, verb and object, such as ``sov``.
        adjective_last: whether adjectives follow their noun.
        place_word_last: whether the word for near, behind, in follows the place.
    """

    def __init__(self, code: str, order: str, adjective_last: bool, place_word_last: bool) -> None:
        self.code, self._order = code, order
        self._adjective_last, self._place_word_last = adjective_last, place_word_last
        chance = random.Random(f"words of {code}")
        consonants, vowels = chance.sample("bdfgklmnprstvz", 9), chance.sample("aeiou", 4)
        syllables = [c + v for c in consonants for v in vowels]
        drawn = ("".join(chance.choices(syllables, k=chance.randint(2, 3))) for _ in itertools.count())
        words = iter(dict.fromkeys(itertools.islice(drawn, 10 * sum(KINDS.values()))))  # each once
        self._words = {kind: list(itertools.islice(words, count)) for kind, count in KINDS.items()}
        self._plural, self._past = chance.choice(consonants), chance.choice(consonants)

    def say(self, said: Meaning) -> str:
        """The sentence in this language; it begins with the time."""

        def phrase(thing: Thing) -> str:
            ending = self._plural if thing.several else ""
            parts = [self._words["noun"][thing.noun] + ending]
            if thing.adjective >= 0:
                parts.insert(1 if self._adjective_last else 0, self._words["adjective"][thing.adjective] + ending)
            return " ".join(parts)

        verb = self._words["verb"][said.verb] + (self._past if said.past else "")
        parts = {"s": phrase(said.subject), "v": verb, "o": phrase(said.object)}
        words = [self._words["time"][said.time]] if said.time >= 0 else []
        words += [parts[part] for part in self._order]
        if said.place is not None:
            place = [self._words[kind][n] for kind, n in zip(("preposition", "place"), said.place)]
            words += reversed(place) if self._place_word_last else place
        return " ".join(words) + "."


PIVOT = Language("qaa", "svo", adjective_last=False, place_word_last=False)
LANGUAGES = (
    Language("qab", "sov", adjective_last=False, place_word_last=True),
    Language("qac", "vso", adjective_last=True, place_word_last=False),
    Language("qad", "ovs", adjective_last=False, place_word_last=False),
)
"""The other languages; the codes are from the range that ISO 639 leaves to private use."""


def write(folder: Path, train: int, valid: int, test: int, seed: int = 1) -> None:
    """Writes Moses pairs of the first language and each other one: so many sentences a split, none in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        fresh = _distinct(random.Random(f"{seed} {language.code}"))
        for split, size in {"test": test, "valid": valid, "train": train}.items():
            said = list(itertools.islice(fresh, size))
            for one in (PIVOT, language):
                path = folder / f"{split}.{PIVOT.code}-{language.code}.{one.code}"
                path.write_text("".join(f"{one.say(what)}\n" for what in said), encoding="utf-8")


def _distinct(chance: random.Random) -> Iterator[Meaning]:
    seen: set[Meaning] = set()
    while True:
        if (said := meaning(chance)) not in seen:
            seen.add(said)
            yield said


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.synthetic_text", description=__doc__)
    parser.add_argument("folder", type=Path)
    for split, size in {"train": 6000, "valid": 100, "test": 60}.items():
        parser.add_argument(f"--{split}", type=int, default=size, help=f"sentences (default: {size}) of each language")
    args = parser.parse_args()
    write(args.folder, args.train, args.valid, args.test)
    print(f"{args.folder}: {args.train} + {args.valid} + {args.test} sentences of {len(LANGUAGES)} languages each")


if __name__ == "__main__":
    main()
