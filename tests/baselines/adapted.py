"""Small models with adapters, and what is compared of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import nspec
from nspec.baselines.adapters import (
    TaskAdapters,
    adapter_parameters,
    add_adapters,
)

GROUPS = {"en-de": "germanic", "en-nl": "germanic", "en-fr": "romance", "de-en": "to.en"}


TASKS = ["en-fr", "en-de", "en-fr", "de-en", "en-nl", "en-de"]


def m2m100(dtype: torch.dtype = torch.float64) -> Any:
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        encoder_layerdrop=0.0, decoder_layerdrop=0.0, max_position_embeddings=32, init_std=0.4, tie_word_embeddings=False,
    )  # fmt: skip
    return M2M100ForConditionalGeneration(config).to(dtype).eval()


class Seq2Seq(nn.Module):
    """torch.nn's encoder and decoder layers, of which only the second decoder layer gives a tuple."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": batch_first}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **options), 2, None, batch_first)
        self.layers = nn.ModuleList([nn.TransformerDecoderLayer(8, 2, **options), Tupled(8, 2, **options)])
        self.to(torch.float64)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        memory = self.encoder(x, src_key_padding_mask=padding)
        y, rest = self.layers[1](self.layers[0](x, memory), memory)
        assert rest == "rest"
        return y


class Tupled(nn.TransformerDecoderLayer):
    def forward(self, *args: Any, **options: Any) -> Any:
        return super().forward(*args, **options), "rest"


def adapted(model: nn.Module | None = None, **options: Any) -> Any:
    """With adapters whose up-projections are drawn, as if trained."""
    model = add_adapters(Seq2Seq() if model is None else model, GROUPS, 4, **options)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.3)
    return model


def x_of(rows: int = len(TASKS), length: int = 5, seed: int = 2) -> Tensor:
    return torch.randn(rows, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def under(model: nn.Module, task: Any, x: Tensor) -> Tensor:
    with nspec.task(model, task):
        return model(x)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def same(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> bool:
    return all(close(found[name], wanted[name]) for name in wanted)


def layers_of(model: nn.Module) -> list[TaskAdapters]:
    return [module for module in model.modules() if isinstance(module, TaskAdapters)]


def close(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is b is None) or bool(a is not None and b is not None and torch.allclose(a, b, rtol=0, atol=1e-10))
