"""What is served: models of M2M100's form with random weights and masks, in both formats, and how they decode.

All outputs are of one length, so that every model does the same work whatever it says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import nspec
from nspec.mt.model_files import quiet_transformers
from nspec.serving import ctranslate2
from nspec.specialization.layers import find_blocks

FORMS = ("dense", "merged", "compact")
ENGINES = ("transformers", "ctranslate2")
PAD, END, FIRST_WORD = 1, 2, 4
_NAMED = ["<s>", "<pad>", "</s>", "<unk>"]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, and of what it reads and writes, in tokens."""

    name: str
    d_model: int
    d_ff: int
    layers: int
    vocabulary: int
    source: int
    target: int


SHAPES = {
    "base": Shape("base", 512, 2048, 6, 8000, 20, 16),
    "half": Shape("half", 512, 2048, 3, 8000, 20, 16),  # of the layers of base
    "tiny": Shape("tiny", 32, 64, 1, 60, 6, 5),  # to see that all runs
}


@dataclass(frozen=True)
class Served:
    """One model in one engine.

    Attributes:
        engine: of :data:`ENGINES`.
        dtype: of its weights: ``float32`` or ``int8``.
        form: ``dense``: unmasked; ``merged``: masked rows are zeros; ``compact``: without the masked neurons.
        density: share of the neurons that are active.
    """

    engine: str
    dtype: str
    form: str
    density: float

    @property
    def key(self) -> str:
        """Unique among the models; the name of its folder."""
        return f"{self.engine}-{self.dtype}-{self.form}-{self.density:g}"

    @property
    def dense(self) -> Served:
        """The dense model in the same engine."""
        return Served(self.engine, self.dtype, "dense", 1.0)


@dataclass(frozen=True)
class Search:
    """A setting of the search."""

    batch: int
    beam: int


def served(densities: Sequence[float]) -> list[Served]:
    """All models: dense, merged at the density in the middle (the work is the same at each), compact at all."""
    merged = sorted(densities)[(len(densities) - 1) // 2]
    found = []
    for engine, dtype in (("transformers", "float32"), ("ctranslate2", "float32"), ("ctranslate2", "int8")):
        found += [Served(engine, dtype, "dense", 1.0), Served(engine, dtype, "merged", merged)]
        found += [Served(engine, dtype, "compact", density) for density in densities]
    return found


def specialised(shape: Shape, densities: Iterable[float]) -> Any:
    """The model with random weights, and masks of a task for each density: that share of each layer, drawn at random."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    torch.manual_seed(0)
    heads = max(2, shape.d_model // 64)
    config = M2M100Config(
        vocab_size=shape.vocabulary,
        d_model=shape.d_model,
        encoder_layers=shape.layers,
        decoder_layers=shape.layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=shape.d_ff,
        decoder_ffn_dim=shape.d_ff,
        max_position_embeddings=128,
        activation_dropout=0.0,
        init_std=shape.d_model**-0.5,
    )
    model: Any = M2M100ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for density in densities:
        masks[f"{density:g}"] = {
            block.name: torch.zeros(block.d_ff, dtype=torch.bool).index_fill_(
                0, torch.randperm(block.d_ff, generator=generator)[: max(1, round(density * block.d_ff))], True
            )
            for block in find_blocks(model)
        }
    return nspec.specialize(model, nspec.NeuronMasks(masks), mode="forward")


def names_of(shape: Shape) -> list[str]:
    """The tokens of the vocabulary."""
    return [*_NAMED, *(f"w{row}" for row in range(FIRST_WORD, shape.vocabulary))]


def write(model: Any, one: Served, shape: Shape, folder: Path) -> None:
    """Writes a model of :func:`specialised` in its form and format."""
    if one.form == "dense":
        plain: Any = nspec.merge(model, f"{one.density:g}")
    else:
        plain = nspec.merge(model, f"{one.density:g}", compact=one.form == "compact")
    if one.engine == "transformers":
        plain.save_pretrained(folder)
        return
    tokens: Any = SimpleNamespace(
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", unk_token_id=_NAMED.index("<unk>")
    )
    quantization = None if one.dtype == "float32" else one.dtype
    ctranslate2.convert(plain, tokens, folder, names=names_of(shape), quantization=quantization)


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def sources(shape: Shape, number: int) -> Tensor:
    """Sentences of random words: int64 ``[number, shape.source]``, each with the end."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(FIRST_WORD, shape.vocabulary, (number, shape.source), generator=generator)
    ids[:, -1] = END
    return ids


class Decoder:
    """A model as it is loaded from its folder by an engine.

    Args:
        one: which.
        folder: that :func:`write` wrote.
        shape: of the model.
        threads: of CTranslate2; Transformers has those of PyTorch.
    """

    def __init__(self, one: Served, folder: Path, shape: Shape, threads: int) -> None:
        self.one, self.shape = one, shape
        self.names = names_of(shape)
        if one.engine == "transformers":
            from transformers import M2M100ForConditionalGeneration

            with quiet_transformers():
                self.model: Any = M2M100ForConditionalGeneration.from_pretrained(folder).eval()
        else:
            self.model = ctranslate2.load(folder, threads=threads)

    def __call__(self, ids: Tensor, beam: int) -> list[list[int]]:
        """Translations of a batch, ``shape.target`` words each."""
        length = self.shape.target
        if self.one.engine == "transformers":
            with torch.inference_mode():
                found: Tensor = self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    num_beams=beam,
                    do_sample=False,
                    min_new_tokens=length,
                    max_new_tokens=length,
                    forced_eos_token_id=None,
                )
            return [row[1:] for row in found.tolist()]
        results = self.model.translate_batch(
            self._words(ids),
            beam_size=beam,
            min_decoding_length=length,
            max_decoding_length=length,
            max_input_length=0,
            return_end_token=True,
        )
        rows = {name: row for row, name in enumerate(self.names)}
        return [[rows[word] for word in result.hypotheses[0]] for result in results]

    def log_probabilities(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Those of given words: float32 ``[lines, words]``, for int64 ``targets`` of that shape."""
        if self.one.engine == "transformers":
            start = torch.full((len(ids), 1), END)
            with torch.inference_mode():
                logits = self.model(input_ids=ids, decoder_input_ids=torch.cat([start, targets[:, :-1]], 1)).logits
            return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
        scored = self.model.score_batch(self._words(ids), self._words(targets), max_input_length=0)
        return torch.tensor([result.log_probs[: targets.shape[1]] for result in scored])

    def _words(self, ids: Tensor) -> list[list[str]]:
        return [[self.names[row] for row in line] for line in ids.tolist()]


def check(decoders: Iterable[Decoder], shape: Shape) -> None:
    """Whether models compute what they should, before they are timed.

    Raises:
        ValueError: those in float32 of one density give other probabilities than one another, or an output has another
            length.
    """
    ids = sources(shape, 4)
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(FIRST_WORD, shape.vocabulary, (4, shape.target), generator=generator)
    first: dict[float, tuple[str, Tensor]] = {}
    for decoder in decoders:
        one = decoder.one
        for beam in (1, 2):
            lengths = {len(line) for line in decoder(ids, beam)}
            if lengths != {shape.target}:
                raise ValueError(f"{one.key}, beam {beam}: outputs of {lengths} tokens, expected {shape.target} each")
        if one.dtype != "float32":
            continue
        found = decoder.log_probabilities(ids, targets)
        name, expected = first.setdefault(one.density, (one.key, found))
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
            worst = float((found - expected).abs().max())
            raise ValueError(f"{one.key}: log-probabilities differ from those of {name} by up to {worst:.2g}")
