"""How a model takes a sentence and its translation: what stands before and behind its tokens, and what starts the decoder.

======================  =========================  =========================  =============
models                  source                     target                     decoder start
======================  =========================  =========================  =============
M2M100, NLLB, mBART-50  ``[source tag] ... </s>``  ``[target tag] ... </s>``  ``</s>``
Marian, one target      ``... </s>``               ``... </s>``               ``<pad>``
Marian, several         ``[target tag] ... </s>``  ``... </s>``               ``<pad>``
======================  =========================  =========================  =============
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nspec.mt.language_tags import language_id, languages_of
from nspec.mt.languages import languages_of_task
from nspec.mt.text.marian import Role, check_directions, is_marian

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIDEST = 2
"""Most tokens that a frame adds to a source or a target: a tag and ``</s>``."""


@dataclass(frozen=True)
class Frame:
    """See the module's text.

    Attributes:
        marian: no tag before the target, and source and target each spelled in its own way.
        tags: the ids of the languages' tags, by code; none where a Marian model has one target language.
        pad_id: ``<pad>``.
        end_id: ``</s>``.
    """

    marian: bool
    tags: Mapping[str, int]
    pad_id: int
    end_id: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, tasks: Iterable[str]) -> Frame:
        """The frame of a tokenizer for directions such as ``en-de``.

        Raises:
            ValueError: a language without a tag, or a direction that the model cannot translate; see
                :func:`nspec.mt.language_tags.language_tag` and :func:`nspec.mt.text.marian.check_directions`.
        """
        tasks = list(tasks)
        marian = is_marian(tokenizer)
        if marian:
            check_directions(tokenizer, tasks)
        tagged = {code for task in tasks for code in languages_of_task(task)[1 if marian else 0 :]}
        if marian and not languages_of(tokenizer):
            tagged = set()
        tags = {code: language_id(tokenizer, code) for code in sorted(tagged)}
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        assert isinstance(pad, int)
        assert isinstance(end, int)
        return cls(marian, tags, pad, end)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Frame:
        """What :meth:`facts` gave, from a JSON object."""
        tags = {code: int(tag) for code, tag in stored["tags"].items()}
        return cls(bool(stored.get("marian", False)), tags, int(stored["pad_id"]), int(stored["end_id"]))

    def facts(self) -> dict[str, Any]:
        """All of it, for a JSON object."""
        return {"marian": self.marian, "tags": dict(self.tags), "pad_id": self.pad_id, "end_id": self.end_id}

    @property
    def start_id(self) -> int:
        """What the decoder starts with."""
        return self.pad_id if self.marian else self.end_id

    def before(self, task: str) -> tuple[list[int], list[int]]:
        """What stands before the tokens of the source, and of the target."""
        source, target = languages_of_task(task)
        if self.marian:
            return [self.tags[target]] if self.tags else [], []
        return [self.tags[source]], [self.tags[target]]

    def sizes(self, task: str) -> tuple[int, int]:
        """How many tokens the frame adds to the source, and to the target."""
        source, target = self.before(task)
        return len(source) + 1, len(target) + 1

    def framed(self, task: str, both: Sequence[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Source and target with their frames, each int64 [tokens], of the ids of their tokens."""
        source, target = (_whole(before, ids, self.end_id) for before, ids in zip(self.before(task), both))
        return source, target

    def spelled(self, role: Role) -> str:
        """What names the spelling of sources or of targets: the role, or nothing where both are spelled alike."""
        return role if self.marian else ""


def _whole(before: list[int], ids: Any, end: int) -> npt.NDArray[np.int64]:
    framed = np.empty(len(before) + len(ids) + 1, dtype=np.int64)
    framed[: len(before)] = before
    framed[len(before) : -1] = ids
    framed[-1] = end
    return framed
