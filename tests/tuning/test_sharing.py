"""Blocks in several places, layers and weights of several blocks, and parameters on one memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import near, own, rows_of
from torch import Tensor, nn

import nspec

INDEX = torch.arange(20) < 3


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 20, bias=False), nn.Linear(6, 20, bias=False)
        self.down_proj, self.act_fn = nn.Linear(20, 6, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Two(nn.Module):
    def __init__(self, whole: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = Gated()
        self.b = self.a if whole else Gated()
        self.double()

    def forward(self, x: Tensor) -> Any:
        return x + self.b(x + self.a(x))


def masks(*layers: str) -> nspec.NeuronMasks:
    return nspec.NeuronMasks({"cy": dict.fromkeys(layers, INDEX)})


def sequence() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 6))


X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)


def test_a_block_in_two_places_has_one_set_of_neurons_with_the_gradients_of_both(tmp_path: Path) -> None:
    base = Two()
    model = nspec.finetune(copy.deepcopy(base), masks("a.gate_proj"), quiet=True)
    assert list(own(model)) == [f"a.{part}_proj.neurons.cy" for part in ("gate", "up", "down")]
    for one in (base, model):
        one(X).square().sum().backward()
    wanted = rows_of(base, "cy", masks("a.gate_proj"))
    assert all(near(p.grad, wanted[name]) for name, p in own(model).items())
    torch.optim.SGD(own(model).values(), lr=0.1).step()
    y = model(X)
    assert not torch.equal(y, base(X))
    assert torch.equal(nspec.merge(model, "cy")(X), y)
    nspec.save_neurons(model, tmp_path, dtype=torch.float64)
    assert torch.equal(nspec.load_neurons(copy.deepcopy(base), tmp_path)(X), y)
    assert torch.equal(nspec.despecialize(model)(X), base(X))


@pytest.mark.parametrize("part", ["gate_proj", "down_proj"])
def test_a_layer_that_another_block_has_too_is_refused(part: str) -> None:
    model = Two(whole=False)
    setattr(model.b, part, getattr(model.a, part))
    with pytest.raises(
        ValueError, match=rf"b.{part}.* \(a whole block can|b.{part} is a layer of a.gate_proj's block too"
    ):
        nspec.finetune(model, masks("a.gate_proj"), quiet=True)
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_of_which_no_part_is_chosen_may_be_of_two_blocks() -> None:
    base = Two(whole=False)
    base.b.down_proj = base.a.down_proj
    given = masks("a.gate_proj", "b.gate_proj")
    model = nspec.finetune(copy.deepcopy(base), given, parts=["gate"], quiet=True)
    for one in (base, model):
        one(X).square().sum().backward()
    wanted = rows_of(base, "cy", given)
    assert len(own(model)) == 2
    assert all(near(p.grad, wanted[name]) for name, p in own(model).items())


def test_a_weight_that_is_tied_to_another_layers_is_refused() -> None:
    model = Two(whole=False)
    model.b.down_proj.weight = model.a.down_proj.weight
    with pytest.raises(ValueError, match=r"a.down_proj.weight and b.down_proj.weight are one parameter"):
        nspec.finetune(model, masks("a.gate_proj"), quiet=True)


def test_a_layer_in_two_blocks_is_refused_before_anything_is_changed() -> None:
    model = nn.Sequential(*sequence(), nn.ReLU(), nn.Linear(6, 20))
    given = nspec.NeuronMasks({"cy": {"0": INDEX, "2": torch.arange(6) < 2}})
    with pytest.raises(ValueError, match=r"2 is in two blocks, those of 0 and 2: leave one of them out"):
        nspec.finetune(model, given, quiet=True)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("shared", ["weight", "bias", "rows"])
def test_another_parameter_on_the_same_memory_is_refused_and_named(shared: str) -> None:
    model = nn.ModuleDict({"p": sequence(), "q": sequence()})
    p, q = model["p"][0], model["q"][0]  # type: ignore[index]
    if shared == "rows":
        model["q"][2].weight = nn.Parameter(p.weight.data[2:8])  # type: ignore[index]
    else:
        setattr(q, shared, nn.Parameter(getattr(p, shared).data))
    name = "q.2.weight" if shared == "rows" else f"q.0.{shared}"
    mine = "bias" if shared == "bias" else "weight"
    with pytest.raises(ValueError, match=rf"^p.0.{mine} and {name} are two parameters on one memory"):
        nspec.finetune(model, masks("p.0"), quiet=True)
    with pytest.raises(ValueError, match="are two parameters on one memory"):
        nspec.finetune(model, masks(*(["q.0"] if shared != "rows" else ["q.0", "p.0"])), quiet=True)


def test_parameters_side_by_side_in_one_memory_are_no_fault() -> None:
    model = nn.ModuleDict({"p": sequence(), "q": sequence()})
    p, q = model["p"], model["q"]
    flat, at = torch.randn(2000), 0
    for layer in (p[0], q[0], q[2]):  # type: ignore[index]
        layer.weight = nn.Parameter(flat[at : at + 120].view(layer.weight.shape))
        at += 120
    columns = torch.randn(20, 12)
    p[0].weight = nn.Parameter(columns[:, :6])  # type: ignore[index]
    q[0].weight = nn.Parameter(columns[:, 6:])  # type: ignore[index]
    before = q[0].weight.detach().clone()  # type: ignore[index]
    nspec.finetune(model, masks("p.0"), quiet=True)
    with torch.no_grad():
        for parameter in own(model).values():
            parameter += 1
    p(torch.randn(2, 6))
    assert torch.equal(q[0].weight, before)  # type: ignore[index]
    q[0].weight = nn.Parameter(columns[:, 5:11])  # type: ignore[index]
    with pytest.raises(ValueError, match=r"p.0.weight and q.0.weight are two parameters on one memory"):
        nspec.finetune(nspec.despecialize(model), masks("p.0"), quiet=True)


def test_an_embedding_that_is_tied_to_the_output_layer_is_no_fault() -> None:
    model = nn.ModuleDict({"p": sequence(), "embed": nn.Embedding(9, 6), "head": nn.Linear(6, 9)})
    model["head"].weight = model["embed"].weight
    nspec.finetune(model, masks("p.0"), quiet=True)
    assert len(own(model)) == 3
