"""Steps that write the rows of the neurons themselves, so that the passes after them need not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import FAMILIES, inputs, output
from test_finetune import LLAMA, loss_of, own, same, state
from torch import nn
from tuned_models import tuned

import nspec
from nspec.nn import tuned_linear


def optimizer_of(model: nn.Module) -> nspec.RowSparseAdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return nspec.RowSparseAdamW(trained, lr=0.05, weight_decay=0.1, model=model, write_rows=True)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_write_rows_it_is_adamw(weight_decay: float) -> None:
    base, model = tuned()
    other = copy.deepcopy(model)
    optimizers = []
    for one in (model, other):
        trained = [p for p in one.parameters() if p.requires_grad]
        options: dict[str, Any] = {"lr": 0.05, "weight_decay": weight_decay}
        mine = nspec.RowSparseAdamW(trained, model=one, **options) if one is model else None
        optimizers.append(mine or torch.optim.AdamW(trained, fused=True, **options))
    for _ in range(3):
        step(model, optimizers[0])
        step(other, optimizers[1])
    assert same(dict(own(model)), dict(own(other)))
    assert not same(dict(own(model)), dict(own(tuned()[1])))
    with pytest.raises(ValueError, match="give a fine-tuned model as model="):
        nspec.RowSparseAdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="or to neurons, of the LlamaForCausalLM: call"):
        nspec.RowSparseAdamW(model.parameters(), model=base)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, family: Any = LLAMA) -> None:
    optimizer.zero_grad()
    loss_of(family, model, inputs(family)).backward()
    optimizer.step()


def layers_of(model: nn.Module) -> list[tuned_linear.TunedLayer]:
    return [layer for layer in model.modules() if isinstance(layer, tuned_linear.TunedLayer)]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each launch of passes writes."""
    counts: list[int] = []
    write = tuned_linear.write_neurons_

    def counted(weights: Any, *rest: Any) -> None:
        counts.append(len(weights))
        write(weights, *rest)

    monkeypatch.setattr(tuned_linear, "write_neurons_", counted)
    return counts


@pytest.mark.parametrize("name", ["Llama", "M2M100"])
def test_training_has_the_bits_of_passes_that_write_and_they_write_nothing(name: str, writes: list[int]) -> None:
    family = LLAMA if name == "Llama" else FAMILIES[name]
    (_, model), (_, other) = tuned(family, dtype=torch.float32), tuned(family, dtype=torch.float32)
    model, other = model.float(), other.float()
    mine, theirs = optimizer_of(model), optimizer_of(other)
    for number in range(3):
        writes.clear()
        step(model, mine, family)
        assert bool(writes) == (number == 0)
        for layer in layers_of(other):
            layer._nspec.written = None
        step(other, theirs, family)
        assert all(torch.equal(p, own(other)[at]) for at, p in own(model).items())
        for layer in layers_of(model):
            rows, at = layer.neurons.of("cy").detach(), layer._nspec.use.index
            found = layer.weight.data.index_select(layer._nspec.dim, at)
            assert torch.equal(found.t() if layer._nspec.dim else found, rows)
    assert same(state(nspec.merge(model, "cy")), state(nspec.merge(other, "cy")))


def _adamw(model: nn.Module) -> None:
    torch.optim.AdamW(own(model).values(), lr=0.1, fused=True).step()


def _assigned(model: nn.Module) -> None:
    for p in own(model).values():
        p.data = p.data * 2


@torch.no_grad()
def _in_place(model: nn.Module) -> None:
    for p in own(model).values():
        p.detach().mul_(2)


def _loaded(model: nn.Module) -> None:
    changed = {name: t * 2 if ".neuron" in name else t for name, t in state(model).items()}
    model.load_state_dict(changed)


def _base_between(model: nn.Module) -> None:
    with nspec.task(model, None), torch.no_grad():
        output(LLAMA, model, inputs(LLAMA))


@torch.no_grad()
def _base_changed(model: nn.Module) -> None:
    for layer in layers_of(model):
        layer.weight.add_(1)


def _averages_between(model: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in own(model).items()}
    for p in own(model).values():
        p.data.mul_(3)
    with torch.no_grad():
        output(LLAMA, model, inputs(LLAMA))
    for name, p in own(model).items():
        p.data.copy_(before[name])


@pytest.mark.parametrize(
    "change", [_adamw, _assigned, _in_place, _loaded, _base_between, _base_changed, _averages_between]
)
def test_what_changes_between_a_step_and_a_pass_is_seen(change: Callable[[nn.Module], None]) -> None:
    _, model = tuned()
    optimizer = optimizer_of(model)
    for _ in range(2):
        step(model, optimizer)
    change(model)
    y = output(LLAMA, model, inputs(LLAMA))
    assert y.requires_grad
    assert torch.equal(y, output(LLAMA, nspec.merge(copy.deepcopy(model), "cy"), inputs(LLAMA)))


def test_weights_that_are_averaged_through_data_are_those_that_are_evaluated() -> None:
    _, model = tuned()
    step(model, optimizer_of(model))
    for p in own(model).values():
        p.data.mul_(3)
    with torch.no_grad():
        y = output(LLAMA, model, inputs(LLAMA))
    assert torch.equal(y, output(LLAMA, nspec.merge(model, "cy"), inputs(LLAMA)))


def test_several_tasks_are_stepped_and_not_written(writes: list[int]) -> None:
    _, model = tuned(tasks=("a", "b"))
    optimizer = optimizer_of(model)
    for _ in range(2):
        with nspec.task(model, "a"):
            writes.clear()
            step(model, optimizer)
            assert writes


def test_a_model_without_neurons_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="write_rows is True and model is None: give the fine-tuned model"):
        nspec.RowSparseAdamW([nn.Parameter(torch.ones(2))], write_rows=True)
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="write_rows is True, and no parameter is of the neurons of this model"):
        nspec.RowSparseAdamW(model.parameters(), model=model, write_rows=True)
