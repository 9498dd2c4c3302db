"""Parallel text: composed from CLDR, from files, or from the hub of ``datasets``."""

from __future__ import annotations

import importlib

from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus.base import Corpus, CorpusError, pair_of, split_direction, tasks_of

__all__ = ["Corpus", "CorpusError", "open_corpus", "pair_of", "split_direction", "tasks_of"]

TYPES = {
    "cldr": ("cldr", "CldrCorpus"),
    "files": ("files", "open_files"),
    "hub": ("hub", "HubCorpus"),
}


def open_corpus(config: CorpusConfig, seed: int) -> Corpus:
    """Opens the corpus that the options describe and makes sure that every direction of the run has text.

    Args:
        config: the options; ``config.type`` is "cldr", "files" or "hub".
        seed: of the training text: its contents (cldr) and the sample that a size limit takes.

    Raises:
        CorpusError: what is asked for is not there, or a file is malformed (more may come up while reading).
        ImportError: the library that the type needs (Babel, datasets) is not installed.
        ValueError: an option has a value that it cannot have.
    """
    if config.type not in TYPES:
        raise ValueError(f"corpus.type is {config.type!r}; expected one of {', '.join(TYPES)}")
    for option in ("train_sentences", "valid_sentences", "test_sentences"):
        if getattr(config, option) < 0:
            raise ValueError(f"corpus.{option} is {getattr(config, option)}; expected 0 (no limit) or more")
    # By name, so that a corpus needs only the libraries of its own kind.
    module, name = TYPES[config.type]
    corpus: Corpus = getattr(importlib.import_module(f"nspec.mt.text.corpus.{module}"), name)(config, seed)
    for pair in dict.fromkeys(pair_of(*split_direction(task)) for task in tasks_of(config, corpus)):
        corpus.check(pair)
    return corpus
