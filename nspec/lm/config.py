"""The options of fine-tuning a language model: its text, the model, which neurons, and how they are trained."""

from __future__ import annotations

from dataclasses import dataclass

from nspec.mt.languages import normalized_code
from nspec.options import option

RULES = ("lape", "specific", "top", "share", "random")
"""Methods that train neurons, by the rule that selects them."""

RANDOM = "random"
"""The rule that copies the numbers of neurons of another."""

METHODS = (*RULES, "lora", "full")
"""All methods."""


@dataclass
class LinesConfig:
    type: str = option(
        "cldr", "where the text comes from: composed (no download), files or a hub dataset", ("cldr", "files", "hub")
    )
    languages: list[str] = option(
        ["fa", "pl", "ar", "he", "nl", "de", "it", "es"],
        "language codes, such as cy or zh_Hans, each fine-tuned by itself and tested on the text of all",
        spelled=normalized_code,
    )
    path: str = option(
        "",
        "files: a folder with CODE.txt for each language (or .txt.gz), a document a line in UTF-8; where CODE.test.txt is "
        "there too, it is the held-out text",
        path=True,
    )
    name: str = option("", "hub: the name of a dataset, or a folder that the datasets library reads")
    subset: str = option("{language}", "hub: the configuration of a language; {language} is replaced")
    column: str = option("text", "hub: the column with the text")
    split: str = option("train", "hub: the split; its held-out part is a split test where there is one")
    held_out: float = option(
        0.05,
        "share of lines that are held out where no test file or split is there, by a hash of the line, so that a line that "
        "comes twice is in one of the two",
        above=0,
        below=1,
    )
    train_lines: int = option(0, "most training lines of a language; 0: all (cldr: 2000)", least=0)
    test_lines: int = option(0, "most held-out lines of a language; 0: all (cldr: 100)", least=0)
    length: int = option(
        128, "tokens of a sequence: lines are joined by the end-of-text token and cut into such pieces", least=2
    )


@dataclass
class LanguageModelConfig:
    pretrained: str = option(
        "",
        "folder or hub name of a causal language model of Transformers with its tokenizer; empty: a small one of Llama's "
        "form is trained on the training text of all languages together",
        path=True,
    )
    dtype: str = option(
        "auto", "of a pretrained model's weights; auto: as it was saved", ("auto", "float32", "bfloat16", "float16")
    )
    vocab_size: int = option(4000, "new model: byte-pair pieces, at most so many", least=300, most=1_000_000)
    d_model: int = option(192, "new model: its width", least=2)
    d_ff: int = option(512, "new model: neurons of a layer", least=1)
    layers: int = option(4, "new model: its layers", least=1)
    heads: int = option(4, "new model: attention heads", least=1)
    updates: int = option(400, "new model: optimiser steps of its training", least=1)
    sequences: int = option(16, "new model: sequences of a step", least=1)
    lr: float = option(2e-3, "new model: learning rate", above=0)


@dataclass
class NeuronsConfig:
    profile_tokens: int = option(8192, "most training tokens of a language on which firing is counted; 0: all", least=0)
    rate: float = option(
        0.05, "lape: share of the model's neurons that is kept, for all languages together", above=0, most=1
    )
    share: float = option(
        0.02,
        "specific and top: share of the neurons of each layer, for each language; random takes as many in each layer as "
        "the first other rule of tune.methods has, and this share where there is none",
        above=0,
        most=1,
    )
    k: float = option(
        0.95, "share: the most active neurons that hold this share of a layer's activations", above=0, most=1
    )
    parts: list[str] = option(
        [], "which parts of a neuron are trained: some of gate, up, down, or of fc1, fc2; empty: all"
    )
    biases: bool = option(True, "whether biases of gate, up and fc1 belong to the neuron")


@dataclass
class TuneConfig:
    methods: list[str] = option(
        ["lape", "specific", "random", "lora", "full"],
        "how each language is fine-tuned, each time from the base: neurons by a rule (lape, specific, top, share, random), "
        "lora (needs the peft library), full (all parameters)",
    )
    updates: int = option(32, "optimiser steps of a fine-tuning", least=1)
    sequences: int = option(8, "sequences of a forward and backward pass", least=1)
    accumulate: int = option(1, "passes of a step, their gradients added up", least=1)
    lr_neurons: float = option(5e-3, "learning rate of neurons", above=0)
    lr_lora: float = option(2e-3, "learning rate of lora", above=0)
    lr_full: float = option(1e-3, "learning rate of full", above=0)
    schedule: str = option(
        "linear", "the learning rate over a fine-tuning: it stays, or falls to 0", ("constant", "linear", "cosine")
    )
    weight_decay: float = option(0.01, "of AdamW, on what is trained alone", least=0)
    clip: float = option(1.0, "largest norm of the gradient; 0: not cut", least=0)
    lora_rank: int = option(16, "lora: rank", least=1)
    lora_alpha: float = option(32.0, "lora: its scale is alpha / rank", above=0)
    lora_dropout: float = option(0.0, "lora: dropout of its inputs", least=0, below=1)
    precision: str = option(
        "auto", "of the products: auto is bf16 on a GPU that has it, else fp32", ("auto", "fp32", "bf16")
    )
    checkpointing: bool = option(False, "activations are computed again in the backward pass, which saves memory")
    test_sequences: int = option(32, "sequences of a pass that measures perplexity", least=1)
    save_full: bool = option(False, "whether fully fine-tuned models are written; neurons and adapters always are")
