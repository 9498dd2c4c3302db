"""The options of a run, each with its meaning and default. The YAML files in ``configs/`` and the help come from here.

Reading and writing them (YAML, ``--set key=value``, the commented template) is in :mod:`nspec.mt.options`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nspec.mt.languages import normalized_code, normalized_task

INT_MAX = 2**31 - 1
"""No whole number may be larger: sizes and counts end up in 32-bit integers of libraries."""

FLOAT_MAX = 1e30
"""No number may be larger: it must stay finite in float32 when it is multiplied."""

FLOAT_MIN = 1e-30
"""No number but 0 may be nearer to 0: it must not become 0 in float32, also when it is multiplied."""


def option(
    default: Any,
    meaning: str,
    choices: tuple[Any, ...] | None = None,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    path: bool = False,
    spelled: Callable[[str], str] | None = None,
) -> Any:
    """A dataclass field with its meaning and the values that it may have.

    Args:
        default: its value where nothing is given.
        meaning: what it is, for the commented template.
        choices: its possible values where there are few.
        least: the smallest number; of a list, for each item, as the three that follow.
        above: numbers are larger than this.
        most: the largest number; where neither it nor ``below`` is given, :data:`INT_MAX` or :data:`FLOAT_MAX`.
        below: numbers are smaller than this.
        path: a file or folder, in which ``~`` at the start is the home folder.
        spelled: gives the one spelling of a text that may be given in several; of a list, of each item.
    """
    limits = {"least": least, "above": above, "most": most, "below": below}
    meta = {"meaning": meaning, "choices": choices, "path": path, "spelled": spelled, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class RunConfig:
    folder: str = option("runs/run", "where everything is written; a run started again goes on in it", path=True)
    seed: int = option(1, "of initialisation, sampling, dropout and random masks", least=0, most=2**32 - 1)
    threads: int = option(0, "CPU threads of PyTorch; 0: as PyTorch chooses", least=0, most=1024)
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
    languages: list[str] = option(
        [],
        "language codes, such as de or zh_Hans (zh-Hans is read as that); empty: all that the corpus has",
        spelled=normalized_code,
    )
    pivot: str = option(
        "en",
        "directions go to and from this language; empty: every pair of languages both ways",
        spelled=normalized_code,
    )
    directions: list[str] = option(
        [], "such as en-de or en-zh_Hans; empty: all that languages and pivot give", spelled=normalized_task
    )
    path: str = option(
        "", "files: a folder with parallel text; gettext: a folder of catalogues, empty: the system's", path=True
    )
    name: str = option("", "hub: the name of a dataset")
    subset: str = option("{pair}", "hub: the configuration of a pair; {pair}, {source} and {target} are replaced")
    train_sentences: int = option(0, "most training pairs of one language pair; 0: all (cldr: 20000)", least=0)
    valid_sentences: int = option(0, "most validation pairs of one language pair; 0: all (cldr, gettext: 200)", least=0)
    test_sentences: int = option(0, "most test pairs of one language pair; 0: all (cldr, gettext: 200)", least=0)
    valid_split: str = option("valid", "the name of the validation split in the corpus")
    test_split: str = option("test", "the name of the test split in the corpus")
    filter_across_pairs: bool = option(
        True,
        "training pairs with a sentence that is in the validation or test text of another pair are left out, as those "
        "with one of their own pair's always are",
    )
    deduplicate: bool = option(False, "training pairs that stand there once more are left out")
    max_tokens: int = option(128, "longer training pairs (tokens, either side) are left out", least=1)
    max_ratio: float = option(
        0.0, "training pairs with a larger ratio of lengths in tokens are left out; 0: keep all", least=0
    )


@dataclass
class TokenizerConfig:
    vocab_size: int = option(8000, "SentencePiece pieces, language tags not counted", least=1, most=10_000_000)
    model_type: str = option("bpe", "SentencePiece model", ("bpe",))
    character_coverage: float = option(1.0, "share of characters that get a piece of their own", least=0.98, most=1)
    temperature: float = option(5.0, "languages are sampled with p ~ n^(1/T) sentences for the vocabulary", least=0.01)
    sentences: int = option(1000000, "most sentences that the vocabulary is trained on", least=1)


@dataclass
class ModelConfig:
    pretrained: str = option(
        "",
        "folder or hub name of a model (M2M100, NLLB, ...) to start from; with train.updates 0 it is the dense model as it "
        "is; empty: a new one",
        path=True,
    )
    d_model: int = option(512, "model width", least=4, most=65536)
    d_ff: int = option(2048, "feed-forward neurons of a layer", least=1, most=2**20)
    heads: int = option(8, "attention heads", least=1, most=65536)
    encoder_layers: int = option(6, "encoder layers", least=1, most=1000)
    decoder_layers: int = option(6, "decoder layers", least=1, most=1000)
    dropout: float = option(0.1, "dropout of embeddings and residual branches", least=0, below=1)
    attention_dropout: float = option(0.1, "dropout of attention weights", least=0, below=1)
    max_positions: int = option(256, "longest sequence in tokens", least=4, most=2**20)


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
        "most tokens of a micro-batch, padding counted: sentences x longest (both sides)",
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
    temperature: float = option(5.0, "directions are sampled with p ~ n^(1/T), n in sentence pairs", least=0.01)
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
class ProfileConfig:
    split: str = option("valid", "the text whose activations are counted", ("valid", "train"))
    sentences: int = option(0, "most sentences of a direction; 0: all", least=0)
    share: float = option(1.0, "share of a direction's sentences, evenly spread", above=0, most=1)
    path: str = option(
        "", "a folder with parallel text of another domain, counted instead; empty: the run's own text", path=True
    )
    path_split: str = option("valid", "with path: the name of the part that is counted")
    padding: str = option(
        "exclude", "include counts padded positions too, as the authors' release does", ("exclude", "include")
    )


@dataclass
class SelectConfig:
    rule: str = option(
        "share",
        "share: a direction keeps the most active neurons of each layer, which hold a share k of its activations; lape: "
        "those of the whole model that tell directions apart, each for the directions that it fires often for; top: the "
        "most active share of each layer; specific: that with the highest ratio to the other directions' frequency",
        ("share", "lape", "top", "specific"),
    )
    k: float = option(
        0.95, "of the rule share: share of a layer's activations that the kept neurons cover", above=0, most=1
    )
    rate: float = option(
        0.01, "of the rule lape: share of all neurons that is kept for one direction or several", above=0, most=1
    )
    share: float = option(
        0.01, "of the rules top and specific: share of a layer's neurons, at least one of them", above=0, most=1
    )
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
        500,
        "optimiser steps of each direction, from the dense model; else trained as specialize says",
        least=1,
        most=100_000_000,
    )
    lr: float = option(1e-4, "highest learning rate", above=0, most=1000)


@dataclass
class LassConfig:
    alpha: float = option(
        0.3,
        "share of the weights of smallest magnitude that is pruned from each matrix of attention, fc1 and fc2",
        least=0,
        below=1,
    )


@dataclass
class AdaptersConfig:
    bottleneck: int = option(64, "width of an adapter, after each layer of encoder and decoder", least=1, most=65536)
    lr: float = option(1e-3, "highest learning rate; the model itself is frozen", above=0, most=1000)
    families: str = option(
        "branch",
        "of adapters_family: branch (Germanic, Romance, ...), family (Indo-European, ...) or ec30 (the five groups of that "
        "data set)",
        ("branch", "family", "ec30"),
    )


@dataclass
class BilingualConfig:
    updates: int = option(
        5000,
        "optimiser steps of each direction, from new weights; else trained as train says",
        least=1,
        most=100_000_000,
    )


@dataclass
class DecodeConfig:
    beam: int = option(5, "beam size; 1 is greedy search", least=1, most=1000)
    # Below -1 the scores of long lines can pass the marker of transformers for an unfinished one, and come out empty.
    length_penalty: float = option(1.0, "exponent on the length in the score of a hypothesis", least=-1, most=10)
    max_length_ratio: float = option(
        2.0, "a translation has at most this times the source tokens, plus 10", above=0, most=1000
    )
    no_repeat_ngram_size: int = option(
        0, "no sequence of this many tokens comes twice in a translation; 0: it may", least=0
    )
    repetition_penalty: float = option(
        1.0,
        "above 1, tokens that a translation already has become less likely, as in transformers; 1: they do not",
        above=0,
        most=100,
    )
    batch_tokens: int = option(4096, "most source tokens of a batch, padding counted", least=1, most=10_000_000)


@dataclass
class ScoreConfig:
    tokenize: str = option(
        "auto",
        "how BLEU splits the text: a tokenizer of sacreBLEU. auto: by target language (13a; zh, ja-mecab, ko-mecab; char "
        "for scripts without spaces); flores101, flores200 and spBLEU-1K give spBLEU and need a model file, which is "
        "fetched where it is missing. BLEU in training is that of auto",
        (
            "auto",
            "13a",
            "zh",
            "ja-mecab",
            "ko-mecab",
            "char",
            "intl",
            "flores101",
            "flores200",
            "spBLEU-1K",
            "spm",
            "none",
        ),
    )
    bootstrap: int = option(
        1000, "bootstrap samples of confidence intervals and of tests between systems", least=40, most=100_000
    )
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
