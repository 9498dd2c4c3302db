"""What would be an error of ``nspec finetune`` after hours, found out as soon as the model is there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nspec.lm.config import RULES
from nspec.run.finetune_config import TuningConfig

if TYPE_CHECKING:
    from torch import Tensor


def check_model(config: TuningConfig, model: Any) -> None:
    """Tries what the methods of a run will do with a model; it is as it was afterwards.

    Args:
        config: a validated configuration.
        model: the base, of Transformers.

    Raises:
        ValueError: the option, and what the model has: sequences that are too long for it; no feed-forward blocks, or
            none with the parts that are to be trained; fewer neurons than one; nothing that LoRA knows; no checkpointing.
    """
    from nspec.lm.model import longest

    length, name = config.text.length, config.model.pretrained
    if 0 < longest(model) < length:
        raise ValueError(
            f"text.length: expected at most {longest(model)}, the longest sequence of {name}, found {length}"
        )
    if rules := [method for method in config.tune.methods if method in RULES]:
        _check_neurons(config, model, rules)
    if config.tune.checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"tune.checkpointing: {type(model).__name__} cannot compute activations again: expected false for this model"
        )
    if "lora" in config.tune.methods:
        _check_lora(config, model)


def _check_neurons(config: TuningConfig, model: Any, rules: list[str]) -> None:
    from nspec.specialization.layers import find_blocks
    from nspec.tuning.finetune import check_layers, chosen_parts

    try:
        blocks = find_blocks(model)
    except ValueError as error:
        raise ValueError(f"tune.methods: {rules[0]} trains neurons of feed-forward blocks, and {error}") from error
    try:
        parts = chosen_parts(blocks, config.neurons.parts or None)
    except ValueError as error:
        raise ValueError(f"neurons.parts: {str(error).removeprefix('parts is ')}") from error
    check_layers(model, blocks, parts)
    neurons = sum(block.d_ff for block in blocks)
    if "lape" in rules and not round(config.neurons.rate * neurons):
        raise ValueError(
            f"neurons.rate: {config.neurons.rate} of {neurons} neurons is less than one: take a higher rate"
        )


def _check_lora(config: TuningConfig, model: Any) -> None:
    import torch

    from nspec.lm.lora import add_lora

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.random.fork_rng(devices=[]):
        try:
            add_lora(model, config.tune, config.run.seed).unload()
        except ValueError as error:
            raise ValueError(f"tune.methods: lora does not suit the model: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def check_tokens(config: TuningConfig, model: Any, pieces: Iterable[Tensor]) -> None:
    """Raises ValueError where a token of the text is none of the model's."""
    known = model.get_input_embeddings().num_embeddings
    highest = max(int(piece.max()) for piece in pieces)
    if highest >= known:
        raise ValueError(
            f"model.pretrained: the tokenizer of {config.model.pretrained} gives token {highest}, and the model has "
            f"embeddings of {known}: it is the tokenizer of another model"
        )
