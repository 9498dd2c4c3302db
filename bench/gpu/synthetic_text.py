"""A small multilingual corpus made from a seed: four languages with words, word orders and endings of their own.

    python -m bench.gpu.synthetic_text FOLDER --train 6000

Sentences say who did what to whom, where and when. English is the pivot; the three others are invented: their words are
strings of syllables, verb and object may change places, adjectives may follow the noun, and plural and past are endings.
So a translation follows from its source, except that English hides the number of some nouns (fish), and a small model
learns it within a minute. Files are Moses pairs, as ``corpus.type=files`` of ``nspec run`` reads them.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PIVOT = "en"
_WORDS = """
teacher doctor farmer child king singer dog cat horse fish wolf house door table lamp book letter picture ring flower
call follow find watch carry paint sell move hear open want bring
old young small big red green quiet happy new heavy
garden bridge school market river forest
today yesterday often never again soon
near behind in
"""
NOUNS, VERBS, ADJECTIVES, PLACES, TIMES, PREPOSITIONS = (line.split() for line in _WORDS.strip().splitlines())
IRREGULAR = {"child": "children", "wolf": "wolves", "fish": "fish"}
PAST = {"find": "found", "sell": "sold", "hear": "heard", "bring": "brought"}


@dataclass(frozen=True)
class Thing:
    """A noun phrase: number of the noun and of the adjective (-1: none), and whether there are several."""

    noun: int
    adjective: int
    several: bool


@dataclass(frozen=True)
class Meaning:
    """What a sentence says; ``place`` is a preposition and a place, or None; ``time`` is -1 for none."""

    subject: Thing
    verb: int
    past: bool
    object: Thing
    place: tuple[int, int] | None
    time: int


def meaning(chance: random.Random) -> Meaning:
    """One at random; common words are drawn more often than rare ones."""

    def pick(words: Sequence[str]) -> int:
        return int(len(words) * chance.random() ** 1.5)

    def thing() -> Thing:
        return Thing(pick(NOUNS), pick(ADJECTIVES) if chance.random() < 0.5 else -1, chance.random() < 0.4)

    place = (pick(PREPOSITIONS), pick(PLACES)) if chance.random() < 0.4 else None
    time = pick(TIMES) if chance.random() < 0.4 else -1
    return Meaning(thing(), pick(VERBS), chance.random() < 0.5, thing(), place, time)


def english(said: Meaning) -> str:
    """The sentence in English: subject, verb, object, place, time."""

    def phrase(thing: Thing) -> str:
        noun = NOUNS[thing.noun]
        if thing.several:
            noun = IRREGULAR.get(noun, noun + "s")
        return " ".join(["the", *([ADJECTIVES[thing.adjective]] if thing.adjective >= 0 else []), noun])

    verb = VERBS[said.verb]
    if said.past:
        verb = PAST.get(verb) or (verb[:-1] + "ied" if verb == "carry" else verb + ("d" if verb[-1] == "e" else "ed"))
    elif not said.subject.several:
        verb = "carries" if verb == "carry" else verb + ("es" if verb.endswith("ch") else "s")
    words = [phrase(said.subject), verb, phrase(said.object)]
    if said.place is not None:
        words += [PREPOSITIONS[said.place[0]], "the", PLACES[said.place[1]]]
    if said.time >= 0:
        words.append(TIMES[said.time])
    return " ".join(words) + "."


class Invented:
    """A language of its own.

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
        taken: set[str] = set()

        def word(length: int) -> str:
            while (made := "".join(chance.choices(syllables, k=length))) in taken:
                pass
            taken.add(made)
            return made

        def words(like: Sequence[str]) -> list[str]:
            return [word(chance.randint(2, 3)) for _ in like]

        self._nouns, self._verbs, self._adjectives = words(NOUNS), words(VERBS), words(ADJECTIVES)
        self._places, self._times, self._prepositions = words(PLACES), words(TIMES), words(PREPOSITIONS)
        self._plural, self._past = chance.choice(consonants), chance.choice(consonants)

    def say(self, said: Meaning) -> str:
        """The sentence in this language; it begins with the time."""

        def phrase(thing: Thing) -> str:
            ending = self._plural if thing.several else ""
            parts = [self._nouns[thing.noun] + ending]
            if thing.adjective >= 0:
                parts.insert(1 if self._adjective_last else 0, self._adjectives[thing.adjective] + ending)
            return " ".join(parts)

        verb = self._verbs[said.verb] + (self._past if said.past else "")
        parts = {"s": phrase(said.subject), "v": verb, "o": phrase(said.object)}
        words = [self._times[said.time]] if said.time >= 0 else []
        words += [parts[part] for part in self._order]
        if said.place is not None:
            place = [self._prepositions[said.place[0]], self._places[said.place[1]]]
            words += reversed(place) if self._place_word_last else place
        return " ".join(words) + "."


LANGUAGES = (
    Invented("qaa", "sov", adjective_last=False, place_word_last=True),
    Invented("qab", "vso", adjective_last=True, place_word_last=False),
    Invented("qac", "ovs", adjective_last=False, place_word_last=False),
)
"""The invented languages; their codes are from the range that ISO 639 leaves to private use."""


def write(folder: Path, train: int, valid: int, test: int, seed: int = 1) -> None:
    """Writes Moses pairs of English and each invented language.

    Args:
        folder: made if it is not there.
        train: sentence pairs of each language; the two below likewise. No sentence of one split is in another.
        valid: for validation.
        test: for the scores.
        seed: of the sentences; the languages are always the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"test": test, "valid": valid, "train": train}
    for language in LANGUAGES:
        chance = random.Random(f"{seed} {language.code}")
        fresh = _distinct(chance)
        for split, size in sizes.items():
            said = list(itertools.islice(fresh, size))
            for code, lines in ((PIVOT, map(english, said)), (language.code, map(language.say, said))):
                name = f"{split}.{PIVOT}-{language.code}.{code}"
                (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _distinct(chance: random.Random) -> Iterator[Meaning]:
    seen: set[Meaning] = set()
    while True:
        said = meaning(chance)
        if said not in seen:
            seen.add(said)
            yield said


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.synthetic_text", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=6000, help="training pairs of each language")
    parser.add_argument("--valid", type=int, default=100, help="validation pairs of each language")
    parser.add_argument("--test", type=int, default=60, help="test pairs of each language")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    write(args.folder, args.train, args.valid, args.test, args.seed)
    pairs = ", ".join(f"{PIVOT}-{language.code}" for language in LANGUAGES)
    print(f"{args.folder}: {pairs}; {args.train} + {args.valid} + {args.test} sentences of each")


if __name__ == "__main__":
    main()
