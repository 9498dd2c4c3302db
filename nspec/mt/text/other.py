"""Parallel text of another folder, encoded for a run's model: to profile on another domain."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from nspec.mt.config import ProfileConfig
from nspec.mt.languages import languages_of_task, pair_of_task
from nspec.mt.text import vocabulary
from nspec.mt.text.config import CorpusConfig
from nspec.mt.text.corpus.base import CorpusError, Pair
from nspec.mt.text.corpus.files import open_files
from nspec.mt.text.frame import WIDEST
from nspec.mt.text.marian import ROLES
from nspec.mt.text.prepared import Ids, PreparedData


def read_other_text(
    profile: ProfileConfig, corpus: CorpusConfig, seed: int, languages: list[str], tasks: list[str]
) -> Iterator[tuple[str, list[Pair]]]:
    """Yields each pair of a run, such as ``de-en``, with its text in ``profile.path``.

    Args:
        profile: the folder is ``path`` and the part ``path_split``, as ``corpus.path`` and ``corpus.valid_split`` would be.
        corpus: how the run's own text is read.
        seed: of the run.
        languages: of the run.
        tasks: its directions.

    Raises:
        ValueError: a pair without text there, or a malformed file.
    """
    part = profile.path_split
    options = dataclasses.replace(
        corpus,
        type="files",
        path=profile.path,
        languages=languages,
        directions=tasks,
        valid_split=part,
        test_split=part,
        valid_sentences=0,
        test_sentences=0,
    )
    # Not open_corpus, which asks for every split.
    try:
        text = open_files(options, seed, evaluation=True)
    except CorpusError as error:  # which names the options of the run's own text
        said = str(error).replace("corpus.valid_split", "profile.path_split").replace("corpus.path", "profile.path")
        raise CorpusError(said) from None
    for pair in sorted({pair_of_task(task) for task in tasks}):
        codes = languages_of_task(pair)
        if codes not in text.pairs:
            raise CorpusError(f"profile.path {profile.path} has no text of {pair}, which the run translates")
        texts = list(text.read(codes, "valid")) or list(text.read(codes, "test"))  # both are the same part
        if not texts:
            raise CorpusError(f"profile.path {profile.path} has no {part} text of {pair}")
        yield pair, texts


class OtherText:
    """What :class:`~nspec.mt.text.prepared.PreparedData` offers for counting activations, of the text in ``profile.path``.

    Args:
        profile: see :func:`read_other_text`.
        corpus: see there.
        seed: see there.
        data: the run's own text, whose vocabulary, languages, directions and limits hold.

    Raises:
        ValueError: a direction of the run without text there, or a malformed file.
    """

    def __init__(self, profile: ProfileConfig, corpus: CorpusConfig, seed: int, data: PreparedData) -> None:
        self.tasks, self.frame = data.tasks, data.frame
        longest = int(data.meta["max_positions"]) - WIDEST
        self._encoded: dict[tuple[str, str, str], list[Ids]] = {}
        for pair, texts in read_other_text(profile, corpus, seed, data.languages, data.tasks):
            for task in (task for task in data.tasks if pair_of_task(task) == pair):
                for key, role in zip(self._keys(task), ROLES):
                    if key not in self._encoded:
                        number = languages_of_task(pair).index(key[1])
                        ids = vocabulary.encode(data.tokenizer, [both[number] for both in texts], role)
                        self._encoded[key] = [np.array(line[:longest], dtype=np.int64) for line in ids]

    def _keys(self, task: str) -> list[tuple[str, str, str]]:
        pair = pair_of_task(task)
        return [(pair, code, self.frame.spelled(role)) for code, role in zip(languages_of_task(task), ROLES)]

    def _both(self, task: str) -> list[list[Ids]]:
        return [self._encoded[key] for key in self._keys(task)]

    def size(self, split: str, task: str) -> int:
        """Sentences of a direction; there is one part, whatever the split is called."""
        return len(self._both(task)[0])

    def lengths(self, split: str, task: str) -> tuple[Ids, Ids]:
        """Source and target lengths, each int64 [n], their frames counted."""
        source, target = (
            np.array([len(ids) + size for ids in texts], dtype=np.int64)
            for texts, size in zip(self._both(task), self.frame.sizes(task))
        )
        return source, target

    def ids(self, split: str, task: str, index: int) -> tuple[Ids, Ids]:
        """Source and target ids of one sentence, each int64 [tokens], with their frames."""
        return self.frame.framed(task, [texts[index] for texts in self._both(task)])
