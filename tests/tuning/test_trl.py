"""Neurons are trained by TRL's trainer as by that of Transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import nspec

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl"),
    pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets"),
]


def test_supervised_fine_tuning_moves_the_neurons_and_nothing_else(tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {word: number for number, word in enumerate(["</s>", "[unk]", "sun", "moon", "star", "rain"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[unk]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>", unk_token="[unk]")
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_key_value_heads=2, **sizes))
    mask = torch.arange(40) < 5
    nspec.finetune(model, nspec.NeuronMasks({"cy": {"model.layers.1.mlp.gate_proj": mask}}), quiet=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = SFTConfig(
        str(tmp_path), max_steps=3, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, bf16=False
    )
    data = Dataset.from_dict({"text": ["sun moon star rain", "moon star rain sun"] * 8})
    SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer).train()
    with nspec.task(model, None):  # the base, whatever is in its weights just now
        after = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
