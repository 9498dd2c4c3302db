"""Small models of the kinds that users bring."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import nspec


def m2m100(dtype: torch.dtype = torch.float64, d_ff: int = 200, seed: int = 0, **changes) -> nn.Module:
    """A randomly initialised M2M100, biases included (transformers starts them at 0, which would hide errors)."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    torch.manual_seed(seed)
    options = {
        "vocab_size": 90, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": d_ff,
        "decoder_ffn_dim": d_ff, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
        "max_position_embeddings": 64,
    }  # fmt: skip
    model = M2M100ForConditionalGeneration(M2M100Config(**(options | changes))).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.2, std=0.5)
    return model


def batch(seed: int = 0, sentences: int = 3, source: int = 9, target: int = 7) -> dict[str, Tensor]:
    """A padded batch, as a collator makes it: attention_mask on the source, -100 in the labels."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 90, (sentences, source), generator=g)
    labels = torch.randint(4, 90, (sentences, target), generator=g)
    real = torch.arange(source) < torch.randint(2, source + 1, (sentences, 1), generator=g)
    labels[torch.arange(target) >= torch.randint(2, target + 1, (sentences, 1), generator=g)] = -100
    return {"input_ids": ids.masked_fill(~real, 1), "attention_mask": real.long(), "labels": labels}


def masks_for(model: nn.Module, tasks: tuple[str, ...] = ("en-de", "de-en"), share: float = 0.5) -> nspec.NeuronMasks:
    """Random masks; the first layer of the second task has no neuron, the last has them all."""
    from nspec.specialization.layers import find_blocks

    g = torch.Generator().manual_seed(5)
    pairs = find_blocks(model)
    drawn = {t: {p.name: torch.rand(p.d_ff, generator=g) < share for p in pairs} for t in tasks}
    drawn[tasks[-1]][pairs[0].name].fill_(False)
    drawn[tasks[-1]][pairs[-1].name].fill_(True)
    return nspec.NeuronMasks(drawn)


def masked_copy(model: nn.Module, masks: nspec.NeuronMasks, task: str) -> nn.Module:
    """The definition: the same model with fc1.weight multiplied by the mask."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer, mask in masks[task].items():
            other.get_submodule(layer).weight.mul_(mask[:, None])
    return other
