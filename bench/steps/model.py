"""What a training step is measured on: the model's shapes, batches and masks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import M2M100Config, M2M100ForConditionalGeneration

from bench.rows import Row
from nspec.mt.text.collate import collate
from nspec.mt.text.prepared import Example

Batch = dict[str, Tensor]
Tasks = str | Sequence[str]
"""The task of a batch, or the task of each of its sentences."""
Masks = Mapping[str, Mapping[str, Tensor]]
"""Task -> qualified name of fc1 -> bool ``[d_ff]``."""

PAD, END = 1, 2
RESERVED = 4
"""Ids below it are special tokens."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """A Transformer and the micro-batch it is trained on: ``sentences`` pairs of ``length`` + ``length`` tokens."""

    shape: str
    d_model: int
    d_ff: int
    heads: int
    encoder_layers: int
    decoder_layers: int
    vocabulary: int
    sentences: int
    length: int
    scaled: bool

    @property
    def tokens(self) -> int:
        """Source and target tokens of a micro-batch. There is no padding."""
        return 2 * self.sentences * self.length

    @property
    def layers(self) -> list[str]:
        """Qualified names of the fc1 modules, the encoder's first."""
        sides = (("encoder", self.encoder_layers), ("decoder", self.decoder_layers))
        return [f"model.{side}.layers.{layer}.fc1" for side, count in sides for layer in range(count)]

    def fields(self) -> Row:
        """What a row says about the model."""
        described = asdict(self) | {"tokens": self.tokens}
        return {name: value for name, value in described.items() if name not in ("sentences", "length")}


# Transformer-base with its own d_ff of 2048 (the IWSLT-8 recipe has 1024), and the EC30 recipe. A micro-batch of EC30 has
# 645k / 84 = 7700 tokens.
BASE = Shape("base", 512, 2048, 8, 6, 6, 32_000, 128, 32, scaled=False)
BIG = Shape("big", 1024, 4096, 16, 6, 6, 64_000, 128, 32, scaled=False)
SHAPES = {"base": BASE, "big": BIG}


def scaled_down(shape: Shape) -> Shape:
    """For a CPU: the widths stay, and layers, vocabulary and micro-batch shrink, so that a step takes under a second."""
    layers = 2 if shape.shape == "base" else 1
    return replace(
        shape, encoder_layers=layers, decoder_layers=layers, vocabulary=8000, sentences=32, length=32, scaled=True
    )


def tiny(shape: Shape) -> Shape:
    """For a smoke test: milliseconds."""
    d, d_ff = (32, 128) if shape.shape == "base" else (64, 256)
    return replace(scaled_down(shape), d_model=d, d_ff=d_ff, heads=4, vocabulary=200, length=6)


def shape_for(name: str, which: str, device: torch.device) -> Shape:
    """The real shape on a GPU, a smaller one on a CPU and in a smoke test."""
    if which == "smoke":
        return tiny(SHAPES[name])
    return SHAPES[name] if device.type == "cuda" else scaled_down(SHAPES[name])


def build(shape: Shape, device: torch.device) -> M2M100ForConditionalGeneration:
    """A new model in float32 with the options that nspec trains with: pre-norm, ReLU, tied embeddings, dropout 0.1."""
    of_sides: dict[str, Any] = {"attention_heads": shape.heads, "ffn_dim": shape.d_ff, "layerdrop": 0.0}
    config = M2M100Config(
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in of_sides.items()},
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        vocab_size=shape.vocabulary,
        d_model=shape.d_model,
        dropout=0.1,
        attention_dropout=0.1,
        activation_dropout=0.0,
        activation_function="relu",
        max_position_embeddings=256,
        scale_embedding=True,
        tie_word_embeddings=True,
        use_cache=False,
        init_std=shape.d_model**-0.5,
        bos_token_id=0,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: Any = M2M100ForConditionalGeneration(config)
        for name in shape.layers:  # as in a trained model; at the initial zero a masked neuron would be silent
            nn.init.normal_(model.get_submodule(name).bias, std=0.1)
    return model.to(device).train()


def batch_of(pairs: Iterable[tuple[Tensor, Tensor]]) -> Batch:
    """A micro-batch as nspec trains with: of sentences, int64 ids each."""
    made = collate([Example("", source.numpy(), target.numpy(), PAD, END) for source, target in pairs])
    return {name: tensor for name, tensor in made.items() if name != "task"}


def random_batches(shape: Shape, device: torch.device, count: int = 4) -> list[Batch]:
    """Micro-batches of random tokens, in sentences of one length."""
    generator = torch.Generator().manual_seed(2)
    size = (2, shape.sentences, shape.length)
    drawn = (torch.randint(RESERVED, shape.vocabulary, size, generator=generator) for _ in range(count))
    return [{name: t.to(device) for name, t in batch_of(zip(*pairs)).items()} for pairs in drawn]


def task_name(density: float, number: int) -> str:
    """A model that is timed holds the tasks of several densities beside one another."""
    return f"task{number}-density{density:g}"


def draw_masks(shape: Shape, density: float, tasks: int) -> dict[str, dict[str, Tensor]]:
    """For each task and layer that share of the neurons, drawn uniformly, at least one."""
    generator = torch.Generator().manual_seed(3)
    kept = max(1, round(density * shape.d_ff))

    def draw() -> Tensor:
        chosen = torch.randperm(shape.d_ff, generator=generator)[:kept]
        return torch.zeros(shape.d_ff, dtype=torch.bool).index_fill_(0, chosen, True)

    return {task_name(density, number): {name: draw() for name in shape.layers} for number in range(tasks)}
