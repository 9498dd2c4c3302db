"""From a corpus to a folder of token ids: text is read once, and each language of a pair encoded once."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from nspec.files import disk_error, write_json, write_text
from nspec.mt.config import ModelConfig
from nspec.mt.language_tags import language_tag
from nspec.mt.languages import languages_of_task, pair_of_task
from nspec.mt.model_files import load_config
from nspec.mt.text import vocabulary
from nspec.mt.text.config import SPLITS, CorpusConfig, TokenizerConfig
from nspec.mt.text.corpus.base import Corpus, CorpusError, tasks_of
from nspec.mt.text.filtering import IN_OTHER_EVALUATION, TrainingFilter
from nspec.mt.text.frame import WIDEST, Frame
from nspec.mt.text.marian import ROLES, Role, name_target
from nspec.mt.text.prepared import FORMAT, summary
from nspec.mt.text.token_arrays import TokenArrays, stem_of
from nspec.mt.text.tokenizer_fit import token_ids
from nspec.terminal import Progress

logger = logging.getLogger(__name__)

EMPTY = "no tokens"
TOO_LONG = "too long"
RATIO = "length ratio"

_CHUNK = 4096  # sentences of each language that are encoded at once
_SPOOL = "spool"  # training text between reading and encoding


@dataclass(frozen=True)
class TextOptions:
    """Which text is prepared, and how.

    Attributes:
        corpus: where the text comes from, its limits and filters.
        tokenizer: of a new vocabulary.
        model: ``pretrained``, which brings a vocabulary, and ``max_positions``.
        seed: of samples of the training text, for training and for the vocabulary.
    """

    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    seed: int


def prepare(options: TextOptions, folder: Path, progress: Progress | None = None) -> None:
    """Reads a corpus and writes ``folder`` for :class:`nspec.mt.text.prepared.PreparedData`.

    Everything is made in a folder beside it and moved in place at the end, ``meta.json`` last: a folder with a
    ``meta.json`` is whole. What a killed attempt left is removed by the next one. Other files in ``folder`` stay.

    Args:
        options: which text, and how its vocabulary is made.
        folder: ``RUN/prepared``.
        progress: called as ``progress(what, done, total)`` while it works.

    Raises:
        ValueError: options that do not go together, a malformed corpus (:class:`~nspec.mt.text.corpus.base.CorpusError`), a
            direction without text in one of the splits, a language that a pretrained vocabulary does not have, a
            pretrained model that cannot be read.
    """
    from nspec.mt.text.corpus import open_corpus

    if options.model.pretrained:
        load_config(options.model.pretrained)  # what cannot be read is an error before text is
    corpus = open_corpus(options.corpus, options.seed)
    prepare_corpus(corpus, tasks_of(options.corpus, corpus), options, folder, progress)


def prepare_corpus(
    corpus: Corpus,
    tasks: list[str],
    options: TextOptions,
    folder: Path,
    progress: Progress | None = None,
) -> None:
    """:func:`prepare` for a corpus that is already open.

    Args:
        corpus: with clean text, as all corpora give it.
        tasks: the directions, such as ``en-de``.
        options: which text they say is not looked at; their limits and filters hold.
        folder: see :func:`prepare`.
        progress: see :func:`prepare`.
    """
    folder = Path(folder)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        quiet: Progress = lambda what, done, total: None
        meta = _Preparation(corpus, tasks, options, part, progress or quiet).run()
        _move(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for line in summary(meta):
        logger.info("%s", line)


def _move(part: Path, folder: Path) -> None:
    """Puts what is in ``part`` in the place of what ``folder`` has under the same names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)  # from here on the folder is not whole
    names = sorted((path.name for path in part.iterdir()), key=lambda name: (name == "meta.json", name))
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        os.replace(part / name, folder / name)


class _Preparation:
    """One run of :func:`prepare_corpus`, with the folder that it works in."""

    def __init__(
        self, corpus: Corpus, tasks: list[str], options: TextOptions, folder: Path, progress: Progress
    ) -> None:
        if not tasks:
            raise ValueError("there is no direction to prepare")
        self.corpus, self.tasks, self.folder, self.progress = corpus, tasks, folder, progress
        self.options, limits = options, options.corpus
        self.languages = sorted({language for task in tasks for language in languages_of_task(task)})
        self.pairs = {pair_of_task(task): languages_of_task(pair_of_task(task)) for task in sorted(tasks)}
        self.dropped: dict[str, Counter[str]] = {pair: Counter() for pair in self.pairs}
        self.truncated: dict[str, Counter[str]] = {pair: Counter() for pair in self.pairs}
        self.sizes: dict[str, dict[str, int]] = {pair: {} for pair in self.pairs}
        self.filter = TrainingFilter(limits.filter_across_pairs, limits.deduplicate)
        self.characters: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)  # by language and split
        self.most = options.model.max_positions
        if limits.max_tokens < 1 or self.most <= WIDEST:
            raise ValueError(
                f"corpus.max_tokens is {limits.max_tokens} and model.max_positions is {self.most}; expected at "
                f"least 1 and {WIDEST + 1}"
            )

    def run(self) -> dict[str, Any]:
        """Does everything; the result is ``meta.json``, which is the last file that is written."""
        if self.options.model.pretrained:  # whose languages are known before the text is read
            self._take(self._pretrained_tokenizer())
        self._each("read valid and test", self._read_evaluation)
        self._each("read", self._read_training)
        self.progress("vocabulary", 0, 1)
        if not self.options.model.pretrained:
            self._take(self._new_tokenizer())
        self.progress("vocabulary", 1, 1)
        self._each("encode", self._encode)
        shutil.rmtree(self.folder / _SPOOL)
        meta = self._meta()
        write_json(self.folder / "meta.json", meta)
        return meta

    def _each(self, what: str, work: Callable[[str], None]) -> None:
        for number, pair in enumerate(self.pairs):
            self.progress(what, number, len(self.pairs))
            work(pair)
        self.progress(what, len(self.pairs), len(self.pairs))

    # Reading

    def _read_evaluation(self, pair: str) -> None:
        """Text of valid and test to ``text/``."""
        languages = self.pairs[pair]
        for split in ("valid", "test"):
            both: tuple[list[str], list[str]] = [], []
            for texts in self.corpus.read(languages, split):
                self.filter.hold_out(languages, texts)
                for lines, text in zip(both, texts):
                    lines.append(_line(text, pair, split))
            self._must_have(pair, split, len(both[0]))
            for language, lines in zip(languages, both):
                write_text(self.folder / "text" / split / f"{pair}.{language}.txt", "".join(f"{t}\n" for t in lines))

    def _read_training(self, pair: str) -> None:
        """Text of train, without what is in valid and test and what stands there once more, to the spool folder."""
        kept = 0
        first, second = (self._spool(pair, language) for language in self.pairs[pair])
        first.parent.mkdir(exist_ok=True)
        languages = self.pairs[pair]
        with _writer(first) as first_file, _writer(second) as second_file:
            for texts in self.filter.kept(languages, self.corpus.read(languages, "train"), self.dropped[pair]):
                first_file.write(_line(texts[0], pair, "train") + "\n")
                second_file.write(_line(texts[1], pair, "train") + "\n")
                kept += 1
        self.sizes[pair]["train"] = kept
        self._must_have(pair, "train", kept)

    def _spool(self, pair: str, language: str) -> Path:
        return self.folder / _SPOOL / f"{pair}.{language}.txt"

    def _must_have(self, pair: str, split: str, count: int) -> None:
        self.sizes[pair][split] = count
        if count:
            return
        tasks = " and ".join(task for task in self.tasks if pair_of_task(task) == pair)
        left_out = ", ".join(f"{number} {reason}" for reason, number in self.dropped[pair].items() if number)
        why = f" (left out: {left_out})" if split == "train" and left_out else ""
        hint = "" if IN_OTHER_EVALUATION not in why else ", or set corpus.filter_across_pairs=false"
        raise CorpusError(f"{tasks}: there is no {split} data{why}; add some, or leave the direction out{hint}")

    # Vocabulary

    def _pretrained_tokenizer(self) -> Path:
        pretrained = self.options.model.pretrained
        self.most = min(self.most, _positions(pretrained))
        tokenizer = vocabulary.load_tokenizer(pretrained)
        try:
            frame = Frame.of(tokenizer, self.tasks)
        except ValueError as error:
            raise ValueError(f"model.pretrained {pretrained}: {error}") from error
        named: dict[int, str] = {}
        for language, token in frame.tags.items():
            other = named.setdefault(token, language)
            if other != language:
                raise ValueError(
                    f"corpus.languages: {other} and {language} are one language, {language_tag(tokenizer, language)}, "
                    f"in the vocabulary of model.pretrained {pretrained}; keep one of the two"
                )
        if frame.marian:
            name_target(tokenizer, self.tasks)
        tokenizer.save_pretrained(self.folder / "tokenizer")
        return self.folder / "tokenizer"

    def _new_tokenizer(self) -> Path:
        options = self.options.tokenizer
        counts = {
            language: sum(self.sizes[pair]["train"] for pair, two in self.pairs.items() if language in two)
            for language in self.languages
        }
        chosen = vocabulary.sampled(self._sentences, counts, options.temperature, options.sentences, self.options.seed)
        model = vocabulary.train_sentencepiece(chosen, options)
        vocabulary.export_tokenizer(model, self.languages, self.folder / "tokenizer", self.most)
        return self.folder / "tokenizer"

    def _take(self, folder: Path) -> None:
        # What is used is what is on the disk, not what it was saved from.
        self.tokenizer = vocabulary.load_tokenizer(folder)
        self.frame = Frame.of(self.tokenizer, self.tasks)
        self.dtype = np.dtype(np.uint16 if token_ids(self.tokenizer)[-1] < 1 << 16 else np.uint32)

    def _sentences(self, language: str) -> Iterator[str]:
        for pair, languages in self.pairs.items():
            if language in languages:
                yield from _lines(self._spool(pair, language))

    # Encoding

    def _spellings(self, pair: str) -> dict[tuple[str, str], Role]:
        """What a pair is encoded to: language and way of spelling, and a role that is spelled so."""
        found: dict[tuple[str, str], Role] = {}
        for task in self.tasks:
            if pair_of_task(task) == pair:
                for language, role in zip(languages_of_task(task), ROLES):
                    found.setdefault((language, self.frame.spelled(role)), role)
        return found

    def _encode(self, pair: str) -> None:
        longest = self.most - WIDEST
        for split in ("valid", "test"):
            paths = [self.folder / "text" / split / f"{pair}.{language}.txt" for language in self.pairs[pair]]
            arrays = {spelling: TokenArrays(self.dtype) for spelling in self._spellings(pair)}
            for spelled in self._encoded(pair, split, paths):
                self.truncated[pair][split] += max(map(len, spelled)) > longest
                for array, ids in zip(arrays.values(), spelled):
                    array.add(ids[:longest])
            self._save(pair, split, arrays)
        arrays = {spelling: TokenArrays(self.dtype) for spelling in self._spellings(pair)}
        for spelled in self._encoded(pair, "train", [self._spool(pair, language) for language in self.pairs[pair]]):
            reason = self._unfit([len(ids) for ids in spelled])
            if reason:
                self.dropped[pair][reason] += 1
                continue
            for array, ids in zip(arrays.values(), spelled):
                array.add(ids)
        self._save(pair, "train", arrays)
        self._must_have(pair, "train", len(next(iter(arrays.values()))))

    def _unfit(self, sizes: list[int]) -> str:
        """Why a training pair with so many tokens, in each way that it is spelled, is left out, or nothing."""
        ratio = self.options.corpus.max_ratio
        if not min(sizes):
            return EMPTY
        if max(sizes) > min(self.options.corpus.max_tokens, self.most - WIDEST):
            return TOO_LONG
        # Source and target of a direction stand together.
        unlike = any(max(two) > ratio * min(two) for two in zip(sizes[::2], sizes[1::2]))
        return RATIO if ratio and unlike else ""

    def _encoded(self, pair: str, split: str, paths: list[Path]) -> Iterator[tuple[list[int], ...]]:
        files = [_lines(path) for path in paths]
        spellings = self._spellings(pair)
        while (chunks := [list(islice(file, _CHUNK)) for file in files])[0]:
            texts = dict(zip(self.pairs[pair], chunks))
            for language, lines in texts.items():
                self.characters[language, split].update("".join(lines))
            encoded = [vocabulary.encode(self.tokenizer, texts[code], role) for (code, _), role in spellings.items()]
            yield from zip(*encoded)

    def _save(self, pair: str, split: str, arrays: dict[tuple[str, str], TokenArrays]) -> None:
        for (language, spelled), array in arrays.items():
            array.save(self.folder / split / stem_of(pair, language, spelled))

    # Description

    def _meta(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "tasks": self.tasks,
            "languages": self.languages,
            "pairs": self.sizes,
            "counts": {split: {task: self.sizes[pair_of_task(task)][split] for task in self.tasks} for split in SPLITS},
            "vocabulary": self._facts(),
            "dtype": self.dtype.name,
            "max_positions": self.most,
            "dropped": {pair: dict(reasons) for pair, reasons in self.dropped.items()},
            "truncated": {pair: dict(splits) for pair, splits in self.truncated.items()},
            "unknown_characters": {language: self._unknown(language) for language in self.languages},
            "corpus": {
                "fingerprint": self.corpus.fingerprint(),
                "skipped": self.corpus.skipped,
                "notes": self.corpus.notes,
            },
            "examples": [self._example(task) for task in dict.fromkeys([self.tasks[0], self.tasks[-1]])],
        }

    def _unknown(self, language: str) -> dict[str, Any]:
        """How many characters of a language's text there are and the vocabulary lacks, by split, and the most frequent."""
        counts = {split: self.characters[language, split] for split in SPLITS}
        total = sum(counts.values(), Counter[str]())
        lacking: set[str] = set()
        for role in {
            role for pair in self.pairs for (code, _), role in self._spellings(pair).items() if code == language
        }:
            lacking |= vocabulary.unknown_characters(self.tokenizer, total, role)
        most = sorted(lacking, key=lambda character: (-total[character], character))
        return {
            "characters": {split: found.total() for split, found in counts.items()},
            "unknown": {split: sum(found[character] for character in lacking) for split, found in counts.items()},
            "examples": " ".join(_shown(character) for character in most[:10]),
        }

    def _facts(self) -> dict[str, Any]:
        """What batches need of the tokenizer, so that they can be made without loading it."""
        return {
            "size": len(token_ids(self.tokenizer)),
            "sha256": vocabulary.folder_sha256(self.folder / "tokenizer"),
            **self.frame.facts(),
        }

    def _example(self, task: str) -> str:
        """The first validation pair of a direction in tokens, so that a person sees a wrong tag."""
        both: list[list[int]] = []
        for language, role in zip(languages_of_task(task), ROLES):
            path = self.folder / "text" / "valid" / f"{pair_of_task(task)}.{language}.txt"
            both += vocabulary.encode(self.tokenizer, [next(_lines(path))], role)
        framed = self.frame.framed(task, both)
        return f"{task}: {' => '.join(' '.join(self.tokenizer.convert_ids_to_tokens(ids.tolist())) for ids in framed)}"


def _positions(pretrained: str) -> int:
    """The longest sequence that a pretrained model takes, in tokens."""
    found = getattr(load_config(pretrained), "max_position_embeddings", None)
    return sys.maxsize if found is None else int(found)


def _shown(character: str) -> str:
    """A character as a person can see it."""
    return character if character.isprintable() and not unicodedata.combining(character) else f"U+{ord(character):04X}"


def _line(text: str, pair: str, split: str) -> str:
    if "\n" in text or "\r" in text:
        raise CorpusError(f"{pair} {split}: a sentence holds a line break: {text[:80]!r}; the corpus must clean it")
    return text


@contextlib.contextmanager
def _writer(path: Path) -> Iterator[TextIO]:
    try:
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            yield file
    except OSError as error:
        # The caller reads the corpus meanwhile, whose errors name their own file; these are of the file written here.
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_error(error, path) from error
        raise


def _lines(path: Path) -> Iterator[str]:
    # With newline="\n" only that ends a line; other characters that split lines elsewhere are text.
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.rstrip("\n")
