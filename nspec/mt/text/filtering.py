"""Which training sentences a run may see: none with a sentence that it is measured on and, where asked for, none twice."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from nspec.mt.text.corpus.base import Pair

IN_EVALUATION = "in valid or test"
IN_OTHER_EVALUATION = "in valid or test of another pair"
DUPLICATE = "duplicate"


class TrainingFilter:
    """Leaves training sentences out, with a count of each reason. Texts are compared as they are, so they must be clean.

    A sentence is held out whatever its length: what is measured on must not have been trained on, and a short sentence
    that is in the text of many pairs is no better for it.

    Args:
        across_pairs: sentences of valid and test are held out of the training text of all pairs with their language, not
            of that of their own pair alone.
        deduplicate: of equal ones the first is kept.
    """

    def __init__(self, across_pairs: bool, deduplicate: bool) -> None:
        self.across_pairs, self.deduplicate = across_pairs, deduplicate
        # Digests of sentences, by pair and language, and by language whatever the pair.
        self._own: dict[Pair, tuple[set[int], set[int]]] = defaultdict(lambda: (set(), set()))
        self._any: dict[str, set[int]] = defaultdict(set)

    def hold_out(self, pair: Pair, texts: Pair) -> None:
        """Notes a pair of sentences of valid or test; ``pair`` are their languages."""
        for language, known, text in zip(pair, self._own[pair], texts):
            number = _digest(text)
            known.add(number)
            self._any[language].add(number)

    def kept(self, pair: Pair, training: Iterable[Pair], dropped: Counter[str]) -> Iterator[Pair]:
        """Yields what of ``training`` may be seen, and counts the others in ``dropped``, by reason.

        All of valid and test must have been held out before.
        """
        seen: set[int] = set()
        for texts in training:
            reason = self._held_out(pair, texts)
            if self.deduplicate and not reason:
                number = _digest("\n".join(texts))
                reason = DUPLICATE if number in seen else ""
                seen.add(number)
            if reason:
                dropped[reason] += 1
            else:
                yield texts

    def _held_out(self, pair: Pair, texts: Pair) -> str:
        first, second = map(_digest, texts)
        if first in self._own[pair][0] or second in self._own[pair][1]:
            return IN_EVALUATION
        if self.across_pairs and (first in self._any[pair[0]] or second in self._any[pair[1]]):
            return IN_OTHER_EVALUATION
        return ""


def _digest(text: str) -> int:
    """64 bits that stand for a text: sets of them take a fraction of the memory of the texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
