"""Models of ``transformers`` in the format of CTranslate2, converted from memory.

The conversion is CTranslate2's own; what it asks of a tokenizer is answered here. Its converter of M2M100 and NLLB looks
for the language tags where transformers 4 kept them, and leaves them out with later versions; a vocabulary with fewer
entries than the embeddings have rows is refused when it is loaded. Options of configurations have moved likewise, and some
it never reads: what was written is compared with the model before anybody takes it.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nspec.serving.same_scores import check_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUANTIZATIONS = ("int8", "int8_float32", "int8_float16", "int8_bfloat16", "int16", "float16", "bfloat16", "float32")
"""Types of weights that CTranslate2 converts to."""

_OTHERWISE = "take transformers in its place"
_NAMED = ("M2M100Config", "MBartConfig", "MarianConfig")  # whose vocabulary is given row by row


def why_not() -> str:
    """Why CTranslate2 cannot be used here; empty where it can."""
    if importlib.util.find_spec("ctranslate2") is None:
        return "ctranslate2 is not installed (pip install ctranslate2; it has wheels for Linux, macOS and Windows)"
    try:
        import ctranslate2  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"ctranslate2 cannot be imported: {error}"
    return ""


def version() -> str:
    """The installed version."""
    return metadata.version("ctranslate2")


def check(quantization: str | None = None) -> None:
    """Raises ImportError where CTranslate2 is not installed, ValueError for a quantization that it has not."""
    if reason := why_not():
        raise ImportError(reason)
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization is {quantization!r}; expected one of {', '.join(QUANTIZATIONS)}")


def takes_names(model: PreTrainedModel) -> bool:
    """Whether :func:`convert` takes the names of the rows of the embeddings, rather than ask the tokenizer."""
    return type(model.config).__name__ in _NAMED


def gpus() -> int:
    """How many GPUs CTranslate2 sees."""
    import ctranslate2

    return int(ctranslate2.get_cuda_device_count())


def activations() -> list[str]:
    """The names of the activation functions that CTranslate2 converts."""
    from ctranslate2.converters import transformers

    return sorted(transformers._SUPPORTED_ACTIVATIONS)


def row_names(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known: Sequence[int]) -> list[str]:
    """A name for each row of the embeddings: the token, or one for a row that no token has.

    Args:
        model: with the embeddings.
        tokenizer: of the model.
        known: the ids of its tokens, of language tags too.

    Raises:
        ValueError: two rows have the same name, by which CTranslate2 could not tell them apart.
    """
    embeddings: Any = model.get_input_embeddings()
    tokens: Any = tokenizer.convert_ids_to_tokens(list(known))
    names = [f"<unused{row}>" for row in range(embeddings.num_embeddings)]
    for row, token in zip(known, tokens):
        names[row] = token
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the vocabulary has the token {twice!r} twice, and CTranslate2 knows tokens by their name")
    return names


def convert(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    *,
    names: Sequence[str] = (),
    quantization: str | None = None,
) -> list[str]:
    """Writes a model as a folder that ``ctranslate2.Translator`` or ``ctranslate2.Generator`` loads.

    Args:
        model: plain, of a family that CTranslate2 converts; it is left as it is.
        tokenizer: of the model.
        folder: must not be there yet.
        names: of the rows of the embeddings (:func:`row_names`), for M2M100, NLLB, mBART and Marian; else the tokenizer
            says them.
        quantization: one of :data:`QUANTIZATIONS`; None: as the weights are.

    Returns:
        The names by which the folder knows the rows: ``names``, but for Marian's ``<pad>``, which is left out.

    Raises:
        ImportError: CTranslate2 is not installed.
        ValueError: a model that CTranslate2 does not convert, or of which it writes something else than it computes; an
            unknown quantization.
    """
    check(quantization)
    if reason := why_not_started(model) or _why_not_windowed(model):
        raise ValueError(reason)
    kind, given = type(model).__name__, _Rows(tokenizer, names) if takes_names(model) else tokenizer
    try:
        _write(_copied(model, weights=quantization is not None), given, folder, quantization)
    except (ValueError, NotImplementedError, KeyError, AttributeError) as error:
        said = f"CTranslate2 {version()} does not convert this {kind}: {error or type(error)}"
        raise ValueError(f"{said}; {_OTHERWISE}") from error
    if reason := check_scores(_copied(model, weights=False).eval(), Path(folder), quantization):
        shutil.rmtree(folder)
        said = f"what CTranslate2 {version()} writes of this {kind} is another model: {reason}"
        raise ValueError(f"{said}. It may not know options of the configuration; {_OTHERWISE}")
    return list(names[:-1] if type(model.config).__name__ == "MarianConfig" else names)


def _copied(model: PreTrainedModel, weights: bool) -> PreTrainedModel:
    """A copy, of the weights too or with those of ``model``.

    The converter writes into configurations and takes layers out that it has read; with a quantization it scales and
    rounds the weights where they lie.
    """
    shared = () if weights else (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _write(model: PreTrainedModel, tokenizer: Any, folder: str | os.PathLike[str], quantization: str | None) -> None:
    with tempfile.TemporaryDirectory() as place:
        model.config.save_pretrained(place)  # by which the converter finds how to convert
        _spell_as_read(model.config)
        _converter(place, model, tokenizer).convert(str(folder), quantization=quantization)


def _spell_as_read(config: Any) -> None:
    """Writes options into a configuration where the converters read them."""
    kind = type(config).__name__
    if kind == "MBartConfig":
        config.normalize_before = True  # what every mBART does; configurations no longer say it
    if kind in ("T5Config", "MT5Config"):  # whether logits are scaled: not of T5 1.1 and mT5
        config.tie_word_embeddings = bool(getattr(config, "scale_decoder_outputs", False))
    rope = getattr(config, "rope_parameters", None)
    if kind == "GemmaConfig" and rope and not hasattr(config, "rope_theta"):
        config.rope_theta = rope["rope_theta"]


def load(folder: str | os.PathLike[str], device: str = "cpu", index: int = 0, threads: int = 0) -> Any:
    """A ``ctranslate2.Translator`` of a folder that :func:`convert` wrote; ``threads`` 0: as CTranslate2 chooses."""
    import ctranslate2

    place = str(Path(folder))
    return ctranslate2.Translator(place, device=device, device_index=index, inter_threads=1, intra_threads=threads)


def why_not_started(model: Any) -> str:
    """Why CTranslate2's decoder cannot start as this model's does; empty where it can."""
    if type(model.config).__name__ != "MarianConfig":
        return ""
    weight, pad = model.get_input_embeddings().weight, model.config.pad_token_id
    if pad != len(weight) - 1:
        return f"<pad> has the id {pad} of {len(weight)}, and CTranslate2 takes it to be the last one of a Marian's"
    if bool(weight[pad].any()):
        return (
            "the embedding of <pad>, which starts Marian's decoder, is not zero, as CTranslate2 takes it to be; this model "
            "can be served by transformers only"
        )
    return ""


def _why_not_windowed(model: Any) -> str:
    """Why a window of attention stands against a conversion; empty where no text that the model takes is longer."""
    config = model.config
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds and not any("sliding" in kind for kind in kinds):
        window = None
    if not window or window >= (getattr(config, "max_position_embeddings", None) or window + 1):
        return ""
    return (
        f"attention of this {type(model).__name__} is over a window of {window} tokens, and that of what CTranslate2 "
        f"{version()} converts it to is not the same on longer texts; {_OTHERWISE}, or, where no text is longer, set "
        "model.config.sliding_window to model.config.max_position_embeddings first"
    )


class _Rows:
    """What the converters ask of a tokenizer, with a name for every row of the embeddings."""

    num_madeup_words = 0
    special_tokens_map: dict[str, Any] = {}  # tags are among the names

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> None:
        self.names = list(names)
        self.bos_token, self.eos_token = tokenizer.bos_token or tokenizer.eos_token, tokenizer.eos_token
        self.unk_token, self.pad_token = tokenizer.unk_token, tokenizer.pad_token
        self.unk_token_id = tokenizer.unk_token_id

    def get_vocab(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def convert_ids_to_tokens(self, row: int) -> str:
        return self.names[row]


def _converter(place: str, model: PreTrainedModel, tokenizer: Any) -> Any:
    """CTranslate2's converter, for a model that is in memory."""
    from ctranslate2.converters import TransformersConverter

    class FromMemory(TransformersConverter):
        def load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
            return model

        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            return tokenizer

        def _load(self) -> Any:
            spec = super()._load()
            if isinstance(tokenizer, _Rows) and spec.config.decoder_start_token is None:
                start = (
                    model.config.decoder_start_token_id
                )  # mBART's is lost where its class is not in the configuration
                spec.config.decoder_start_token = tokenizer.eos_token if start is None else tokenizer.names[start]
            return spec

    return FromMemory(place)
