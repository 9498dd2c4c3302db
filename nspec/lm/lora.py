"""LoRA on the linear layers of a language model, by the peft library."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from nspec.lm.config import TuneConfig


def add_lora(model: Any, config: TuneConfig, seed: int) -> Any:
    """The model with low-rank factors beside all of its linear layers but the output layer; they alone are trained.

    Args:
        model: of Transformers; it is changed.
        config: rank, alpha and dropout.
        seed: of the factors that begin at random.

    Raises:
        ValueError: the model has no layers that LoRA knows.
    """
    from peft import LoraConfig, get_peft_model

    alpha: Any = config.lora_alpha
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls what Transformers renames
        warnings.filterwarnings(
            "ignore", "fan_in_fan_out is set to", UserWarning
        )  # it sets it right for GPT-2 by itself
        return get_peft_model(model, lora)
