"""Translating lines of text as they come: beam search in batches of similar length, in the order of the input."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import nspec
from nspec.mt import zero_shot
from nspec.mt.language_tags import tag_ids
from nspec.mt.languages import normalized_code, normalized_task
from nspec.mt.plain import decodes_by_task, plain, why_not_plain
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.ctranslate2_search import CTranslate2Search
from nspec.mt.scoring.engine import CTRANSLATE2, TRANSFORMERS, Engine, choose, why_not_converted
from nspec.mt.scoring.search import SpecialTokens, TransformersSearch, check_beam
from nspec.mt.text.frame import Frame
from nspec.mt.text.marian import is_marian
from nspec.mt.text.tokenizer_fit import token_ids
from nspec.mt.text.vocabulary import encode
from nspec.serving import ctranslate2
from nspec.specialization.tasks import specialized_layers

logger = logging.getLogger(__name__)

WINDOW = 2000
"""Most lines read ahead, so that batches hold lines of similar length."""

_ROOM = 10  # tokens that a translation may have beyond max_length_ratio times its source


Search = Callable[..., list[list[int]]]
"""Of a batch; see :meth:`nspec.mt.scoring.search.TransformersSearch.__call__`."""


def converted(model: Any, tokenizer: PreTrainedTokenizerBase, quantization: str | None = None) -> CTranslate2Search:
    """A plain model in CTranslate2, on the same device and with as many threads as PyTorch has."""
    names = ctranslate2.row_names(model, tokenizer, token_ids(tokenizer))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        names = ctranslate2.convert(model, tokenizer, folder, names=names, quantization=quantization)
        device = model.device
        loaded = ctranslate2.load(folder, device.type, device.index or 0, torch.get_num_threads())
    return CTranslate2Search(loaded, names)


def choose_for(model: PreTrainedModel, decode: DecodeConfig, task: str, pivot: str = "") -> Engine:
    """The engine that ``decode.engine`` means for a direction of one model.

    Raises:
        ValueError: CTranslate2 is asked for and cannot search here; says why.
    """
    config: Any = model.config
    activation = getattr(config, "activation_function", None)
    obstacle = why_not_plain(model) or why_not_converted(config.model_type, activation)
    obstacle = obstacle or ctranslate2.why_not_started(model)
    if decodes_by_task(model) and (pivot or normalized_task(task) not in specialized_layers(model)[0].tasks):
        obstacle = obstacle or f"{task} is combined from two directions, which are not merged into one model"
    return choose(decode, model.device, obstacle)


class Translator:
    """Translates with a model that :func:`nspec.mt.model.load_system` loaded, or any of ``transformers``' like it.

    Args:
        model: in evaluation mode while it translates. Where its forward pass depends on the task (masks in mode
            ``forward``, adapters), it computes as the direction that is asked for does. A direction that it does not
            know is translated with the encoder's masks of one and the decoder's of another that it knows, if they meet
            in one language (:mod:`nspec.mt.zero_shot`); a warning says which.
        tokenizer: of the model.
        decode: the search, which follows these options alone: nothing of the model's own ``generation_config``, but of a
            Marian's what it never writes (``bad_words_ids``, and padding in any case) and ``renormalize_logits``, which
            belong to it.
        window: lines read ahead before the first of them is translated. 0: one when the lines come from a terminal,
            which then answers each line, else 2000.
        pivot: the language in which the two directions meet, where there are several; they are combined then for
            directions that the model knows as well.
        engine: ``transformers``, or ``ctranslate2``, for which the plain model of each direction is converted when it is
            first asked for (:func:`nspec.mt.plain.plain`).
        quantization: of the weights in CTranslate2, such as ``int8``; None: as they are.

    Raises:
        ValueError: a pivot for a model that computes the same for every direction; a beam that is wider than the
            vocabulary allows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decode: DecodeConfig,
        window: int = 0,
        pivot: str = "",
        engine: str = TRANSFORMERS,
        quantization: str | None = None,
    ) -> None:
        self.model: Any = model  # transformers types what it adds to nn.Module too loosely
        self.tokenizer, self.decode, self.window = tokenizer, decode, window
        self._by_task = decodes_by_task(model)
        if pivot and not self._by_task:
            raise ValueError(
                f"pivot {pivot}: this model computes the same for every direction, so there is nothing to combine; leave "
                "the pivot out"
            )
        self.pivot = normalized_code(pivot)
        self._parts: dict[str, tuple[str, str]] = {}  # of directions that are combined
        embeddings: Any = model.get_input_embeddings()
        known = set(token_ids(tokenizer))
        # Rows that only round the vocabulary up.
        self._spare = [index for index in range(embeddings.num_embeddings) if index not in known]
        check_beam(decode.beam, len(known))
        self._tag_ids = frozenset(tag_ids(tokenizer))
        self.engine, self.quantization = engine, quantization
        self._converted: dict[str, CTranslate2Search] = {}  # of the last direction, or "" of all
        # Marian's would read a translation as a source.
        self._decoding: dict[str, Any] = {"use_source_tokenizer": False} if is_marian(tokenizer) else {}

    def translate(self, lines: Iterable[str], task: str) -> Iterator[str]:
        """One line out for each line in, in order; a blank line for a blank line.

        Args:
            lines: sentences, with or without a line end; read as they are needed.
            task: the direction, such as ``en-de``.

        Returns:
            An iterator over the translations, without line ends.

        Raises:
            ValueError: a direction or language that the model does not know; at once, before any line is read.
        """
        task = normalized_task(task)
        frame = self._frame(task)
        window = self.window or (1 if getattr(lines, "isatty", lambda: False)() else WINDOW)
        return self._windows(iter(lines), window, task, frame)

    def _frame(self, task: str) -> Frame:
        """What stands around the sentences of a direction that the model knows."""
        self._task(task)  # raises where there are no masks of it; a block in which no layer runs would be warned of
        return Frame.of(self.tokenizer, [task])

    def _task(self, task: str) -> AbstractContextManager[Any]:
        if not self._by_task:
            return nullcontext()
        known = specialized_layers(self.model)[0].tasks
        if task in known and not self.pivot:
            return nspec.task(self.model, task)
        if task not in self._parts:
            parts = zero_shot.parts_of(task, known, self.pivot)
            trained = "" if task in known else ", as it was not trained"
            logger.warning("%s%s", zero_shot.description(self.model, task, *parts), trained)
            self._parts[task] = parts
        return zero_shot.combined(self.model, *self._parts[task])

    def _windows(self, lines: Iterator[str], window: int, task: str, frame: Frame) -> Iterator[str]:
        first = 1
        while part := list(islice(lines, window)):
            yield from self._window(part, first, task, frame)
            first += len(part)

    def _window(self, lines: list[str], first: int, task: str, frame: Frame) -> list[str]:
        before, tag = frame.before(task)
        pieces = encode(self.tokenizer, lines, "source")
        encoded = {i: self._whole(ids, first + i, before, frame.end_id) for i, ids in enumerate(pieces) if ids}
        outputs = [""] * len(lines)
        special = self._tokens(frame, tag)
        with self._searching(task) as search:
            for batch in self._batches(encoded):
                sources = [encoded[i] for i in batch]
                found = search(sources, [self._limit(len(source)) for source in sources], self.decode, special)
                for i, tokens in zip(batch, found):
                    outputs[i] = self._text(tokens)
        return outputs

    @contextmanager
    def _searching(self, task: str) -> Iterator[Search]:
        """What searches, within the block."""
        if self.engine == CTRANSLATE2:
            yield self._search_of(task)
            return
        with torch.inference_mode(), self._task(task):
            training = self.model.training
            self.model.eval()
            try:
                yield TransformersSearch(self.model)
            finally:
                self.model.train(training)

    def _search_of(self, task: str) -> CTranslate2Search:
        """The converted model of a direction."""
        key = task if self._by_task else ""
        if key not in self._converted:
            self._converted.clear()  # before the next one needs the memory
            self._converted[key] = converted(plain(self.model, task), self.tokenizer, self.quantization)
        return self._converted[key]

    def _whole(self, pieces: list[int], number: int, before: list[int], end: int) -> list[int]:
        """A line with what stands around its pieces; ``number`` counts from 1."""
        most = self.model.config.max_position_embeddings - len(before) - 1
        if len(pieces) > most:
            logger.warning("line %d has %d tokens; only the first %d are translated", number, len(pieces), most)
        return [*before, *pieces[:most], end]

    def _batches(self, encoded: dict[int, list[int]]) -> Iterator[list[int]]:
        """Line indices, longest lines first, so that what does not fit into memory shows at once."""
        batch: list[int] = []
        longest = 0
        for i in sorted(encoded, key=lambda i: (-len(encoded[i]), i)):
            if batch and longest * (len(batch) + 1) > self.decode.batch_tokens:
                yield batch
                batch = []
            longest = len(encoded[i]) if not batch else longest
            batch.append(i)
        if batch:
            yield batch

    def _text(self, tokens: list[int]) -> str:
        tokens = [token for token in tokens if token not in self._tag_ids]  # M2M100's need not be special tokens
        text = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False, **self._decoding
        )
        return " ".join(str(text).splitlines()).strip()

    def _limit(self, source_tokens: int) -> int:
        """Most tokens of a translation, its tag and the end of the sentence included."""
        most = self.model.config.max_position_embeddings
        return int(min(self.decode.max_length_ratio * source_tokens + _ROOM, most))

    def _tokens(self, frame: Frame, tag: list[int]) -> SpecialTokens:
        start = getattr(self.model.config, "decoder_start_token_id", None)
        start = frame.start_id if start is None else start
        if not frame.marian:
            return SpecialTokens(start, tag[0], frame.end_id, frame.pad_id, self._spare)
        own = self.model.generation_config
        never = [*self._spare, frame.pad_id]  # padding has scores like any word there
        bad_words, renormalize = own.bad_words_ids or [], bool(own.renormalize_logits)
        return SpecialTokens(start, None, frame.end_id, frame.pad_id, never, bad_words, renormalize)
