"""Small models with masks of single weights, and what is compared of them."""

from __future__ import annotations

import copy

import torch
import torch.nn.utils.prune
from torch import Tensor, nn

from nspec.baselines.lass import (
    WeightMasks,
    prunable_layers,
)

TASKS = ("en-de", "de-en", "en-fr")


def m2m100() -> nn.Module:
    """A small model with biases that are not 0."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=40, d_model=12, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=20, decoder_ffn_dim=20,
        encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0, max_position_embeddings=32, init_std=0.3,
    )  # fmt: skip
    model = M2M100ForConditionalGeneration(config).double()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.2, std=0.5)
    return model


def batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    ids, labels = (torch.randint(4, 40, (4, length), generator=g) for length in (7, 5))
    real = torch.arange(7) < torch.randint(2, 8, (4, 1), generator=g)
    return {"input_ids": ids.masked_fill(~real, 1), "attention_mask": real.long(), "labels": labels}


def random_masks(model: nn.Module) -> WeightMasks:
    g = torch.Generator().manual_seed(5)
    names = [f"linears.{i}" for i in range(len(model.linears))] if isinstance(model, Layers) else prunable_layers(model)
    shapes = {name: model.get_submodule(name).weight.shape for name in names}
    return WeightMasks({t: {name: torch.rand(s, generator=g) < 0.6 for name, s in shapes.items()} for t in TASKS})


def multiplied(model: nn.Module, masks: WeightMasks, task: str) -> nn.Module:
    """The definition: the same model with its weights multiplied by the masks."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer, mask in masks[task].items():
            other.get_submodule(layer).weight.mul_(mask)
    return other


def loss_of(model: nn.Module, part: dict[str, Tensor]) -> Tensor:
    """The sum over tokens, which does not change when a batch is split."""
    logits = model(**part).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), part["labels"].flatten(), reduction="sum")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        scale = max(1.0, wanted[name].abs().max().item())
        assert (gradient - wanted[name]).abs().max().item() <= 1e-12 * scale, name


class Layers(nn.Module):
    """Linear layers and nothing else, for masks on one matrix."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(wide, out, dtype=torch.float64) for out, wide in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = linear(x)
        return x
