from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_translation import Toy

import nspec
from nspec.mt.masked_loss import MaskedLoss
from nspec.mt.training.validation import Validator


def test_the_loss_with_masks_is_that_of_the_merged_model_and_the_model_stays_as_it_was(toy: Toy) -> None:
    config, model, task = toy.config(), toy.model(), toy.data.tasks[0]
    masks = toy.masks()
    layer = masks.layers[0]
    one = nspec.NeuronMasks({task: {layer: masks[task][layer]}})
    measure = MaskedLoss(model, toy.data, config.train.batch_tokens)
    dense, masked = measure(task), measure(task, one)
    config.train.valid_bleu_sentences = 0
    validator = Validator(model, toy.data, config.train, config.decode, precision="fp32")
    assert dense == pytest.approx(validator.measure()["tasks"][task]["loss"], rel=1e-6)
    nspec.specialize(model, one)
    merged = nspec.merge(model, task)
    nspec.despecialize(model)
    assert masked == pytest.approx(MaskedLoss(merged, toy.data, config.train.batch_tokens)(task), rel=1e-6)
    assert masked != pytest.approx(dense, rel=1e-6)
    assert type(model.get_submodule(layer)) is nn.Linear
    with torch.no_grad():
        assert measure(task) == dense
