"""What comes between the layers of a block: an activation function of each number, and of a gated block on its gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nspec


class Plain(nn.Module):
    """Says nothing of what it computes."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self._between = nn.Linear(4, 40), nn.Linear(40, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self._between(self.fc1(x)))


@pytest.mark.parametrize(
    "between",
    [
        torch.relu,
        F.gelu,
        F.silu,
        torch.sigmoid,
        F.softplus,
        lambda h: torch.relu(h) ** 2,
        lambda h: 3 * F.elu(h),
        F.relu_,
    ],
)
def test_activations_that_a_block_does_not_name(between: Any) -> None:
    model, x = Plain(between), torch.randn(30, 4)
    counts = nspec.profile(model, {"t": [x, x]})
    assert torch.equal(counts["t"]["fc1"], 2 * (model.fc1(x) > 0).sum(0))


@pytest.mark.parametrize(
    "between",
    [
        lambda h: F.gelu(F.layer_norm(h, (40,))),
        lambda h: torch.sigmoid(F.layer_norm(h, (40,))),
        lambda h: torch.softmax(h, -1),
        torch.abs,
        lambda h: F.gelu(-h),
        lambda h: F.gelu(h)[:, None],
    ],
)
def test_what_is_no_activation_of_each_number_is_refused(between: Any) -> None:
    with pytest.raises(ValueError, match="^fc1: what fires in this block cannot be counted"):
        nspec.profile(Plain(between), {"t": [torch.randn(30, 4)]})


def test_a_named_relu_must_be_all_there_is() -> None:
    model = Plain(lambda h: torch.relu(h) * 2)
    model.activation_fn = torch.relu
    with pytest.raises(ValueError, match="is not ReLU alone in eval mode, though its activation is ReLU"):
        nspec.profile(model, {"t": [torch.randn(30, 4)]})


class Gated(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor], fused: bool, second: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        if fused:
            self.fc1, self.fc2 = nn.Linear(4, 80), nn.Linear(40, 4)
        else:
            self.a, self.b, self.c = nn.Linear(4, 40), nn.Linear(4, 40), nn.Linear(40, 4)
        self._act, self._second = act, second

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fc1(x).chunk(2, -1) if hasattr(self, "fc1") else (self.a(x), self.b(x))
        gate, up = (up, gate) if self._second else (gate, up)
        return (self.fc2 if hasattr(self, "fc1") else self.c)(self._act(gate) * up)


@pytest.mark.parametrize("act", [F.silu, F.gelu, torch.relu, torch.sigmoid])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_activation_function_must_see_the_gate(act: Any, fused: bool, dtype: torch.dtype) -> None:
    x = torch.randn(60, 4).to(dtype)
    layers: Any = None if fused else [("a", "b", "c")]
    right, wrong = Gated(act, fused).to(dtype), Gated(act, fused, second=True).to(dtype)
    counts = nspec.profile(right, {"t": [x]}, layers=layers)
    z = right.fc1(x)[:, :40] if fused else right.a(x)
    assert torch.equal(counts["t"][counts.layers[0]], (z > 0).sum(0))
    expected = "sees the second half of the fused projection" if fused else r"name \(gate, up, down\) in this order"
    with pytest.raises(ValueError, match=expected):
        nspec.profile(wrong, {"t": [x]}, layers=layers)


class Named(Gated):
    """The same, with names that are known, of two layers or of a fused one; in a model, or the model itself."""

    def __init__(self, act: Callable[[Tensor], Tensor], fused: bool, second: bool) -> None:
        super().__init__(act, fused, second)
        if fused:
            self.w12, self.w3 = self.fc1, self.fc2
            del self.fc1, self.fc2
        else:
            self.w1, self.w3, self.w2 = self.a, self.b, self.c
            del self.a, self.b, self.c

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, -1) if hasattr(self, "w12") else (self.w1(x), self.w3(x))
        gate, up = (up, gate) if self._second else (gate, up)
        return (self.w3 if hasattr(self, "w12") else self.w2)(self._act(gate) * up)


ANY: list[Any] = [F.mish, F.elu, F.softplus, F.hardswish, F.leaky_relu, F.selu, torch.exp, F.relu6]
ANY += [lambda z: 2 * F.silu(z), lambda z: F.silu(1.3 * z)]


@pytest.mark.parametrize("act", ANY)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_activation_shows_the_gate_by_what_fc2_gets(act: Any, fused: bool, dtype: torch.dtype) -> None:
    x = torch.randn(60, 4).to(dtype)
    right, wrong = (nn.Sequential(Named(act, fused, second)).to(dtype) for second in (False, True))
    first = right[0].w12 if fused else right[0].w1
    counts = nspec.profile(right, {"t": [x]})
    assert torch.equal(counts["t"][counts.layers[0]], (first(x)[:, :40] > 0).sum(0))
    with pytest.raises(ValueError, match="second half" if fused else r"layers=\[\(gate, '0.w1', down\)\]"):
        nspec.profile(wrong, {"t": [x]})
    if not fused:
        counts = nspec.profile(wrong, {"t": [x]}, layers=[("0.w3", "0.w1", "0.w2")])
        assert torch.equal(counts["t"]["0.w3"], (wrong[0].w3(x) > 0).sum(0))


def test_few_values_do_not_settle_which_is_the_gate() -> None:
    wrong, x = Named(F.mish, False, second=True), torch.randn(60, 4)
    with pytest.raises(ValueError, match="sees the other projection"):
        nspec.profile(wrong, {"t": [x[:1], x[:2], x]})


def test_a_norm_may_follow_the_product_but_not_the_gate() -> None:
    x = torch.randn(60, 4)
    model = Named(F.silu, False, second=False)
    model.norm = nn.RMSNorm(40)
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    model.w2.register_forward_pre_hook(lambda _, args: model.norm(args[0]))
    assert torch.equal(nspec.profile(model, {"t": [x]})["t"]["w1"], (model.w1(x) > 0).sum(0))
    with pytest.raises(ValueError, match="does not get the product of an activation function of each number"):
        nspec.profile(Named(lambda gate: F.silu(F.layer_norm(gate, (40,))), False, False), {"t": [x]})


def test_a_fused_projection_of_an_unknown_kind_is_refused() -> None:
    model = Gated(lambda gate: 2 * gate, fused=True)
    with pytest.raises(ValueError, match="which half of it is the gate cannot be told"):
        nspec.profile(model, {"t": [torch.randn(60, 4)]})
    known = Named(lambda gate: 2 * gate, fused=True, second=False)  # also where it is the whole model
    assert nspec.profile(known, {"t": [torch.randn(60, 4)]}).layers == ["w12"]
