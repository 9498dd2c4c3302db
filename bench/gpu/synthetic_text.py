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

KINDS = {"noun": 16, "verb": 12, "adjective": 11, "place": 6, "time": 6, "preposition": 3}
"""Kinds of words, and how many there are of each."""
ORDERS = {"qaa": "svo", "qab": "sov", "qac": "vso", "qad": "ovs"}
"""The languages and their order of subject, verb and object; ISO 639 leaves these codes to private use."""

Thing = tuple[int, int, bool]
"""A noun phrase: number of the noun and of the adjective (-1: none), and whether there are several."""
Meaning = tuple[Thing, int, bool, Thing, tuple[int, int] | None, int]
"""Subject, verb, whether it is past, object, preposition and place or None, time or -1."""


def meaning(chance: random.Random) -> Meaning:
    """One at random; common words are drawn more often than rare ones."""
    pick = lambda kind: int(KINDS[kind] * chance.random() ** 1.5)
    thing = lambda: (pick("noun"), pick("adjective") if chance.random() < 0.5 else -1, chance.random() < 0.4)
    place = (pick("preposition"), pick("place")) if chance.random() < 0.4 else None
    time = pick("time") if chance.random() < 0.4 else -1
    return thing(), pick("verb"), chance.random() < 0.5, thing(), place, time


class Language:
    """A language; its words follow from its code."""

    def __init__(self, code: str) -> None:
        self.code = code
        chance = random.Random(f"words of {code}")
        consonants, vowels = chance.sample("bdfgklmnprstvz", 9), chance.sample("aeiou", 4)
        syllables = [c + v for c in consonants for v in vowels]
        drawn = ("".join(chance.choices(syllables, k=chance.randint(2, 3))) for _ in range(10 * sum(KINDS.values())))
        words = iter(dict.fromkeys(drawn))  # each once
        self.words = {kind: list(itertools.islice(words, count)) for kind, count in KINDS.items()}
        self.plural, self.past = chance.choice(consonants), chance.choice(consonants)

    def say(self, said: Meaning) -> str:
        """The sentence in this language; it begins with the time. In qac adjectives follow, in qab prepositions do."""
        subject, verb, past, thing, place, time = said

        def phrase(noun: int, adjective: int, several: bool) -> str:
            names = [self.words["noun"][noun]] + [self.words["adjective"][adjective]] * (adjective >= 0)
            return " ".join(name + self.plural * several for name in (names if self.code == "qac" else names[::-1]))

        parts = {"s": phrase(*subject), "v": self.words["verb"][verb] + self.past * past, "o": phrase(*thing)}
        words = [self.words["time"][time]] * (time >= 0) + [parts[part] for part in ORDERS[self.code]]
        if place is not None:
            where = [self.words["preposition"][place[0]], self.words["place"][place[1]]]
            words += where[::-1] if self.code == "qab" else where
        return " ".join(words) + "."


def write(folder: Path, train: int, valid: int, test: int, seed: int = 1) -> None:
    """Writes Moses pairs of the first language and each other one: so many sentences a split, none in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    pivot, *others = map(Language, ORDERS)
    for language in others:
        fresh = _distinct(random.Random(f"{seed} {language.code}"))
        for split, size in {"test": test, "valid": valid, "train": train}.items():
            said = list(itertools.islice(fresh, size))
            for one in (pivot, language):
                path = folder / f"{split}.{pivot.code}-{language.code}.{one.code}"
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
    print(f"{args.folder}: {args.train} + {args.valid} + {args.test} sentences of {len(ORDERS) - 1} languages each")


if __name__ == "__main__":
    main()
