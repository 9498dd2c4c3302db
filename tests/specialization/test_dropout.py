"""Dropout between fc1 and fc2: found before training where it is known, switched off on request, and given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import m2m100, masks_for
from torch import nn

import nspec


class OpenNMT(nn.Module):
    """Its position-wise block: norm, w_1, ReLU, dropout_1, w_2, dropout_2."""

    def __init__(self) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(6, 72), nn.Linear(72, 6)
        self.dropout_1, self.dropout_2 = nn.Dropout(0.1), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout_2(self.w_2(self.dropout_1(torch.relu(self.w_1(x)))))


class Fairseq(nn.Module):
    """Its dropout is a module of its own, with the rate in ``p``."""

    class Drop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = 0.3

        def forward(self, x: Any) -> Any:
            return nn.functional.dropout(x, self.p, self.training)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation_dropout_module = nn.Linear(6, 72), nn.Linear(72, 6), Fairseq.Drop()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_dropout_module(torch.relu(self.fc1(x))))


class Wav2Vec2(nn.Module):
    """The feed-forward block of Transformers' speech models."""

    def __init__(self) -> None:
        super().__init__()
        self.intermediate_dropout = nn.Dropout(0.1)
        self.intermediate_dense, self.output_dense = nn.Linear(6, 72), nn.Linear(72, 6)
        self.output_dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.intermediate_dropout(nn.functional.gelu(self.intermediate_dense(x)))
        return self.output_dropout(self.output_dense(h))


MODELS: dict[str, tuple[Callable[[], nn.Module], str, float]] = {
    "torch.nn": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 96, batch_first=True), 2),
        "dropout",
        0.1,
    ),
    "torch.nn decoder": (lambda: nn.TransformerDecoderLayer(8, 2, 96, dropout=0.4), "dropout", 0.4),
    "M2M100": (lambda: m2m100(activation_dropout=0.1), "activation_dropout", 0.1),
    "OpenNMT": (OpenNMT, "dropout_1", 0.1),
    "wav2vec 2.0": (Wav2Vec2, "intermediate_dropout", 0.1),
    "fairseq": (Fairseq, "activation_dropout_module", 0.3),
    "a sequence": (
        lambda: nn.Sequential(nn.Linear(6, 72), nn.ReLU(), nn.Dropout(0.2), nn.Linear(72, 6)),
        "Dropout",
        0.2,
    ),
}


def rates(model: nn.Module) -> list[Any]:
    """Every rate of dropout in the model, as floats on layers or in modules."""
    found = [module.p for module in model.modules() if hasattr(module, "p") and not callable(module.p)]
    return found + [module.activation_dropout for module in model.modules() if hasattr(module, "activation_dropout")]


@pytest.mark.parametrize("name", MODELS)
def test_it_is_found_in_specialize_with_the_layer_and_set_to_0_on_request_until_despecialize(name: str) -> None:
    make, shown, rate = MODELS[name]
    model = make()
    masks, before = masks_for(model), rates(model)
    with pytest.raises(
        ValueError, match=rf"^{masks.layers[0]}: .*{shown}.* is {rate}, expected 0.*activation_dropout=0"
    ):
        nspec.specialize(model, masks)
    assert rates(model) == before
    assert not any(type(module).__module__.startswith("nspec") for module in model.modules())
    nspec.specialize(model, masks, activation_dropout=0)
    changed = [(a, b) for a, b in zip(before, rates(model), strict=True) if a != b]
    assert len(changed) == len(masks.layers)
    assert {b for _, b in changed} == {0.0}
    nspec.despecialize(model)
    assert rates(model) == before
    nspec.specialize(model, masks, mode="update", activation_dropout=0)
    assert rates(model) == before


def test_the_dropouts_after_fc2_stay_and_training_runs() -> None:
    model = OpenNMT()
    nspec.specialize(model, masks_for(model), activation_dropout=0)
    assert (model.dropout_1.p, model.dropout_2.p) == (0.0, 0.2)
    with nspec.task(model, "en-de"):
        model(torch.randn(4, 6)).sum().backward()


def test_one_that_is_raised_later_is_an_error_in_every_training_pass() -> None:
    model = MODELS["torch.nn"][0]()
    nspec.specialize(model, masks_for(model), activation_dropout=0)
    x = torch.randn(3, 5, 8)
    with nspec.task(model, "en-de"):
        model(x)
        model.layers[1].dropout.p = 0.5
        for _ in range(3):
            with pytest.raises(ValueError, match=r"^layers.1.linear1: .*p=0.5"):
                model(x)
        model.eval()(x)


def test_only_0_can_be_asked_for() -> None:
    with pytest.raises(ValueError, match="activation_dropout is 0.1, expected 0"):
        nspec.specialize(OpenNMT(), masks_for(OpenNMT()), activation_dropout=0.1)


def test_it_stays_where_the_other_neurons_give_exactly_0() -> None:
    """T5 has no biases: of the neurons that are not active nothing is there to drop."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 90, "d_model": 16, "d_kv": 4, "d_ff": 80, "num_layers": 1, "num_heads": 4}
    for kind in ("relu", "gated-gelu"):
        config = T5Config(**sizes, decoder_start_token_id=0, feed_forward_proj=kind, dropout_rate=0.0)
        model = T5ForConditionalGeneration(config)
        block = model.encoder.block[0].layer[1].DenseReluDense
        nspec.specialize(model, masks_for(model), activation_dropout=None)
        x = torch.randn(4000, 16)
        with nspec.task(model, "en-de"):
            want = block(x)
            block.dropout.p = 0.5
            drawn = torch.stack([block(x) for _ in range(3)])
            assert not torch.equal(drawn[0], want)
            assert (drawn.mean((0, 1)) - want.mean(0)).abs().max() < 0.2 * want.std()
        assert torch.isfinite(drawn).all()


def test_one_that_gives_constants_is_an_error_in_the_pass() -> None:
    model = nn.Sequential(nn.Linear(6, 72, bias=False), nn.Sigmoid(), nn.Dropout(0.2), nn.Linear(72, 6))
    nspec.specialize(model, masks_for(model))
    with nspec.task(model, "en-de"), pytest.raises(ValueError, match="^0: .*p=0.2 .*give constants"):
        model(torch.randn(3, 6))
