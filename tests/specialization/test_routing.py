"""Experts are counted over the tokens that they get; padding among them is known by its values, or refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import nspec
from nspec.specialization.layers import find_blocks, is_routed
from nspec.specialization.routing import _real_rows


class Experts(nn.Module):
    """Sends each token to the expert of its largest score, of three; the last one never gets any."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(6, 3)
        self.router.bias.data[2] = -1e9
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 6)) for _ in range(3))
        self._scale = scale

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen, out = self.router(flat).argmax(-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            if (at := chosen == number).any():
                out[at] = expert(flat[at] * self._scale)
        return out.view(hidden.shape)


class Model(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        return self.mlp(x)


LENGTHS = torch.tensor([8, 5, 7, 3])
PADDING = torch.arange(8) >= LENGTHS[:, None]


def test_padding_is_followed_to_the_experts() -> None:
    model, x = Model(Experts()), torch.randn(4, 8, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = nspec.profile(model, {"t": [{"x": x, "src_key_padding_mask": PADDING}]})
        chosen = nspec.profile(model, {"t": [x]}, valid=lambda layer, batch: ~PADDING)
    flat = x[~PADDING]
    sent = model.mlp.router(flat).argmax(-1)
    for number, expert in enumerate(model.mlp.experts):
        want = (expert[0](flat[sent == number]) > 0).sum(0)
        assert torch.equal(counts["t"][f"mlp.experts.{number}.0"], want)
        assert torch.equal(chosen["t"][f"mlp.experts.{number}.0"], want)
    assert counts.tokens["t"] == {f"mlp.experts.{n}.0": int((sent == n).sum()) for n in range(3)}
    assert 0 == counts.tokens["t"]["mlp.experts.2.0"] < counts.tokens["t"]["mlp.experts.0.0"]


def test_tokens_that_cannot_be_found_again_are_refused_unless_nothing_is_padded() -> None:
    model, x = Model(Experts(scale=0.5)), torch.randn(4, 8, 6)
    with pytest.raises(ValueError, match=r"^mlp.experts.0.0: which of the tokens .* give batches of one sentence"):
        nspec.profile(model, {"t": [{"x": x, "src_key_padding_mask": PADDING}]})
    apart = [{"x": x[i : i + 1, :n], "src_key_padding_mask": PADDING[i : i + 1, :n]} for i, n in enumerate(LENGTHS)]
    counts = nspec.profile(model, {"t": apart})
    assert sum(counts.tokens["t"].values()) == int(LENGTHS.sum())


class WithShared(nn.Module):
    """Experts, and one beside them that every token passes."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = Experts()
        self.shared_experts = nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 6))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.shared_experts(hidden)


def test_a_shared_expert_is_not_routed_and_takes_a_list_of_tasks() -> None:
    model, x = WithShared(), torch.randn(2, 8, 6)
    assert is_routed(model, "moe.experts.0.0")
    assert not is_routed(model, "shared_experts.0")
    one = {block.name: torch.arange(40) < 20 for block in find_blocks(model)}
    masks = nspec.NeuronMasks({"a": one, "b": {name: ~mask for name, mask in one.items()}})
    nspec.specialize(model, masks)
    wanted = []
    for number, task in enumerate("ab"):
        with nspec.task(model, task):
            wanted.append(model(x[number : number + 1]))
    with nspec.task(model, ["a", "b"]):
        torch.testing.assert_close(model(x), torch.cat(wanted))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_told_apart_by_their_values(dtype: torch.dtype) -> None:
    rows = torch.randn(50, 16).to(dtype)
    real = torch.arange(50) % 3 > 0
    order = torch.randperm(50)[:30]
    assert torch.equal(_real_rows(rows[order], rows, real), real[order])
    assert torch.equal(_real_rows(rows[order].repeat(2, 1), rows, real), real[order].repeat(2))
    assert len(_real_rows(rows[:0], rows, real)) == 0
    assert _real_rows(torch.randn(3, 16).to(dtype), rows, real) is None


def test_padding_with_the_values_of_a_real_token_counts_only_where_all_of_it_came() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [1.0, 2.0]])
    real = torch.tensor([True, True, False, True])
    assert _real_rows(rows[[0, 2, 1, 3]], rows, real).sum() == 3
    assert _real_rows(rows[[0, 2, 3, 0, 2, 3]], rows, real).sum() == 4
    assert _real_rows(rows[[0, 1]], rows, real) is None
    assert torch.equal(_real_rows(rows[[1]], rows, real), torch.tensor([True]))
