"""Training a language model on sequences."""

from __future__ import annotations

import pytest
import torch
from tiny import lines_of, model_and_tokenizer

import nspec
from nspec.lm.sequences import sequences
from nspec.lm.train import TrainSettings, train


def test_training_moves_what_requires_a_gradient_and_counts_its_tokens() -> None:
    model, tokenizer = model_and_tokenizer()
    mask = torch.zeros(40, dtype=torch.bool)
    mask[[3, 7]] = True
    nspec.finetune(model, nspec.NeuronMasks({"aa": {"model.layers.0.mlp.gate_proj": mask}}), quiet=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    told = []
    found = train(
        model,
        sequences(tokenizer, lines_of("aa"), 16),
        TrainSettings(3, 4, 1e-2, accumulate=2, checkpointing=True),
        lambda *at: told.append(at),
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert found.tokens == 3 * 2 * 4 * 16
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    written = {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert trained <= moved <= trained | written  # the rows themselves, and where they are put
    with nspec.task(model, None):
        nspec.despecialize(model)


def test_a_loss_that_is_no_number_is_an_error() -> None:
    model, tokenizer = model_and_tokenizer()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="diverged"):
        train(model, sequences(tokenizer, lines_of("aa"), 16), TrainSettings(2, 4, 1e-2, clip=0.0))
