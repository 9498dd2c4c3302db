"""What a training step is measured on: the model's shapes, batches and masks, and the systems that train with them.

A system is one way to train a model whose tasks have masks: ``dense`` (none), ``release`` (the authors' way), and ours,
``forward`` and ``update``. All start as copies of one model, and differ in masks, mode and optimiser alone.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import M2M100Config, M2M100ForConditionalGeneration

import nspec
from bench.rows import Row
from bench.timing import synchronize
from nspec.mt.training.config import TrainConfig
from nspec.mt.training.loop import build_optimizer
from nspec.mt.training.loss import label_smoothed_loss

Batch = dict[str, Tensor]
Tasks = str | Sequence[str]
"""The task of a batch, or the task of each of its sentences."""
Masks = Mapping[str, Mapping[str, Tensor]]
"""Task -> qualified name of fc1 -> bool ``[d_ff]``."""

PARTS = ("task switch", "forward", "backward", "optimizer")
OPTIONS = TrainConfig(lr=1e-5)  # nspec's defaults, at a rate at which random text does not diverge
RESERVED = 4  # ids below it are special tokens


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
    widths = (32, 128, 4) if shape.shape == "base" else (64, 256, 4)
    return replace(scaled_down(shape), d_model=widths[0], d_ff=widths[1], heads=widths[2], vocabulary=200, length=6)


def build(shape: Shape, device: torch.device, seed: int = 1) -> M2M100ForConditionalGeneration:
    """A new model in float32 with the options that nspec trains with: pre-norm, ReLU, tied embeddings, dropout 0.1."""
    config = M2M100Config(
        vocab_size=shape.vocabulary,
        d_model=shape.d_model,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.d_ff,
        decoder_ffn_dim=shape.d_ff,
        dropout=0.1,
        attention_dropout=0.1,
        max_position_embeddings=256,
        activation_function="relu",
        activation_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        scale_embedding=True,
        tie_word_embeddings=True,
        use_cache=False,
        init_std=shape.d_model**-0.5,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = M2M100ForConditionalGeneration(config)
        for name in shape.layers:  # as in a trained model; at the initial zero a masked neuron would be silent
            nn.init.normal_(model.get_submodule(name).bias, std=0.1)
    return model.to(device).train()


def random_batches(shape: Shape, device: torch.device, count: int = 4, seed: int = 2) -> list[Batch]:
    """Micro-batches of random tokens, as ``nspec.mt.text.collate`` makes them of sentences of one length."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        size = (shape.sentences, shape.length)
        source, labels = (torch.randint(RESERVED, shape.vocabulary, size, generator=generator) for _ in range(2))
        batch = {
            "input_ids": source,
            "attention_mask": torch.ones_like(source),
            "decoder_input_ids": torch.cat([torch.full((size[0], 1), 2), labels[:, :-1]], 1),
            "decoder_attention_mask": torch.ones_like(labels),
            "labels": labels,
        }
        found.append({name: tensor.to(device) for name, tensor in batch.items()})
    return found


def task_name(density: float, number: int) -> str:
    """A model that is timed holds the tasks of several densities beside one another."""
    return f"task{number}-density{density:g}"


def draw_masks(shape: Shape, density: float, tasks: int, seed: int = 3) -> dict[str, dict[str, Tensor]]:
    """For each task and layer that share of the neurons, drawn uniformly, at least one."""
    generator = torch.Generator().manual_seed(seed)
    kept = max(1, round(density * shape.d_ff))

    def draw() -> Tensor:
        chosen = torch.randperm(shape.d_ff, generator=generator)[:kept]
        return torch.zeros(shape.d_ff, dtype=torch.bool).index_fill_(0, chosen, True)

    return {task_name(density, number): {name: draw() for name in shape.layers} for number in range(tasks)}


class Clock:
    """Seconds of each part of a step: the time between a mark and the one before it.

    Args:
        device: that computes.
        synchronized: wait for the device at each mark. Needed on a GPU, where a part else ends when it is enqueued, and
            too slow for a step whose total is wanted too.
    """

    def __init__(self, device: torch.device, synchronized: bool = False) -> None:
        self._device, self._synchronized, self._last = device, synchronized, 0.0
        self.parts: dict[str, float] = {}

    def start(self) -> None:
        """Begins a step."""
        self.parts = dict.fromkeys(PARTS, 0.0)
        self._last = self._now()

    def mark(self, part: str) -> None:
        """Ends a part, which may have several pieces."""
        now = self._now()
        self.parts[part] += now - self._last
        self._last = now

    def _now(self) -> float:
        if self._synchronized:
            synchronize(self._device)
        return time.perf_counter()


class WeightMaskedLinear(nn.Linear):
    """The release's fc1: the weight times a mask of its size, a byte an element, for each task one; dense in cost."""

    masks: dict[str, Tensor]
    mask: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., d_model]`` -> ``[..., d_ff]``."""
        return F.linear(x, self.weight if self.mask is None else self.weight * self.mask, self.bias)


def mask_weights(model: nn.Module, masks: Masks) -> nn.Module:
    """Makes the model train in the release's way, in place; its masks go to the device of the weights."""
    for name in next(iter(masks.values())):
        fc1: Any = model.get_submodule(name)
        fc1.__class__, fc1.mask = WeightMaskedLinear, None
        fc1.masks = {
            task: rows[name].to(fc1.weight.device)[:, None].expand_as(fc1.weight).contiguous()
            for task, rows in masks.items()
        }
    return model


@contextlib.contextmanager
def weights_masked(model: nn.Module, task: Tasks) -> Iterator[None]:
    """Within the block the release's model uses the masks of a task.

    Raises:
        ValueError: a list of tasks, which would need a weight for each.
    """
    if not isinstance(task, str):
        raise ValueError(
            "a weight times a mask is of one task: a batch of several would need a weight for each of them"
        )
    layers = [module for module in model.modules() if isinstance(module, WeightMaskedLinear)]
    for layer in layers:
        layer.mask = layer.masks[task]
    try:
        yield
    finally:
        for layer in layers:
            layer.mask = None


class System:
    """One way to train: a model of its own, an optimiser, and how it is switched to a task.

    Args:
        kind: ``dense``, ``release``, ``forward``, ``update``; or ``no feed-forward``, a dense model whose feed-forward
            pairs are skipped, which shows what share of a step is theirs.
        model: the plain model, which is copied.
        masks: of all tasks; not for a dense model.
        optimizer: ``adamw`` (PyTorch's, fused) or ``row_sparse_adamw`` (ours).
        dtype: float32, or bfloat16 under autocast.
    """

    def __init__(
        self, kind: str, model: nn.Module, masks: Masks, optimizer: str = "adamw", dtype: torch.dtype = torch.float32
    ) -> None:
        self.kind, self.optimizer_name, self.dtype = kind, optimizer, dtype
        self.model = copy.deepcopy(model)
        self.device = next(self.model.parameters()).device
        if kind == "release":
            mask_weights(self.model, masks)
        elif kind == "no feed-forward":
            for name in [name for name, _ in model.named_modules() if name.endswith((".fc1", ".fc2"))]:
                self.model.set_submodule(name, nn.Identity())
        elif kind != "dense":
            nspec.specialize(self.model, nspec.NeuronMasks(masks), mode=kind)  # type: ignore[arg-type]
        self.optimizer = build_optimizer(self.model, replace(OPTIONS, optimizer=optimizer))

    def switched(self, tasks: Tasks) -> contextlib.AbstractContextManager[None]:
        """Within the block the model is switched to a task, or to the task of each sentence."""
        if self.kind in ("forward", "update"):
            return nspec.task(self.model, tasks)
        return weights_masked(self.model, tasks) if self.kind == "release" else contextlib.nullcontext()

    def loss(self, batch: Batch) -> Tensor:
        """The training loss, in nats per target token."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            logits = self.model(**inputs).logits
        return label_smoothed_loss(logits, batch["labels"], OPTIONS.label_smoothing, batch["labels"].numel())

    def step(self, batch: Batch, tasks: Tasks, clock: Clock | None = None) -> None:
        """An update as nspec's trainer does it; clipping the gradient's norm counts as the optimiser's."""
        mark = (lambda part: None) if clock is None else clock.mark
        if clock is not None:
            clock.start()
        with self.switched(tasks):
            mark("task switch")
            loss = self.loss(batch)
            mark("forward")
            loss.backward()
            mark("backward")
        mark("task switch")
        nn.utils.clip_grad_norm_(self.model.parameters(), OPTIONS.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark("optimizer")

    def gradients(self, batch: Batch, tasks: Tasks) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradient of every parameter, without dropout; the parameters stay as they are."""
        self.model.eval()
        with self.switched(tasks):
            loss = self.loss(batch)
            loss.backward()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        self.model.train()
        return loss.detach(), found


def held_bytes(model: nn.Module) -> int:
    """Bytes of the masks of all tasks that a model holds: every tensor that its layers keep beyond their parameters.

    To be asked before the model is used. Ours copies what a task needs to a GPU when the task is used first: there it
    is what all tasks come to in the end.
    """
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def walk(thing: Any) -> None:
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, Mapping):
            walk(list(thing.values()))
        elif isinstance(thing, (list, tuple)):
            for one in thing:
                walk(one)
        elif not isinstance(thing, nn.Module) and type(thing).__module__.startswith("nspec."):
            walk(vars(thing))

    for module in model.modules():
        if isinstance(module, nn.Linear):
            walk(vars(module))
    return sum(seen.values())


def mask_bytes(kind: str, shape: Shape, model: nn.Module, masks: Masks) -> int:
    """Bytes that the masks of these tasks take, in a model that shares its parameters with ``model``."""
    if kind == "release":
        return release_bytes(shape, len(masks))
    if kind == "dense":
        return 0
    shared = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    return held_bytes(nspec.specialize(shared, nspec.NeuronMasks(masks), mode=kind))  # type: ignore[arg-type]


def release_bytes(shape: Shape, tasks: int) -> int:
    """Bytes of the release's masks: one for each element of fc1.weight, layer and task."""
    return tasks * len(shape.layers) * shape.d_ff * shape.d_model


def free(device: torch.device) -> None:
    """Gives memory of models that are gone back to a GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def named(systems: Iterable[System]) -> dict[str, System]:
    """Systems by ``kind, optimizer``."""
    return {f"{system.kind}, {system.optimizer_name}": system for system in systems}
