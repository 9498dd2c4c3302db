"""Silent neurons: what they compute, what is trained, and what is kept of it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import nspec

WIDTH = 72


class Block(nn.Module):
    """A feed-forward block, plain or gated."""

    def __init__(self, activation: Callable[[Tensor], Tensor], gated: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.activation, self.gated = activation, gated
        self.gate_proj = nn.Linear(6, WIDTH, bias=bias)
        self.up_proj = nn.Linear(6, WIDTH, bias=bias) if gated else None
        self.down_proj = nn.Linear(WIDTH, 6, bias=bias)
        if not gated:
            self.fc1, self.fc2 = self.gate_proj, self.down_proj
            del self.gate_proj, self.up_proj, self.down_proj

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return self.fc2(self.activation(self.fc1(x)))


def block(kind: str) -> Block:
    torch.manual_seed(1)
    made = {
        "relu": lambda: Block(torch.relu),
        "sigmoid": lambda: Block(torch.sigmoid),  # of 0 it is not 0
        "gelu": lambda: Block(nn.functional.gelu),
        "gated": lambda: Block(nn.functional.silu, gated=True),
        "gated without biases": lambda: Block(nn.functional.silu, gated=True, bias=False),
    }
    return made[kind]().double()


KINDS = ["relu", "sigmoid", "gelu", "gated", "gated without biases"]


def masks(model: Block, share: float = 0.4) -> nspec.NeuronMasks:
    generator = torch.Generator().manual_seed(2)
    name = "gate_proj" if model.gated else "fc1"
    return nspec.NeuronMasks({t: {name: torch.rand(WIDTH, generator=generator) < share} for t in ("a", "b")})


def plain(model: Block, x: Tensor, active: Tensor) -> Tensor:
    """The block of the active neurons alone: y = h_A W2[:, A]ᵀ + b2."""
    rows = active.nonzero().squeeze(1)
    take = lambda layer: nn.functional.linear(x, layer.weight[rows], None if layer.bias is None else layer.bias[rows])
    if model.gated:
        h, last = model.activation(take(model.gate_proj)) * take(model.up_proj), model.down_proj
    else:
        h, last = model.activation(take(model.fc1)), model.fc2
    return nn.functional.linear(h, last.weight[:, rows], last.bias)


def gradients(model: nn.Module, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters()) | {"x": x}
    found = torch.autograd.grad(y.square().sum(), list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found)}


@pytest.mark.parametrize("share", [0.4, 0.95])  # packed, and the layout of all neurons
@pytest.mark.parametrize("kind", KINDS)
def test_silent_neurons_give_nothing_and_get_no_gradient(kind: str, share: float) -> None:
    model = block(kind)
    chosen, x = masks(model, share), torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    dense = copy.deepcopy(model)
    nspec.specialize(model, chosen, silent=True)
    for task in chosen.tasks:
        (active,) = chosen[task].values()
        want = plain(dense, x, active)
        with nspec.task(model, task):
            y = model(x)
        assert torch.allclose(y, want, rtol=1e-10, atol=1e-12)
        found, expected = gradients(model, y, x), gradients(dense, want, x)
        assert all(torch.allclose(found[name], expected[name], rtol=1e-10, atol=1e-10) for name in expected)
        last, first = ("down_proj", "gate_proj") if model.gated else ("fc2", "fc1")
        assert not found[f"{last}.weight"][:, ~active].any()
        assert f"{first}.bias" not in found or not found[f"{first}.bias"][~active].any()
        with nspec.task(model, task), torch.no_grad():
            assert torch.allclose(model(x), want, rtol=1e-10, atol=1e-12)
        merged = nspec.merge(model, task)
        assert torch.allclose(merged(x), want, rtol=1e-10, atol=1e-12)
        assert type(getattr(merged, first)) is nn.Linear
    with nspec.task(model, ["a", "b", None, "a"]):
        mixed = model(x)
    for row, task in enumerate(["a", "b", None, "a"]):
        want = dense(x[row]) if task is None else plain(dense, x[row], next(iter(chosen[task].values())))
        assert torch.allclose(mixed[row], want, rtol=1e-10, atol=1e-12)
    nspec.despecialize(model)
    assert torch.equal(model(x), dense(x))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), dense.parameters()))


def test_silent_blocks_may_drop_activations_out() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, WIDTH, dropout=0.0, batch_first=True)
    layer.dropout.p = 0.5
    chosen = nspec.NeuronMasks({"a": {"linear1": torch.arange(WIDTH) % 2 == 0}})
    with pytest.raises(ValueError, match="dropout"):
        nspec.specialize(copy.deepcopy(layer), chosen)
    nspec.specialize(layer, chosen, silent=True)
    with nspec.task(layer, "a"):
        layer(torch.randn(2, 3, 8)).sum().backward()
    assert not layer.linear2.weight.grad[:, 1::2].any()
    assert layer.linear2.weight.grad[:, ::2].any()


def test_silent_neurons_compile() -> None:
    model = block("relu")
    chosen, x = masks(model), torch.randn(3, 6, dtype=torch.float64)
    nspec.specialize(model, chosen, silent=True)
    with nspec.task(model, "a"):
        want = model(x)
        assert torch.allclose(torch.compile(model, backend="eager", fullgraph=True)(x), want)


def test_what_cannot_be_silent_is_an_error() -> None:
    model = block("relu")
    with pytest.raises(ValueError, match="mode 'update'"):
        nspec.specialize(model, masks(model), mode="update", silent=True)
    with pytest.raises(TypeError, match="silent is 1"):
        nspec.specialize(model, masks(model), silent=1)  # type: ignore[arg-type]
    both = nn.ModuleDict({"one": block("relu"), "two": block("relu")})
    both["two"].fc2.weight = both["one"].fc2.weight
    chosen = nspec.NeuronMasks({"a": {f"{name}.fc1": torch.ones(WIDTH).bool() for name in both}})
    with pytest.raises(ValueError, match="one.fc1 and two.fc1 have one weight of fc2"):
        nspec.specialize(both, chosen, silent=True)
    assert type(both["one"].fc1) is nn.Linear
    nspec.specialize(model, masks(model), silent=True)
    model.fc2 = nn.Linear(WIDTH, 6).double()
    with pytest.raises(ValueError, match="was replaced since"):
        nspec.merge(model, "a")
