"""Where nothing is found, the message shows pairs that may be meant, as patterns; experts in one parameter are named."""

from __future__ import annotations

import pytest
import torch
from test_naming import stack
from torch import nn

import nspec
from nspec.specialization.candidates import what_there_is
from nspec.specialization.layers import find_blocks


def test_candidates_that_repeat_are_one_pattern_that_can_be_given_back() -> None:
    model = stack("a", "b", layers=12)
    with pytest.raises(ValueError, match=r"perhaps \('\*\.mlp\.a', '\*\.mlp\.b'\) \(12 layers\)$"):
        find_blocks(model)
    assert len(find_blocks(model, [("*.mlp.a", "*.mlp.b")])) == 12


class Layer(nn.Module):
    """Attention first, and a feed-forward block in two modules side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("q", "k", "v", "o")})
        self.widen, self.narrow = nn.ModuleDict({"x": nn.Linear(4, 8)}), nn.ModuleDict({"y": nn.Linear(8, 4)})


def test_attention_is_no_candidate() -> None:
    said = what_there_is(nn.ModuleDict({"layers": nn.ModuleList([Layer(), Layer()])}))
    assert said == "Name its blocks with layers=[...], perhaps ('*.widen.x', '*.narrow.y') (2 layers)"
    assert "3: 0, 1, 2) have no two of which the first widens" in what_there_is(nn.Sequential(*_equal(3)))
    assert what_there_is(nn.Identity()) == "It has no linear layers (nn.Linear)"


class Pairs(nn.Module):
    """Pairs of linear layers, in each of two modules, by name."""

    def __init__(self, **pairs: tuple[nn.Linear, nn.Linear]) -> None:
        super().__init__()
        for name, (one, two) in pairs.items():
            self.add_module(name, nn.ModuleDict({"one": one, "two": two}))


def pair(d_in: int = 4, width: int = 8, d_out: int = 4) -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(d_in, width), nn.Linear(width, d_out)


def test_attention_that_widens_is_no_candidate_beside_others() -> None:
    said = what_there_is(Pairs(self_att=pair(), cross_attention=pair(), block=pair()))
    assert said == "Name its blocks with layers=[...], perhaps ('block.one', 'block.two')"
    assert "('att.one', 'att.two')" in what_there_is(Pairs(att=pair()))


def test_a_first_layer_of_a_small_rank_is_no_candidate() -> None:
    assert "have no two of which the first widens" in what_there_is(Pairs(mixer=pair(2, 8, 4)))


def _equal(number: int) -> list[nn.Module]:
    return [nn.Linear(4, 4) for _ in range(number)]


class PackedExperts(nn.Module):
    """All experts of a layer in two parameters, as Transformers keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 16, 4))
        self.down_proj = nn.Parameter(torch.zeros(3, 4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_experts_in_one_parameter_are_named_as_not_taken() -> None:
    model = nn.Sequential(nn.ModuleDict({"experts": PackedExperts()}), nn.ModuleDict({"experts": PackedExperts()}))
    with pytest.raises(ValueError, match=r"The experts of 0.experts and 1 more are not taken: .*\(\[3, 16, 4\]\)"):
        find_blocks(model)
    model.append(Pairs(block=pair()))
    with pytest.raises(ValueError, match=r"The experts of 0.experts .*perhaps \('2.block.one', '2.block.two'\)"):
        find_blocks(model)
    mixed = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), PackedExperts())
    with pytest.warns(UserWarning, match="The experts of 3 are not taken"):
        assert nspec.profile(mixed, {"t": [torch.randn(5, 4)]}).layers == ["0"]
