"""Prepared text: token ids in memory-mapped arrays, and the examples that training, profiling and loss are made of.

Needs neither the corpus nor the libraries that read it: a folder prepared on one machine trains on another.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from nspec.files import read_json
from nspec.mt.languages import languages_of_task as languages_of_task
from nspec.mt.languages import pair_of_task as pair_of_task
from nspec.mt.text.config import SPLITS
from nspec.mt.text.frame import Frame
from nspec.mt.text.marian import ROLES, Role
from nspec.mt.text.token_arrays import stem_of
from nspec.mt.text.vocabulary import folder_sha256, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """A sentence and its translation as the model takes them.

    Attributes:
        task: the direction.
        source: int64 [tokens], encoder input: tokens with their frame (:mod:`nspec.mt.text.frame`).
        target: int64 [tokens], labels: tokens with their frame.
        pad_id: what fills up shorter sequences.
        start_id: what the decoder starts with.
        given: tokens at the start of ``target`` that the search is given, not asked for: the tag of the language.
    """

    task: str
    source: Ids
    target: Ids
    pad_id: int
    start_id: int
    given: int = 0


class PreparedData:
    """What :func:`nspec.mt.text.prepare.prepare` wrote. Arrays are opened when first used, and mapped, not read.

    Args:
        folder: ``RUN/prepared``.

    Attributes:
        folder: the same.
        meta: the contents of ``meta.json``.
        tasks: the directions, such as ``en-de``.
        languages: codes, sorted.
        tokenizer_folder: the tokenizer, to be saved with each model.
        frame: what stands around the tokens of a sentence.

    Raises:
        ValueError: there is no prepared text, of another format version, or its tokenizer is not the one it was
            encoded with.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / "meta.json").is_file():
            raise ValueError(f"{self.folder} has no prepared text: meta.json is not there; run `nspec prepare`")
        self.meta: dict[str, Any] = read_json(self.folder / "meta.json")
        version = self.meta.get("format") if isinstance(self.meta, dict) else None
        if version != FORMAT:
            raise ValueError(
                f"{self.folder / 'meta.json'} has format {version!r}, expected {FORMAT}; prepare the text anew"
            )
        self.tasks: list[str] = self.meta["tasks"]
        self.languages: list[str] = self.meta["languages"]
        self.tokenizer_folder = self.folder / "tokenizer"
        found = folder_sha256(self.tokenizer_folder)
        if found != self.meta["vocabulary"]["sha256"]:
            raise ValueError(
                f"{self.tokenizer_folder} is not the tokenizer that the text was encoded with (its SHA-256 is "
                f"{found[:12]}, expected {self.meta['vocabulary']['sha256'][:12]}); prepare the text anew"
            )
        self.frame = Frame.read(self.meta["vocabulary"])
        self._arrays: dict[tuple[str, str, str, str], tuple[npt.NDArray[Any], Ids]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A worker process maps the arrays itself; pickled maps would be sent as their contents.
        return {**self.__dict__, "_arrays": {}}

    def only(self, task: str) -> PreparedData:
        """The same text with one direction alone.

        Raises:
            ValueError: it is not among them.
        """
        self.size("train", task)  # raises
        part = copy.copy(self)
        part.tasks = [task]
        return part

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        return load_tokenizer(self.tokenizer_folder)

    def size(self, split: str, task: str) -> int:
        """Sentences of a direction in ``train``, ``valid`` or ``test``.

        Raises:
            ValueError: no such split or direction.
        """
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}; expected {', '.join(SPLITS)}")
        if task not in self.tasks:
            raise ValueError(f"{self.folder} has no direction {task!r}; it has {', '.join(self.tasks)}")
        return int(self.meta["counts"][split][task])

    def lengths(self, split: str, task: str) -> tuple[Ids, Ids]:
        """Source and target lengths of all sentences of a direction, each int64 [n], their frames counted."""
        source, target = (self._open(split, task, role)[1] for role in ROLES)
        more = self.frame.sizes(task)
        return np.diff(source) + more[0], np.diff(target) + more[1]

    def source_ids(self, split: str, task: str) -> tuple[npt.NDArray[Any], Ids]:
        """Source ids of all sentences one after another, [tokens], without frames, and where each begins, int64 [n + 1]."""
        return self._open(split, task, ROLES[0])

    def ids(self, split: str, task: str, index: int) -> tuple[Ids, Ids]:
        """Source and target ids of one sentence, each int64 [tokens], with their frames.

        Raises:
            IndexError: ``index`` is not in [0, size).
        """
        size = self.size(split, task)
        if not 0 <= index < size:
            raise IndexError(f"{split} {task} has {size} sentences; there is none at {index}")
        return self.frame.framed(task, [self._ids(split, task, role, index) for role in ROLES])

    def _ids(self, split: str, task: str, role: Role, index: int) -> npt.NDArray[Any]:
        ids, offsets = self._open(split, task, role)
        return ids[int(offsets[index]) : int(offsets[index + 1])]

    def text(self, split: str, task: str) -> tuple[list[str], list[str]]:
        """Sources and references of ``valid`` or ``test`` as they stand in the corpus, in their order.

        Raises:
            ValueError: ``train``, whose text is not kept, or see :meth:`size`.
        """
        size = self.size(split, task)
        if split == "train":
            raise ValueError("the training text is not kept; only that of valid and test is")
        both = []
        for language in languages_of_task(task):
            path = self.folder / "text" / split / f"{pair_of_task(task)}.{language}.txt"
            # Only "\n" ends a line here: str.splitlines() would also split at characters that text can hold.
            lines = _read(path).split("\n")[:-1]
            if len(lines) != size:
                raise ValueError(f"{path} has {len(lines)} lines, expected {size}; prepare the text anew")
            both.append(lines)
        return both[0], both[1]

    def _open(self, split: str, task: str, role: Role) -> tuple[npt.NDArray[Any], Ids]:
        size, pair = self.size(split, task), pair_of_task(task)
        language, spelled = languages_of_task(task)[ROLES.index(role)], self.frame.spelled(role)
        key = (split, pair, language, spelled)
        if key not in self._arrays:
            stem = self.folder / split / stem_of(pair, language, spelled)
            ids, offsets = (_mapped(Path(f"{stem}.{kind}.npy")) for kind in ("ids", "offsets"))
            expected = int(offsets[-1]) if len(offsets) else 0
            if len(offsets) != size + 1 or expected != len(ids):
                raise ValueError(
                    f"{stem}.*.npy hold {len(offsets) - 1} sentences and {len(ids)} tokens, expected {size} sentences "
                    f"and {expected} tokens; prepare the text anew"
                )
            self._arrays[key] = ids, offsets
        return self._arrays[key]


def _mapped(path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; prepare the text anew") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error}); prepare the text anew") from error
    return array


def _read(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; prepare the text anew") from None


class TokenIds(Protocol):
    """What :class:`Examples` needs of :class:`PreparedData`, and other text offers too."""

    tasks: list[str]
    frame: Frame

    def size(self, split: str, task: str) -> int: ...

    def ids(self, split: str, task: str, index: int) -> tuple[Ids, Ids]: ...


class Examples:
    """The sentences of a split, by (index of the task in ``data.tasks``, index of the sentence); for a DataLoader.

    Args:
        data: the prepared text.
        split: ``train``, ``valid`` or ``test``.
    """

    def __init__(self, data: TokenIds, split: str) -> None:
        self.data = data
        self.split = split
        self.sizes = [data.size(split, task) for task in data.tasks]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, key: Sequence[int]) -> Example:
        task = self.data.tasks[key[0]]
        source, target = self.data.ids(self.split, task, int(key[1]))
        frame = self.data.frame
        return Example(task, source, target, frame.pad_id, frame.start_id, given=len(frame.before(task)[1]))


def summary(meta: dict[str, Any]) -> list[str]:
    """What a person should see of ``meta.json``: sizes, what was left out or cut, two sentences as the model gets them."""
    train = sum(sizes["train"] for sizes in meta["pairs"].values())
    lines = [
        f"{len(meta['tasks'])} directions between {len(meta['languages'])} languages, {train} training sentences, "
        f"{meta['vocabulary']['size']} tokens in the vocabulary"
    ]
    for pair, reasons in meta["dropped"].items():
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        if listed:
            lines.append(f"{pair}: training sentences left out: {listed}")
    for pair, splits in meta["truncated"].items():
        listed = ", ".join(f"{count} in {split}" for split, count in splits.items() if count)
        if listed:
            lines.append(f"{pair}: sentences cut to {meta['max_positions']} tokens for the loss: {listed}")
    unknown = [
        f"{language} {', '.join(f'{count} in {split}' for split, count in found['unknown'].items() if count)} "
        f"({found['examples']})"
        for language, found in meta["unknown_characters"].items()
        if found["examples"]
    ]
    if unknown:
        lines.append(f"warning: characters that the vocabulary lacks, which are lost as <unk>: {'; '.join(unknown)}")
    return lines + meta["examples"]
