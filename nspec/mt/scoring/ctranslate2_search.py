"""The search by CTranslate2: the same options, limits and special tokens as in :mod:`nspec.mt.scoring.search`.

Both search alike: hypotheses are extended by the best of twice as many candidates, those that end among the first
``beam`` of them are kept, and the search ends when there are as many as beams; the score is the log-probability over the
length, tag and end counted, to the power of the penalty. What differs: probabilities leave out tokens that are never
chosen, a translation of no word at all is kept only where it is the best first step, and sums are rounded otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.search import SpecialTokens

_NO_PENALTY = 1e-30  # with 0 CTranslate2 ends when the first hypothesis does


def why_not(decode: DecodeConfig) -> str:
    """Why CTranslate2 does not search as these options say; empty where it does."""
    if decode.beam > 1 and (decode.repetition_penalty != 1 or decode.no_repeat_ngram_size):
        option = "no_repeat_ngram_size" if decode.no_repeat_ngram_size else "repetition_penalty"
        return (
            f"with decode.beam {decode.beam}, decode.{option} changes the probabilities of all words in CTranslate2, and "
            "those of the repeated ones in transformers"
        )
    return ""


class CTranslate2Search:
    """Searches with a converted model.

    Args:
        translator: a ``ctranslate2.Translator``.
        names: of the rows of its embeddings, by which it knows tokens.
    """

    def __init__(self, translator: Any, names: Sequence[str]) -> None:
        self.translator, self.names = translator, names
        self.rows = {name: row for row, name in enumerate(names)}

    def __call__(
        self, sources: Sequence[Sequence[int]], limits: Sequence[int], decode: DecodeConfig, tokens: SpecialTokens
    ) -> list[list[int]]:
        """The best translation of each line of a batch, as :func:`nspec.mt.scoring.search.search` gives them.

        Args:
            sources: token ids of each line.
            limits: most tokens of each line's translation, its tag and the end of the sentence counted.
            decode: the search; :func:`why_not` says nothing about it.
            tokens: the special tokens.

        Returns:
            For each line its token ids with the tag, up to the end of the sentence, which is not in them.
        """
        end, most = self.names[tokens.end], max(limits)
        found = self._translate(sources, most, decode, tokens)
        if decode.beam > 1:
            # One limit holds for a whole call. A line whose search ended before its own one is what it is alone, and one
            # of the hypotheses is as long as the search was.
            late = [i for i, each in enumerate(found) if limits[i] < most and max(map(len, each)) >= limits[i]]
            for limit in sorted({limits[i] for i in late}):
                again = [i for i in late if limits[i] == limit]
                for i, each in zip(again, self._translate([sources[i] for i in again], limit, decode, tokens)):
                    found[i] = each
        best = [each[0][:limit] for each, limit in zip(found, limits)]
        return [[self.rows[name] for name in (row[:-1] if row and row[-1] == end else row)] for row in best]

    def _translate(
        self, sources: Sequence[Sequence[int]], limit: int, decode: DecodeConfig, tokens: SpecialTokens
    ) -> list[list[list[str]]]:
        """The finished hypotheses of each line, best first, with tag and end."""
        never = [[self.names[row]] for row in tokens.never if row < len(self.names)]
        never += [[self.names[row] for row in words] for words in tokens.bad_words if max(words) < len(self.names)]
        results = self.translator.translate_batch(
            [[self.names[row] for row in source] for source in sources],
            target_prefix=None if tokens.tag is None else [[self.names[tokens.tag]]] * len(sources),
            beam_size=decode.beam,
            num_hypotheses=decode.beam,  # else the search of a penalty of 0 would end with the first
            length_penalty=decode.length_penalty or _NO_PENALTY,
            no_repeat_ngram_size=decode.no_repeat_ngram_size,
            repetition_penalty=decode.repetition_penalty,
            suppress_sequences=never or None,
            max_input_length=0,
            max_decoding_length=limit,
            min_decoding_length=0,
            return_end_token=True,
        )
        return [result.hypotheses for result in results]
