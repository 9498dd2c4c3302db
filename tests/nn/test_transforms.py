"""torch.func over masked layers and specialised models: the derivatives of a layer whose masked rows are constants."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import nspec
from nspec import MaskedLinear, NeuronMasks, RowSparseAdamW

MASK = torch.arange(10) % 3 == 0
MODES = pytest.mark.parametrize("mode", ["forward", "update"])
BOTH = pytest.mark.parametrize("whole", [False, True], ids=["layer", "model"])


def made(whole: bool, mode: Any) -> nn.Module:
    torch.manual_seed(0)
    if not whole:
        layer = MaskedLinear(6, 10, mode=mode, dtype=torch.float64)
        layer.set_mask(MASK)
        return layer
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)).double()
    nspec.specialize(model, NeuronMasks({"a": {"0": MASK}, "b": {"0": ~MASK}}), mode=mode)
    nspec.set_task(model, "a")
    return model


def plain(whole: bool, mode: str, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """The definition."""
    name = "0." if whole else ""
    weight = parameters[f"{name}weight"]
    rest = weight.detach() if mode == "update" else torch.zeros_like(weight)
    h = nn.functional.linear(x, torch.where(MASK[:, None], weight, rest), parameters[f"{name}bias"])
    return nn.functional.linear(h.relu(), parameters["2.weight"], parameters["2.bias"]) if whole else h


@BOTH
@MODES
def test_derivatives_are_those_of_the_definition(whole: bool, mode: str) -> None:
    model, x = made(whole, mode), torch.randn(5, 6, dtype=torch.float64)
    own = {name: p.detach() for name, p in model.named_parameters()}

    def ours(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,))

    def theirs(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return plain(whole, mode, parameters, x)

    tangents = ({name: torch.randn_like(p) for name, p in own.items()}, torch.randn_like(x))
    found = []
    for f in (ours, theirs):
        loss = lambda p, x, f=f: f(p, x).square().sum()
        stacked = {name: torch.stack([p, 2 * p]) for name, p in own.items()}
        found.append(
            [
                grad(loss)(own, x),
                vmap(grad(loss), in_dims=(None, 0))(own, x),  # the gradient of each sample
                jvp(f, (own, x), tangents),
                jacrev(f, argnums=1)(own, x),
                jacfwd(f)(own, x),
                hessian(loss)(own, x),
                vmap(f, in_dims=(0, None))(stacked, x),  # an ensemble
                vmap(f, in_dims=(None, 0))(own, x),
            ]
        )
    torch.testing.assert_close(found[0], found[1])
    if mode == "forward":
        name = "0.weight" if whole else "weight"
        assert (found[0][0][name][~MASK] == 0).all()


@MODES
def test_a_list_of_tasks(mode: Any) -> None:
    model, x = made(True, mode), torch.randn(4, 3, 6, dtype=torch.float64)
    own = {name: p.detach() for name, p in model.named_parameters()}
    for tasks in (["a", "b", "a", "b"], ["a", "a", "b", "b"], ["b"] * 4):
        with nspec.task(model, tasks):
            ours = grad(lambda p: functional_call(model, p, (x,)).square().sum())(own)
            theirs = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        torch.testing.assert_close(list(ours.values()), list(theirs))


@MODES
def test_gradients_of_torch_func_are_stepped_in_the_rows_that_they_have(mode: Any) -> None:
    model = made(True, mode)
    other = copy.deepcopy(model)
    optimizer = RowSparseAdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    reference = RowSparseAdamW(other.parameters(), lr=0.1, weight_decay=0.1)
    for task in ("a", "b", "a"):
        x = torch.randn(50, 6, dtype=torch.float64)
        own = {name: p.detach() for name, p in model.named_parameters()}
        with nspec.task(model, task), nspec.task(other, task):
            each = vmap(grad(lambda p, x: functional_call(model, p, (x,)).square().sum()), in_dims=(None, 0))(own, x)
            other(x).square().sum().backward()
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            p.grad = each[name].sum(0)
        optimizer.step()
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(list(model.parameters()), list(other.parameters()))
