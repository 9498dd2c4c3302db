"""Which positions of a batch are real tokens and which are padding: read from what the model is given."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Inputs that hold token ids, as models of Transformers, fairseq, torch.nn and of one's own call them.
_SOURCE_IDS = ("input_ids", "src_tokens", "src", "source", "src_ids", "source_ids", "input", "inputs", "tokens", "x")
_TARGET_IDS = ("decoder_input_ids", "prev_output_tokens", "tgt", "trg", "tgt_ids", "target_ids", "tgt_tokens")
_BATCH_FIRST_IDS = ("input_ids", "src_tokens", "decoder_input_ids", "prev_output_tokens", "labels")
# key_padding_mask, src_key_padding_mask, encoder_padding_mask and their kin: True, or -inf, is padding.
_PADDING_MASK = re.compile(r"(^|_)padding_mask$")
_ATTENTION_MASKS = ("attention_mask", "decoder_attention_mask")
_ENCODER_WORDS = {"encoder", "encoders", "enc"}
_DECODER_WORDS = {"decoder", "decoders", "dec"}
_SOURCE_WORDS = _ENCODER_WORDS | {"src", "source"}
_TARGET_WORDS = _DECODER_WORDS | {"tgt", "target", "trg"}
_MEMORY_WORDS = {"memory", "cross"}
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "base_model", "model")


@dataclass(frozen=True)
class TokenMask:
    """The real tokens of a batch: ``real`` is bool ``[batch, length]``, or ``[length]`` of a single sequence.

    ``batch_first`` is False where only the caller knows which dimension is which (token ids of a model of one's own).
    """

    name: str
    real: Tensor
    batch_first: bool = True


class RealTokens:
    """The default ``valid`` of ``profile``: what a batch says about padding, for encoder and decoder.

    Args:
        model: also wrapped, by DataParallel, DistributedDataParallel, torch.compile or PEFT.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        inner = _with_signature(model)
        self._positional = _positional_names(inner)
        self.follows_transformers = hasattr(getattr(inner, "config", None), "is_encoder_decoder")
        self._configured = {
            name: module
            for name, module in self._modules.items()
            if hasattr(getattr(module, "config", None), "is_encoder_decoder")
        }
        self._config = inner.config if self.follows_transformers else None
        self.encoder_decoder = bool(getattr(self._config, "is_encoder_decoder", False))
        said = {_first_side(name, self._modules) for name in self._modules}
        self._two_sided = {"encoder", "decoder"} <= said
        self._sides: dict[str, str] = {}

    def __call__(self, layer: str, batch: Any) -> Tensor | None:
        """Bool ``[batch, length]``, or None where the batch says nothing about padding."""
        found = self.masks([layer], batch)[layer]
        return None if found is None else found.real

    def masks(self, layers: Iterable[str], batch: Any) -> dict[str, TokenMask | None]:
        """The real tokens of each layer; None where the batch says nothing about padding.

        Raises:
            ValueError: a mask of another shape or with values of no known meaning; source and target masks for a layer
                that is neither in an encoder nor in a decoder.
            TypeError: a mask or ids that are no tensor.
        """
        inputs = self.named(batch)
        if self.follows_transformers:
            inputs.pop("padding_mask", None)  # of its audio models, where 1 is a real frame: of no known meaning
        for name, value in inputs.items():
            check_tensor(name, value)
        by_side: dict[str, TokenMask | None] = {}
        found = {}
        for layer in layers:
            side = self._sides.setdefault(layer, self._side(layer))
            if side not in by_side:
                by_side[side] = self._mask_of(side, layer, inputs)
            found[layer] = by_side[side]
        return found

    def named(self, batch: Any) -> dict[str, Any]:
        """The inputs by the names that ``model.forward`` gives them."""
        if isinstance(batch, Mapping):
            return dict(batch)
        values = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        names: Sequence[str] = self._positional or getattr(batch, "_fields", ())
        return dict(zip(names, values))

    def _mask_of(self, side: str, layer: str, inputs: Mapping[str, Any]) -> TokenMask | None:
        source, target = _explicit(inputs, "source"), _explicit(inputs, "target")
        if side == "decoder":
            return target or self._labels(inputs.get("labels")) or self._ids(inputs, _TARGET_IDS)
        if side == "encoder":
            return source or _explicit(inputs, "memory") or self._ids(inputs, _SOURCE_IDS)
        found = source or target or self._ids(inputs, _SOURCE_IDS) or self._ids(inputs, _TARGET_IDS)
        texts = [name for name in (*_SOURCE_IDS, *_TARGET_IDS) if isinstance(inputs.get(name), Tensor)]
        two = {name in _TARGET_IDS for name in texts} == {False, True}
        if found is not None and (two or (source is not None and target is not None)):
            raise ValueError(
                f"{layer}: the batch has a source and a target ({', '.join(texts)}; padding by {found.name}), and neither "
                "the name nor the class of the layer says whether it is in the encoder or in the decoder: give valid="
            )
        return found

    def _side(self, layer: str) -> str:
        """``encoder`` or ``decoder`` of a model that has both; else ``only``."""
        for name, module in self._configured.items():
            prefix = f"{name}." if name else ""
            if not layer.startswith(prefix):
                continue
            if not module.config.is_encoder_decoder:
                # Its parts may be called encoder or decoder, and are fed with one text all the same (BERT, OPT).
                return (_first_side(name, self._modules) if self._two_sided else None) or "only"
            decoder = module.get_decoder() if callable(getattr(module, "get_decoder", None)) else None
            if decoder is module:
                return "only"  # one half of such a model by itself
            place = next((n for n, m in self._modules.items() if m is decoder), None)
            if place is not None:
                return "decoder" if layer.startswith(f"{place}.") else "encoder"
            break
        parts = layer.split(".")
        around = [self._modules[".".join(parts[:end])] for end in range(len(parts))]
        if any(isinstance(module, (nn.TransformerDecoder, nn.TransformerDecoderLayer)) for module in around):
            return "decoder"
        return (_first_side(layer, self._modules) if self._two_sided else None) or "only"

    def _labels(self, labels: Any) -> TokenMask | None:
        if not isinstance(labels, Tensor) or labels.dim() != 2:
            return None
        # Position j of the decoder reads label j - 1 and predicts label j: the two are padded alike.
        real, pad = labels != -100, self._pad()
        return TokenMask("labels", real if pad is None or self._pad_ends_text(pad) else real & (labels != pad))

    def _ids(self, inputs: Mapping[str, Any], names: Sequence[str]) -> TokenMask | None:
        pad = self._pad()
        name = next((n for n in names if isinstance(inputs.get(n), Tensor)), None)
        if pad is None or name is None:
            return None
        ids = inputs[name]
        if ids.dtype not in (torch.int32, torch.int64) or ids.dim() not in (1, 2):
            return None
        real = ids != pad
        if self._pad_ends_text(pad) and not bool(real.all()):
            return None  # an end of sentence and padding look the same
        if name == "decoder_input_ids" and getattr(self._config, "decoder_start_token_id", None) == pad:
            real[..., 0] = True  # T5, Marian: the decoder starts from the padding id
        return TokenMask(name, real, name in _BATCH_FIRST_IDS)

    def _pad_ends_text(self, pad: int) -> bool:
        ends = getattr(self._config, "eos_token_id", None)
        return pad in (ends if isinstance(ends, (list, tuple)) else [ends])

    def _pad(self) -> int | None:
        """The padding id: of the configuration, else the one that all embeddings with one agree on."""
        if self._config is not None:
            return getattr(self._config, "pad_token_id", None)
        ids = {m.padding_idx for m in self._modules.values() if isinstance(m, nn.Embedding)} - {None}
        return ids.pop() if len(ids) == 1 else None


def rows_are_samples(batch: Any, leading: torch.Size | None) -> bool:
    """Whether a layer gets one row for each row of a matrix of numbers in the batch: nothing is padded then."""
    values = batch.values() if isinstance(batch, Mapping) else (batch,) if isinstance(batch, Tensor) else tuple(batch)
    rows = [v.shape[0] for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() == 2]
    return leading is not None and len(leading) == 1 and leading[0] in rows


def _with_signature(model: nn.Module) -> nn.Module:
    """The module whose ``forward`` names its arguments: wrappers take anything and pass it on."""
    while True:
        anything = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        inner = next((model._modules[name] for name in _WRAPPERS if model._modules.get(name) is not None), None)
        if inner is None or any(p.kind not in anything for p in _parameters(model)):
            return model
        model = inner


def _positional_names(model: nn.Module) -> list[str]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in _parameters(model) if p.kind in positional]


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # a forward that is not Python
        return []


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def _first_side(layer: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Encoder or decoder, as the outermost module on the way to ``layer`` says by its name, else by its class."""
    parts = layer.split(".")
    for end in range(len(parts) + 1):
        words = _words(parts[end - 1]) if end else set()
        encoder, decoder = bool(words & _ENCODER_WORDS), bool(words & _DECODER_WORDS)
        if encoder != decoder:
            return "encoder" if encoder else "decoder"
        module = modules.get(".".join(parts[:end]))
        if isinstance(module, (nn.TransformerDecoder, nn.TransformerDecoderLayer)):
            return "decoder"
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            return "encoder"
    return None


def _role(name: str) -> str | None:
    """Whose padding an input marks: ``source``, ``target`` or ``memory``; None where it is no mask of padding."""
    if name in _ATTENTION_MASKS:
        return "target" if name == "decoder_attention_mask" else "source"
    if not _PADDING_MASK.search(name):
        return None
    words = _words(name)
    if words & _MEMORY_WORDS or (words & _SOURCE_WORDS and words & _TARGET_WORDS):
        return "memory"  # what the decoder sees of the encoder
    return "target" if words & _TARGET_WORDS else "source"


def _explicit(inputs: Mapping[str, Any], role: str) -> TokenMask | None:
    """The mask of that role; a mask of padding before an attention mask, which in a model of one's own may be causal."""
    names = [name for name, value in inputs.items() if value is not None and _role(name) == role]
    for name in sorted(names, key=lambda name: name in _ATTENTION_MASKS):
        mask = inputs[name]
        return TokenMask(name, _attended(name, mask) if name in _ATTENTION_MASKS else _not_padded(name, mask))
    return None


def _attended(name: str, mask: Tensor) -> Tensor:
    if mask.dim() != 2:
        raise ValueError(f"{name} has shape {list(mask.shape)}, expected [batch, length]; give valid= for other masks")
    if mask.is_floating_point() and not bool((mask > 0).any()):
        if not bool((mask < 0).any()):
            raise ValueError(f"{name} is 0.0 everywhere, expected 1 for real tokens; give it as bool, or give valid=")
        return _added(name, mask)
    return mask != 0


def _not_padded(name: str, mask: Tensor) -> Tensor:
    if mask.dim() not in (1, 2):
        raise ValueError(f"{name} has shape {list(mask.shape)}, expected [batch, length]; give valid= for other masks")
    if mask.is_floating_point():
        return _added(name, mask)
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{name} holds values other than 0 and 1, expected True for padding; give valid=")
    return mask == 0


def _added(name: str, mask: Tensor) -> Tensor:
    """Of a mask that is added to attention scores."""
    real = mask == 0
    if not bool((real | (mask <= -1e4)).all()):
        raise ValueError(f"{name} holds values other than 0 and -inf, expected -inf for padding; give valid=")
    return real


def check_tensor(name: str, value: Any) -> None:
    """Raises TypeError where an input that is known to be token ids, labels or a mask is a list or an array."""
    if value is None or isinstance(value, Tensor):
        return
    listed = isinstance(value, (list, tuple)) and isinstance([*value, 0][0], (int, list))
    plain = listed or hasattr(value, "__array__")
    if _role(name) is not None or (plain and name in ("labels", *_SOURCE_IDS, *_TARGET_IDS)):
        raise TypeError(
            f"{name} of a batch is a {type(value).__name__}, expected a tensor [batch, length]: batches are what a "
            "collator makes of the rows of a data set, tensors padded to one length"
        )
