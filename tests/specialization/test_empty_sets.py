"""Tasks and layers without neurons: what selection may leave is taken by all that follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_models import FAMILIES, inputs, make, output
from torch import nn

import nspec
from nspec import NeuronMasks
from nspec.analysis import overlap
from nspec.nn.masked_linear import Mode
from nspec.specialization.feed_forward import is_transposed
from nspec.specialization.layers import find_blocks


def masks_of(model: nn.Module) -> NeuronMasks:
    """Of three tasks: no neuron at all, none in every other block, and half of all."""
    blocks = find_blocks(model)
    half = {block.name: torch.arange(block.d_ff) % 2 == 0 for block in blocks}
    some = {name: mask & bool(place % 2) for place, (name, mask) in enumerate(half.items())}
    return NeuronMasks({"none": {name: mask & False for name, mask in half.items()}, "some": some, "half": half})


FAMILIES_TRIED = ["M2M100", "MBart, gelu", "Llama", "Phi3", "GPT2"]


@pytest.mark.parametrize("mode", ["forward", "update"])
@pytest.mark.parametrize("name", FAMILIES_TRIED)
def test_a_specialised_model_computes_and_trains_without_neurons(name: str, mode: Mode) -> None:
    family = FAMILIES[name]
    model, plain, given = make(family), make(family), inputs(family)
    masks = masks_of(model)
    nspec.specialize(model, masks, mode=mode)
    for task in masks.tasks:
        by_hand = {block.name: block for block in find_blocks(plain)}
        with torch.no_grad():
            plain.load_state_dict(model.state_dict())
            for layer, mask in masks[task].items() if mode == "forward" else ():
                for projection in filter(None, (by_hand[layer].fc1, by_hand[layer].up)):
                    rows = mask.repeat(2) if by_hand[layer].fused else mask
                    projection.weight.mul_(rows if is_transposed(projection) else rows[:, None])
        plain.zero_grad()
        plain(**given).loss.backward()
        model.zero_grad()
        with nspec.task(model, task):
            loss = model(**given).loss
            loss.backward()
            torch.testing.assert_close(output(family, model, given), output(family, plain, given))
        torch.testing.assert_close(output(family, nspec.merge(model, task), given), output(family, plain, given))
        for layer, mask in masks[task].items():
            got, want = model.get_submodule(layer).weight.grad, by_hand[layer].fc1.weight.grad
            rows = (mask.repeat(2) if by_hand[layer].fused else mask)[:, None]
            rows = rows.t() if is_transposed(by_hand[layer].fc1) else rows
            torch.testing.assert_close(got, want * rows)
            assert bool(got.any()) == bool(mask.any())
    nspec.despecialize(model)


@pytest.mark.parametrize("mode", ["forward", "update"])
@pytest.mark.parametrize("name", FAMILIES_TRIED)
def test_a_batch_of_tasks_with_and_without_neurons_is_its_parts(name: str, mode: Mode) -> None:
    family = FAMILIES[name]
    model, given = make(family), inputs(family)
    nspec.specialize(model, masks_of(model), mode=mode)
    tasks = ["none", "half", None, "some"]
    kind = torch.optim.AdamW if name == "GPT2" else nspec.RowSparseAdamW  # which takes no transposed weight
    optimizer = kind(model.parameters(), lr=1e-3)
    with nspec.task(model, tasks):
        whole = output(family, model, given)
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = output(family, model, given)
    assert bool(torch.isfinite(after).all())
    assert not torch.equal(whole, after)
    before = make(family)
    nspec.specialize(before, masks_of(before), mode=mode)
    for place, task in enumerate(tasks):
        with nspec.task(before, task):
            part = output(family, before, {key: value[place : place + 1] for key, value in given.items()})
        torch.testing.assert_close(part, whole[place : place + 1])


def test_masks_without_neurons_are_saved_summed_up_and_compared(tmp_path: Path) -> None:
    masks = masks_of(make(FAMILIES["M2M100"]))
    masks.save(tmp_path)
    again = NeuronMasks.load(tmp_path)
    assert all(torch.equal(again[t][layer], masks[t][layer]) for t in masks for layer in masks.layers)
    assert again.density()["none"] == dict.fromkeys(masks.layers, 0.0)
    lines = [line.split() for line in masks.summary().splitlines()]
    assert lines[1:] == [
        ["none", "0", "0.00%", "2", "0.0%"],
        ["some", "36", "25.00%", "1", "50.0%"],
        ["half", "72", "50.00%", "0", "50.0%"],
        ["any", "task", "72", "50.00%", "0", "50.0%"],
    ]
    assert repr(masks) == "NeuronMasks(3 tasks, 2 layers, mean density 0.250)"
    iou = overlap.layer_iou(masks, masks.layers)
    assert iou[:, 0, 2].tolist() == [0.0, 0.0]
    assert iou[:, 0, 1].tolist() == [1.0, 0.0]  # two empty sets are equal
    assert nspec.random_masks(masks, 0).density() == masks.density()
    assert nspec.random_masks(masks, 0, by_layer=False).density()["none"] == dict.fromkeys(masks.layers, 0.0)
