"""Every family of models: exact in output and every gradient, in both modes, merged, mixed and undone."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import FAMILIES, Family, inputs, make, output
from torch import Tensor, nn

import nspec
from nspec.specialization.apply import projections
from nspec.specialization.feed_forward import FeedForward, is_transposed
from nspec.specialization.layers import find_blocks

EACH = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def masks_of(blocks: list[FeedForward]) -> nspec.NeuronMasks:
    g = torch.Generator().manual_seed(5)
    return nspec.NeuronMasks({t: {b.name: torch.rand(b.d_ff, generator=g) < 0.4 for b in blocks} for t in "ab"})


def shown(block: FeedForward, layer: nn.Module, mask: Tensor) -> Tensor:
    """The mask, in the shape of the weight of a projection."""
    mask = mask.repeat(2) if block.fused else mask
    return mask[None, :].double() if is_transposed(layer) else mask[:, None].double()


def masked_weights(model: nn.Module, masks: nspec.NeuronMasks, task: str) -> dict[nn.Module, Tensor]:
    """Each projection with what its weight is multiplied by."""
    blocks = find_blocks(model)
    return {layer: shown(b, layer, masks[task][b.name]) for b in blocks for layer in projections(b)}


def results(family: Family, model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    y = output(family, model, given)
    weights = torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)
    (y.square() * weights).mean().backward()
    return y.detach(), [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


def compare(ours: list[Tensor], theirs: list[Tensor], model: nn.Module) -> None:
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@EACH
def test_it_equals_the_masked_model_in_both_modes_merged_mixed_and_undone(family: Family) -> None:
    model, given = make(family), inputs(family)
    masks = masks_of(find_blocks(model))
    dense, dense_gradients = results(family, model, given)
    classes = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    wanted: dict[str, tuple[Tensor, list[Tensor]]] = {}
    for task in "ab":
        other = copy.deepcopy(model)
        multiplied = masked_weights(other, masks, task)
        with torch.no_grad():
            for layer, by in multiplied.items():
                layer.weight.mul_(by)
        y, gradients = results(family, other, given)
        by_weight = {id(layer.weight): by for layer, by in multiplied.items()}
        wanted[task] = y, [g * by_weight.get(id(p), 1.0) for p, g in zip(other.parameters(), gradients)]
        assert (y - dense).abs().max() > 1e-6
    nspec.specialize(model, masks)
    for task in "ab":
        with nspec.task(model, task):
            y, gradients = results(family, model, given)
        torch.testing.assert_close(y, wanted[task][0], rtol=0, atol=1e-10)
        compare(gradients, wanted[task][1], model)
    with torch.no_grad():
        with nspec.task(model, "a"):
            torch.testing.assert_close(output(family, model, given), wanted["a"][0], rtol=0, atol=1e-10)
        torch.testing.assert_close(output(family, nspec.merge(model, "a"), given), wanted["a"][0], rtol=0, atol=1e-10)
    tasks = ["a", "b", "b", "a"]
    if family.mixes:
        time_first = family.options.get("time_first", False)
        with nspec.task(model, tasks, batch_dim=int(time_first)):
            y, _ = results(family, model, given)
        rows = torch.stack([wanted[task][0][i] for i, task in enumerate(tasks)])
        torch.testing.assert_close(y, rows, rtol=0, atol=1e-10)
    nspec.despecialize(model)
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == classes
    assert torch.equal(results(family, model, given)[0], dense)
    by_weight = {id(layer.weight): by for layer, by in masked_weights(model, masks, "b").items()}
    nspec.specialize(model, masks, "update")
    with nspec.task(model, "b"):
        y, gradients = results(family, model, given)
    torch.testing.assert_close(y, dense, rtol=0, atol=1e-10)
    compare(gradients, [g * by_weight.get(id(p), 1.0) for p, g in zip(model.parameters(), dense_gradients)], model)
    nspec.despecialize(model)
    assert torch.equal(results(family, model, given)[0], dense)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.reads in ("pairs", "text")])
def test_what_is_generated_under_a_task_is_what_the_merged_model_generates(name: str) -> None:
    family = FAMILIES[name]
    model = make(family).eval()
    if not model.can_generate():
        pytest.skip(f"{family.model} does not generate")
    nspec.specialize(model, masks_of(find_blocks(model)))
    given = {"input_ids": inputs(family)["input_ids"], "max_new_tokens": 6, "num_beams": 2}
    with nspec.task(model, "a"):
        ours = model.generate(**given)
    assert torch.equal(ours, nspec.merge(model, "a").generate(**given))
