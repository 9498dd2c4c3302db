"""The language model to fine-tune: from a folder of Transformers, or a new small one of Llama's form."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from nspec.lm.config import LanguageModelConfig

_END = "</s>"


def train_tokenizer(lines: Iterable[str], vocab_size: int, length: int) -> PreTrainedTokenizerFast:
    """Byte-pair pieces over bytes, so that no character is unknown.

    Args:
        lines: text of all languages.
        vocab_size: most pieces.
        length: of the longest sequence, for who reads it later.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END, model_max_length=length)


def new_model(
    config: LanguageModelConfig, tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> PreTrainedModel:
    """A Llama with new weights in float32, whose input and output embeddings are one matrix.

    The caller's random state is left alone.
    """
    end = tokenizer.eos_token_id
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(shape)


def check_pretrained(name: str) -> None:
    """Looks at a pretrained model before any work.

    Raises:
        ValueError: there is none of that name, or it is not a causal language model.
    """
    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise ValueError(f"model.pretrained: {name} has no config.json; expected the folder of a model of Transformers")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.pretrained: {name} is no folder of a model, nor could one of that name be had from the hub: "
            f"{str(error).splitlines()[0][:300]}"
        ) from error
    if config.is_encoder_decoder:
        raise ValueError(
            f"model.pretrained: {name} is an encoder-decoder ({config.model_type}); expected a causal language model. "
            "`nspec run` trains translation models; nspec.finetune takes any model in a script of your own"
        )


def load_pretrained(name: str, dtype: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer.

    Raises:
        ValueError: one of them cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name} cannot be read: {str(error).splitlines()[0][:300]}") from error
    model.to(device)
    return model, tokenizer


def longest(model: Any) -> int:
    """The longest sequence that a model takes; 0 where it has no limit."""
    return int(getattr(model.config, "max_position_embeddings", 0) or 0)
