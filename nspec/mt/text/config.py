"""The options of text and vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from nspec.mt.languages import normalized_code, normalized_task
from nspec.options import option

SPLITS = ("train", "valid", "test")


@dataclass
class CorpusConfig:
    type: str = option("cldr", "where the text comes from", ("cldr", "files", "hub"))
    languages: list[str] = option(
        [],
        "language codes, such as de or zh_Hans (zh-Hans is read as that); empty: all that the corpus has",
        spelled=normalized_code,
    )
    pivot: str = option(
        "en",
        "directions go to and from this language; empty: every pair of languages both ways",
        spelled=normalized_code,
    )
    directions: list[str] = option(
        [], "such as en-de or en-zh_Hans; empty: all that languages and pivot give", spelled=normalized_task
    )
    path: str = option("", "files: a folder with parallel text", path=True)
    name: str = option("", "hub: the name of a dataset")
    subset: str = option("{pair}", "hub: the configuration of a pair; {pair}, {source} and {target} are replaced")
    train_sentences: int = option(0, "most training sentences of one language pair; 0: all (cldr: 20000)", least=0)
    valid_sentences: int = option(0, "most validation sentences of one language pair; 0: all (cldr: 200)", least=0)
    test_sentences: int = option(0, "most test sentences of one language pair; 0: all (cldr: 200)", least=0)
    seed: int = option(
        1,
        "of the samples of validation and test text (cldr: of that text), which are the same whatever run.seed is",
        least=0,
        most=2**32 - 1,
    )
    valid_split: str = option("valid", "the name of the validation split in the corpus")
    test_split: str = option("test", "the name of the test split in the corpus")
    filter_across_pairs: bool = option(
        True,
        "training sentences that are, in either language, in the validation or test text of another pair are left out, "
        "as those in that of their own pair always are",
    )
    deduplicate: bool = option(False, "training sentences that stand there once more are left out")
    max_tokens: int = option(128, "longer training sentences (tokens, in either language) are left out", least=1)
    max_ratio: float = option(
        0.0, "training sentences with a larger ratio of lengths in tokens are left out; 0: keep all", least=0
    )


@dataclass
class TokenizerConfig:
    vocab_size: int = option(8000, "SentencePiece pieces, language tags not counted", least=1, most=10_000_000)
    character_coverage: float = option(1.0, "share of characters that get a piece of their own", least=0.98, most=1)
    temperature: float = option(5.0, "languages are sampled with p ~ n^(1/T) sentences for the vocabulary", least=0.01)
    sentences: int = option(1000000, "most sentences that the vocabulary is trained on", least=1)
