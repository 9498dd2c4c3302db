"""Optimiser steps that leave alone the weights that no task of the step keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import nspec
from nspec.baselines.lass import WeightMasks, apply_weight_masks, kept_weights_only

SHAPES = {"0": (16, 8), "2": (8, 16)}
LAYERS = list(SHAPES)


def masked_model() -> tuple[nn.Module, WeightMasks]:
    """Two masked layers and a plain one, and masks of two tasks that leave some weights to none of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 8))
    masks = WeightMasks({task: {name: torch.rand(shape) < 0.4 for name, shape in SHAPES.items()} for task in "ab"})
    apply_weight_masks(model, masks)
    return model, masks


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "adam with L2": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "sgd with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
}


def backward(model: nn.Module, task: str | list[str]) -> None:
    with nspec.task(model, task):
        model(torch.randn(4, 8)).square().mean().backward()


def held(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {
        k: v for k, v in optimizer.state[weight].items() if isinstance(v, torch.Tensor) and v.shape == weight.shape
    }
    return {"weight": weight.detach().clone(), **{name: value.clone() for name, value in found.items()}}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_what_the_tasks_of_a_step_keep_moves(name: str) -> None:
    model, masks = masked_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    start = {layer: model.get_submodule(layer).weight.detach().clone() for layer in LAYERS}
    for tasks in (["a"], ["b"], ["a"], ["a", "b"], ["b"], ["b"]):
        for task in tasks:
            backward(model, task)
        before = {layer: held(optimizer, model.get_submodule(layer).weight) for layer in LAYERS}
        plain = model[3].weight.detach().clone()  # type: ignore[index]
        with kept_weights_only(model, optimizer, tasks):
            optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(model[3].weight, plain)  # type: ignore[index]
        for layer in LAYERS:
            kept = torch.stack([masks[task][layer] for task in tasks]).any(0)
            for what, value in held(optimizer, model.get_submodule(layer).weight).items():
                old = before[layer].get(what, torch.zeros_like(value))
                assert torch.equal(value[~kept], old[~kept]), what
            assert (model.get_submodule(layer).weight != before[layer]["weight"])[kept].all()
    for layer in LAYERS:
        nobodys = ~torch.stack([masks[task][layer] for task in "ab"]).any(0)
        assert nobodys.any()
        assert torch.equal(model.get_submodule(layer).weight[nobodys], start[layer][nobodys])


def test_with_one_task_the_kept_weights_get_the_ordinary_step() -> None:
    one, two = masked_model(), masked_model()
    steppers = [torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1) for model, _ in (one, two)]
    for _ in range(3):
        for model, _ in (one, two):
            torch.manual_seed(7)
            backward(model, "a")
        steppers[0].step()
        with kept_weights_only(two[0], steppers[1], ["a"]):
            steppers[1].step()
        for optimizer in steppers:
            optimizer.zero_grad()
    for layer in LAYERS:
        kept = two[1]["a"][layer]
        assert torch.equal(one[0].get_submodule(layer).weight[kept], two[0].get_submodule(layer).weight[kept])
        assert not torch.equal(one[0].get_submodule(layer).weight, two[0].get_submodule(layer).weight)


def test_a_step_that_is_not_taken_changes_nothing() -> None:
    model, _ = masked_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backward(model, "a")
    with kept_weights_only(model, optimizer, ["a"]):
        pass
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_mixed_batch_is_a_step_of_its_tasks() -> None:
    model, masks = masked_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    backward(model, ["a", "b", "b", "a"])
    before = model[0].weight.detach().clone()  # type: ignore[index]
    with kept_weights_only(model, optimizer, ["a", "b"]):
        optimizer.step()
    assert torch.equal((model[0].weight != before), masks["a"]["0"] | masks["b"]["0"])  # type: ignore[index]


def test_a_model_without_masks_and_an_unknown_task_are_errors() -> None:
    model, _ = masked_model()
    optimizer = torch.optim.AdamW(model.parameters())
    with (
        pytest.raises(ValueError, match="no weight masks for c; there are masks for a, b"),
        kept_weights_only(model, optimizer, ["a", "c"]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="Linear has no weight masks"),
        kept_weights_only(nn.Linear(2, 2), optimizer, ["a"]),
    ):
        pass
