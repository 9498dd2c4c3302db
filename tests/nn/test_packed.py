"""Passes without gradients keep packed weights: those of blocks of every kind follow their weights and tasks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nspec

D_FF = 200


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, D_FF), nn.Linear(D_FF, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Transposed(Plain):
    """Its fc2 is a product, as some models write it."""

    def forward(self, x: Tensor) -> Tensor:
        h: Any = torch.sigmoid(self.fc1(x))
        return h @ self.fc2.weight.T + self.fc2.bias


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, D_FF, bias=False), nn.Linear(6, D_FF, bias=False)
        self.down_proj = nn.Linear(D_FF, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(6, 2 * D_FF), nn.Linear(D_FF, 6)

    def forward(self, x: Tensor) -> Tensor:
        h: Any = self.gate_up_proj(x)
        return self.down_proj(F.gelu(h[..., :D_FF]) * h[..., D_FF:])


def specialised(kind: type[nn.Module]) -> nn.Module:
    from nspec.specialization.layers import find_blocks

    torch.manual_seed(0)
    model = kind().double()
    (block,) = find_blocks(model)
    masks = {"a": torch.rand(D_FF) < 0.4, "b": torch.rand(D_FF) < 0.2, "none": torch.zeros(D_FF, dtype=torch.bool)}
    masks["nearly all"] = torch.arange(D_FF) > 0
    return nspec.specialize(model, nspec.NeuronMasks({task: {block.name: mask} for task, mask in masks.items()}))


@pytest.mark.parametrize("kind", [Plain, Transposed, Gated, Fused])
def test_they_follow_weights_and_tasks(kind: type[nn.Module]) -> None:
    model = specialised(kind)
    x = torch.randn(4, 3, 6).double()
    for switch in ("a", ["a", "b", "none", "a"], "none", "nearly all", ["b", "nearly all", "b", "b"], "b"):
        with nspec.task(model, switch):
            for change in (None, "in place", ".data", "a step"):
                if change == "a step":
                    model.zero_grad()
                    model(x).sum().backward()
                    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
                for parameter in model.parameters() if change else ():
                    with torch.no_grad():
                        if change == "in place":
                            parameter.mul_(0.9)
                        elif change == ".data":
                            parameter.data = parameter.data * 0.9
                want = model(x).detach()
                with torch.no_grad():
                    for _ in range(2):
                        torch.testing.assert_close(model(x), want)
                with torch.inference_mode():
                    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("kind", [Plain, Transposed, Gated, Fused])
def test_they_are_packed_once_for_many_passes(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    from nspec.nn import ffn

    model, packed, x = specialised(kind), [], torch.randn(2, 6).double()
    first, second = ffn.pack_first, ffn.pack_second
    monkeypatch.setattr(ffn, "pack_first", lambda *args: (packed.append(1), first(*args))[1])
    monkeypatch.setattr(ffn, "pack_second", lambda *args: (packed.append(1), second(*args))[1])
    with nspec.task(model, "a"), torch.no_grad():
        model(x)
        once = len(packed)
        for _ in range(3):
            model(x)
    assert len(packed) == once > 1
