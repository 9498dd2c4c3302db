"""Beam search and greedy search of a batch of lines, each of which comes out as it would alone.

The search is that of ``transformers``. What it takes from elsewhere is kept from it here: the model's own
``generation_config``, which fills in whatever a caller leaves open, and the longest line of the batch, whose limit would
be that of all lines: a short one would go on beyond its own, and fill its beam with hypotheses that it has not alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from nspec.mt.scoring.config import DecodeConfig


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a meaning of their own.

    Attributes:
        start: starts the decoder.
        tag: of the target language, the first token of every translation; None where there is none.
        end: of a sentence.
        pad: fills rows up.
        never: are never chosen.
        bad_words: sequences that never come in a translation.
        renormalize: what is never chosen is left out of the probabilities too.
    """

    start: int
    tag: int | None
    end: int
    pad: int
    never: Sequence[int] = field(default_factory=list)
    bad_words: Sequence[Sequence[int]] = field(default_factory=list)
    renormalize: bool = False


def check_beam(beam: int, vocabulary: int) -> None:
    """Raises ValueError where a beam has more hypotheses than the vocabulary has continuations of the first one."""
    if 2 * beam > vocabulary:
        raise ValueError(
            f"a beam of {beam} needs a vocabulary of at least {2 * beam}, found one of {vocabulary}; take a smaller "
            "decode.beam"
        )


class TransformersSearch:
    """:func:`search` with a model, on its device.

    Args:
        model: a ``transformers`` sequence-to-sequence model in evaluation mode, left as it is.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(
        self, sources: Sequence[Sequence[int]], limits: Sequence[int], decode: DecodeConfig, tokens: SpecialTokens
    ) -> list[list[int]]:
        """The best translation of each line of a batch; ``sources`` are the token ids of each, the rest as there."""
        width = max(map(len, sources))
        ids = torch.tensor([[*s, *[tokens.pad] * (width - len(s))] for s in sources])
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sources])
        device = self.model.device
        return search(self.model, ids.to(device), mask.to(device), limits, decode, tokens)


def search(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    limits: Sequence[int],
    decode: DecodeConfig,
    tokens: SpecialTokens,
) -> list[list[int]]:
    """The best translation of each line of a batch, by ``decode`` alone.

    Args:
        model: a ``transformers`` sequence-to-sequence model in evaluation mode, left as it is.
        input_ids: int64 [lines, source tokens], padded on the right.
        attention_mask: int64 [lines, source tokens].
        limits: most tokens of each line's translation, its tag and the end of the sentence counted.
        decode: beam, length penalty and what is done against repetitions.
        tokens: the special tokens.

    Returns:
        For each line its token ids with the tag, up to the end of the sentence, which is not in them.
    """
    with _own_settings(model):
        generated: Tensor = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=_settings(decode, tokens, max(limits)),
            logits_processor=LogitsProcessorList(_against_repetitions(decode, tokens)),
            stopping_criteria=StoppingCriteriaList([_OwnLimit(limits)]),
        )
    found = []
    for row, limit in zip(generated.tolist(), limits):
        row = row[1 : 1 + limit]
        found.append(row[: row.index(tokens.end)] if tokens.end in row else row)
    return found


@contextlib.contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Within the block the model has no generation settings, from which ``generate`` fills in what is not given."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _settings(decode: DecodeConfig, tokens: SpecialTokens, limit: int) -> GenerationConfig:
    beams: dict[str, Any] = {}
    if decode.beam > 1:
        # Ends, as in fairseq, when there are as many finished translations as beams.
        beams = {"length_penalty": decode.length_penalty, "early_stopping": True}
    return GenerationConfig(
        num_beams=decode.beam,
        max_length=1 + limit,  # what starts the decoder counts here
        forced_bos_token_id=tokens.tag,
        decoder_start_token_id=tokens.start,
        pad_token_id=tokens.pad,
        eos_token_id=tokens.end,
        suppress_tokens=list(tokens.never) or None,
        bad_words_ids=[list(words) for words in tokens.bad_words] or None,
        renormalize_logits=tokens.renormalize,
        do_sample=False,
        use_cache=True,
        **beams,
    )


class _OwnLimit(StoppingCriteria):
    """Ends each line at its own limit, as ``max_length`` would end it alone."""

    def __init__(self, limits: Sequence[int]) -> None:
        self.limits = torch.tensor(limits)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ended = input_ids.shape[1] > self.limits.to(input_ids.device)
        return ended.repeat_interleave(input_ids.shape[0] // len(ended))  # the candidates of a line stand together


def _against_repetitions(decode: DecodeConfig, tokens: SpecialTokens) -> list[LogitsProcessor]:
    begun = 1 if tokens.tag is None else 2  # what starts the decoder, and the tag: no words of the translation
    found: list[LogitsProcessor] = []
    if decode.repetition_penalty != 1:
        found.append(_OfWords(RepetitionPenaltyLogitsProcessor(float(decode.repetition_penalty)), begun))
    if decode.no_repeat_ngram_size:
        found.append(_OfWords(NoRepeatNGramLogitsProcessor(decode.no_repeat_ngram_size), begun))
    return found


class _OfWords(LogitsProcessor):
    """A rule against repetitions that sees what was translated, and not the ``begun`` tokens before it.

    ``</s>`` may start the decoder: taken for a word, it could not come again to end the sentence, or would be penalised.
    """

    def __init__(self, rule: LogitsProcessor, begun: int) -> None:
        self.rule, self.begun = rule, begun

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.rule(input_ids[:, self.begun :], scores) if input_ids.shape[1] > self.begun else scores
