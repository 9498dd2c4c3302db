"""The options of training."""

from __future__ import annotations

from dataclasses import dataclass

from nspec.options import option


@dataclass
class TrainConfig:
    updates: int = option(
        10000,
        "optimiser steps; a finished training goes on where this, or patience, is raised",
        least=0,
        most=100_000_000,
    )
    batch_tokens: int = option(
        4096,
        "most tokens of a micro-batch, padding counted: sentences x longest (source and target)",
        least=1,
        most=10_000_000,
    )
    tasks_per_batch: int = option(
        1,
        "directions of a micro-batch: 1, or k that are drawn independently, with batch_tokens / k tokens of each "
        "(padding between them not counted)",
        least=1,
        most=10_000,
    )
    accumulate: int = option(1, "micro-batches of an update, over all processes", least=1, most=1_000_000)
    temperature: float = option(5.0, "directions are sampled with p ~ n^(1/T), n in sentences", least=0.01)
    lr: float = option(5e-4, "highest learning rate", above=0, most=1000)
    warmup: int = option(4000, "updates of linear warm-up, then inverse square root", least=1)
    label_smoothing: float = option(0.1, "share of the probability spread over the vocabulary", least=0, below=1)
    optimizer: str = option(
        "adamw", "row_sparse_adamw leaves rows outside the task alone", ("adamw", "row_sparse_adamw")
    )
    betas: list[float] = option([0.9, 0.98], "of Adam", least=0, below=1)
    # Squares of gradients below 1e-23 are 0 in float32, and the step is the gradient divided by eps alone.
    eps: float = option(1e-6, "of Adam", least=1e-20, most=1)
    weight_decay: float = option(0.0, "decoupled weight decay", least=0, most=1000)
    clip_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never", least=0)
    precision: str = option(
        "auto",
        "auto: bf16 on a GPU that has it, and from d_model 512 on a CPU with AMX; else fp32. fp16, with loss scaling: for "
        "GPUs without bf16",
        ("auto", "fp32", "bf16", "fp16"),
    )
    valid_every: int = option(1000, "updates between validations, each with a checkpoint", least=1)
    valid_bleu_sentences: int = option(
        100, "validation sentences of each direction that are translated for BLEU; 0: none", least=0
    )
    best: str = option("loss", "what picks the best checkpoint and stops early", ("loss", "bleu"))
    patience: int = option(10, "validations without a better value before training stops; 0: never", least=0)
    log_every: int = option(50, "updates between lines of the log", least=1)
    compile: bool = option(False, "torch.compile the model")


@dataclass
class SpecializeConfig(TrainConfig):
    """Continued training: of the specialised systems, and of the dense and random ones beside them."""

    silent: bool = option(
        False,
        "of neuron masks in forward and random: a neuron that a direction does not keep gives nothing (the bias of fc1 and "
        "the column of fc2 are masked too); else, as in the paper, a constant",
    )
    neurons_lr: float = option(
        0.0,
        "of neurons and neurons+shared: highest learning rate of the neurons' own parameters, which are trained in the "
        "updates of one direction alone; 0: lr",
        least=0,
        most=1000,
    )


@dataclass
class FinetuneConfig:
    updates: int = option(
        500,
        "optimiser steps of each direction, from the dense model; else trained as specialize says",
        least=1,
        most=100_000_000,
    )
    lr: float = option(1e-4, "highest learning rate", above=0, most=1000)


@dataclass
class BilingualConfig:
    updates: int = option(
        5000,
        "optimiser steps of each direction, from new weights; else trained as train says",
        least=1,
        most=100_000_000,
    )


@dataclass
class SurgeryConfig:
    parts: str = option(
        "auto",
        "the parts of the gradient that are compared and changed each by itself: the whole model, side (encoder, decoder, "
        "the rest), layer or tensor; auto: model for pcgrad, layer for gradvac",
        ("auto", "model", "side", "layer", "tensor"),
    )
    beta: float = option(
        0.01,
        "of gradvac: weight of the present cosine of two directions in the moving average that is their target",
        above=0,
        below=1,
    )


@dataclass
class CurriculumConfig:
    temperature: float = option(
        1.0,
        "of the system temperature: that of its last update; it goes there in a straight line from specialize.temperature",
        least=0.01,
    )
    start: float = option(
        0.01,
        "of the system curriculum: share of each direction's pairs, the easiest, that it begins with (four micro-batches "
        "at least); the share grows with the root of the updates",
        above=0,
        most=1,
    )
    until: float = option(0.5, "share of the updates after which it takes all pairs", above=0, most=1)
    difficulty: str = option(
        "rarity",
        "of a pair, by its source: length in tokens, or rarity, the sum of -log p over them with p their share of the "
        "direction's training text",
        ("rarity", "length"),
    )


@dataclass
class ReptileConfig:
    share: float = option(
        0.5, "share of the updates that are meta-updates; the others train on as continued does", above=0, most=1
    )
    inner: int = option(
        0,
        "inner steps of a meta-update, all of one direction, which share out its specialize.accumulate micro-batches; 0: "
        "a step for each",
        least=0,
        most=1_000_000,
    )
    rate: float = option(
        0.5, "how far the weights go from where they were to where the inner steps end", above=0, most=1
    )
    optimizer: str = option("adamw", "of the inner steps: adamw as in specialize, or sgd", ("adamw", "sgd"))
    lr: float = option(0.1, "learning rate of sgd", above=0, most=1000)
