"""The options of a run, each with its meaning and default. The YAML files in ``configs/`` and the help come from here.

Reading and writing them (YAML, ``--set key=value``, the commented template) is in :mod:`nspec.mt.options`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, meaning: str, choices: tuple[Any, ...] | None = None) -> Any:
    """A dataclass field with its meaning and, where there are few, its possible values."""
    meta = {"meaning": meaning, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class RunConfig:
    folder: str = option("runs/run", "where everything is written; a run started again goes on in it")
    seed: int = option(1, "of initialisation, sampling, dropout and random masks")
    threads: int = option(0, "CPU threads of PyTorch; 0: as PyTorch chooses")
    device: str = option("auto", "auto takes the first GPU, else the CPU", ("auto", "cpu", "cuda"))
    systems: list[str] = option(
        ["dense", "continued", "forward", "update", "random"],
        "what is trained and compared; dense is always first, the others start from it with a fresh optimiser and train "
        "for the same number of updates: continued (dense), forward and update (specialised), these two with _encoder or "
        "_decoder (only that half is), random (forward, with random masks of the same sizes), lass (masks of single "
        "weights), adapters and adapters_family (a bottleneck for each direction or language family, the rest frozen); "
        "and finetuned (from dense) and bilingual (from new weights), a model for each direction",
    )
    variants: list[str] = option(
        [],
        "further systems: one of the above with other options of profile, select, specialize, lass, adapters, finetune "
        "or bilingual, each a line such as forward-k70 = forward select.k=0.7",
    )


@dataclass
class CorpusConfig:
    type: str = option("cldr", "where the text comes from", ("cldr", "files", "gettext", "hub"))
    languages: list[str] = option([], "language codes; empty: all that the corpus has")
    pivot: str = option("en", "directions go to and from this language; empty: every pair of languages both ways")
    directions: list[str] = option([], "such as en-de; empty: all that languages and pivot give")
    path: str = option("", "files: a folder with parallel text; gettext: a folder of catalogues, empty: the system's")
    name: str = option("", "hub: the name of a dataset")
    subset: str = option("{pair}", "hub: the configuration of a pair; {pair}, {source} and {target} are replaced")
    train_sentences: int = option(0, "most training pairs of one language pair; 0: all (cldr: 20000)")
    valid_sentences: int = option(0, "most validation pairs of one language pair; 0: all (cldr, gettext: 200)")
    test_sentences: int = option(0, "most test pairs of one language pair; 0: all (cldr, gettext: 200)")
    valid_split: str = option("valid", "the name of the validation split in the corpus")
    test_split: str = option("test", "the name of the test split in the corpus")
    max_tokens: int = option(128, "longer training pairs (tokens, either side) are left out")
    max_ratio: float = option(0.0, "training pairs with a larger ratio of lengths in tokens are left out; 0: keep all")


@dataclass
class TokenizerConfig:
    vocab_size: int = option(8000, "SentencePiece pieces, language tags not counted")
    model_type: str = option("bpe", "SentencePiece model", ("bpe",))
    character_coverage: float = option(1.0, "share of characters that get a piece of their own")
    temperature: float = option(5.0, "languages are sampled with p ~ n^(1/T) sentences for the vocabulary")
    sentences: int = option(1000000, "most sentences that the vocabulary is trained on")


@dataclass
class ModelConfig:
    pretrained: str = option(
        "",
        "folder or hub name of a model (M2M100, NLLB, ...) to start from; with train.updates 0 it is the dense model as it "
        "is; empty: a new one",
    )
    d_model: int = option(512, "model width")
    d_ff: int = option(2048, "feed-forward neurons of a layer")
    heads: int = option(8, "attention heads")
    encoder_layers: int = option(6, "encoder layers")
    decoder_layers: int = option(6, "decoder layers")
    dropout: float = option(0.1, "dropout of embeddings and residual branches")
    attention_dropout: float = option(0.1, "dropout of attention weights")
    max_positions: int = option(256, "longest sequence in tokens")


@dataclass
class TrainConfig:
    updates: int = option(10000, "optimiser steps")
    batch_tokens: int = option(4096, "most tokens of a micro-batch, padding counted: sentences x longest (both sides)")
    tasks_per_batch: int = option(
        1,
        "directions of a micro-batch: 1, or k that are drawn independently, with batch_tokens / k tokens of each "
        "(padding between them not counted)",
    )
    accumulate: int = option(1, "micro-batches of an update, over all processes")
    temperature: float = option(5.0, "directions are sampled with p ~ n^(1/T), n in sentence pairs")
    lr: float = option(5e-4, "highest learning rate")
    warmup: int = option(4000, "updates of linear warm-up, then inverse square root")
    label_smoothing: float = option(0.1, "share of the probability spread over the vocabulary")
    optimizer: str = option(
        "adamw", "row_sparse_adamw leaves rows outside the task alone", ("adamw", "row_sparse_adamw")
    )
    betas: list[float] = option([0.9, 0.98], "of Adam")
    eps: float = option(1e-6, "of Adam")
    weight_decay: float = option(0.0, "decoupled weight decay")
    clip_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never")
    precision: str = option(
        "auto",
        "auto: bf16 on a GPU that has it, and from d_model 512 on a CPU with AMX; else fp32",
        ("auto", "fp32", "bf16"),
    )
    valid_every: int = option(1000, "updates between validations, each with a checkpoint")
    valid_bleu_sentences: int = option(
        100, "validation sentences of each direction that are translated for BLEU; 0: none"
    )
    best: str = option("loss", "what picks the best checkpoint and stops early", ("loss", "bleu"))
    patience: int = option(10, "validations without a better value before training stops; 0: never")
    log_every: int = option(50, "updates between lines of the log")
    compile: bool = option(False, "torch.compile the model")


@dataclass
class ProfileConfig:
    split: str = option("valid", "the text whose activations are counted", ("valid", "train"))
    sentences: int = option(0, "most sentences of a direction; 0: all")
    share: float = option(1.0, "share of a direction's sentences, evenly spread, in (0, 1]")
    path: str = option("", "a folder with parallel text of another domain, counted instead; empty: the run's own text")
    path_split: str = option("valid", "with path: the name of the part that is counted")
    padding: str = option(
        "exclude", "include counts padded positions too, as the authors' release does", ("exclude", "include")
    )


@dataclass
class SelectConfig:
    k: float = option(0.95, "share of a layer's activations that the kept neurons cover, in (0, 1]")
    layers: list[str] = option(
        [],
        "the feed-forward layers that are specialised, the others stay dense; empty: all. Shell patterns for the name "
        "(model.encoder.layers.0.fc1) or a part of it between dots, such as encoder or decoder.layers.1",
    )


@dataclass
class SpecializeConfig(TrainConfig):
    """Continued training: of the specialised systems, and of the dense and random ones beside them."""


@dataclass
class FinetuneConfig:
    updates: int = option(
        500, "optimiser steps of each direction, from the dense model; else trained as specialize says"
    )
    lr: float = option(1e-4, "highest learning rate")


@dataclass
class LassConfig:
    alpha: float = option(
        0.3, "share of the weights of smallest magnitude that is pruned from each matrix of attention, fc1 and fc2"
    )


@dataclass
class AdaptersConfig:
    bottleneck: int = option(64, "width of an adapter, after each layer of encoder and decoder")
    lr: float = option(1e-3, "highest learning rate; the model itself is frozen")
    families: str = option(
        "branch",
        "of adapters_family: branch (Germanic, Romance, ...), family (Indo-European, ...) or ec30 (the five groups of that "
        "data set)",
        ("branch", "family", "ec30"),
    )


@dataclass
class BilingualConfig:
    updates: int = option(5000, "optimiser steps of each direction, from new weights; else trained as train says")


@dataclass
class DecodeConfig:
    beam: int = option(5, "beam size; 1 is greedy search")
    length_penalty: float = option(1.0, "exponent on the length in the score of a hypothesis")
    max_length_ratio: float = option(2.0, "a translation has at most this times the source tokens, plus 10")
    no_repeat_ngram_size: int = option(0, "no sequence of this many tokens comes twice in a translation; 0: it may")
    repetition_penalty: float = option(
        1.0, "above 1, tokens that a translation already has become less likely, as in transformers; 1: they do not"
    )
    batch_tokens: int = option(4096, "most source tokens of a batch, padding counted")


@dataclass
class ScoreConfig:
    bootstrap: int = option(1000, "bootstrap samples of confidence intervals and of tests between systems")
    baseline: str = option("continued", "the system that the others are tested against; dense where it is not there")


@dataclass
class Config:
    """A whole run. Sections are attributes: ``config.train.lr``."""

    run: RunConfig = field(default_factory=RunConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    specialize: SpecializeConfig = field(default_factory=SpecializeConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    lass: LassConfig = field(default_factory=LassConfig)
    adapters: AdaptersConfig = field(default_factory=AdaptersConfig)
    bilingual: BilingualConfig = field(default_factory=BilingualConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
