"""The options of translation and scores."""

from __future__ import annotations

from dataclasses import dataclass

from nspec.options import option


@dataclass
class DecodeConfig:
    engine: str = option(
        "auto",
        "what searches: transformers, or ctranslate2, which is several times as fast on a CPU. auto: ctranslate2 where it "
        "is installed, the device is the CPU and every system can be converted, else transformers; all translations of a "
        "run are by the same one. BLEU in training is by transformers",
        ("auto", "transformers", "ctranslate2"),
    )
    beam: int = option(5, "beam size; 1 is greedy search", least=1, most=1000)
    # Below -1 the scores of long lines can pass the marker of transformers for an unfinished one, and come out empty.
    length_penalty: float = option(1.0, "exponent on the length in the score of a hypothesis", least=-1, most=10)
    max_length_ratio: float = option(
        2.0, "a translation has at most this times the source tokens, plus 10", above=0, most=1000
    )
    no_repeat_ngram_size: int = option(
        0, "no sequence of this many tokens comes twice in a translation; 0: it may", least=0
    )
    repetition_penalty: float = option(
        1.0,
        "above 1, tokens that a translation already has become less likely, as in transformers; 1: they do not",
        above=0,
        most=100,
    )
    batch_tokens: int = option(4096, "most source tokens of a batch, padding counted", least=1, most=10_000_000)


@dataclass
class ScoreConfig:
    tokenize: str = option(
        "auto",
        "how BLEU splits the text: a tokenizer of sacreBLEU. auto: by target language (13a; zh, ja-mecab, ko-mecab; char "
        "for scripts without spaces); flores101, flores200 and spBLEU-1K give spBLEU and need a model file, which is "
        "fetched where it is missing. BLEU in training is that of auto",
        (
            "auto",
            "13a",
            "zh",
            "ja-mecab",
            "ko-mecab",
            "char",
            "intl",
            "flores101",
            "flores200",
            "spBLEU-1K",
            "spm",
            "none",
        ),
    )
    bootstrap: int = option(
        1000, "bootstrap samples of confidence intervals and of tests between systems", least=40, most=100_000
    )
    baseline: str = option("continued", "the system that the others are tested against; dense where it is not there")
