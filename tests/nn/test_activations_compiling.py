"""Activations of any block in compiled code: one graph for all tasks, under checkpoints and without gradients too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import nspec

TASKS = ("a", "b", "c")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def composed(x: Any) -> Any:
    """GELU as many models write it."""
    return 0.5 * x * (1.0 + torch.tanh(0.79788456 * (x + 0.044715 * torch.pow(x, 3.0))))


class Block(nn.Module):
    """A feed-forward block of one of three kinds, by the names of its layers."""

    def __init__(self, kind: str, act: Any, bias: bool) -> None:
        super().__init__()
        self.kind, self.activation = kind, act
        if kind == "plain":
            self.fc1, self.fc2 = nn.Linear(6, 200, bias), nn.Linear(200, 6)
        elif kind == "gated":
            self.gate_proj, self.up_proj = nn.Linear(6, 200, bias), nn.Linear(6, 200, bias)
            self.down_proj = nn.Linear(200, 6)
        else:
            self.gate_up_proj, self.down_proj = nn.Linear(6, 400, bias), nn.Linear(200, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "plain":
            return x + self.fc2(self.activation(self.fc1(x)))
        if self.kind == "gated":
            return x + self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return x + self.down_proj(up * self.activation(gate))


KINDS = [("plain", composed, True), ("plain", torch.sigmoid, False), ("gated", F.silu, False), ("fused", F.gelu, True)]


def specialised(kind: str, act: Any, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(kind, act, bias), Block(kind, act, bias))
    first = {"plain": "fc1", "gated": "gate_proj", "fused": "gate_up_proj"}[kind]
    g = torch.Generator().manual_seed(1)
    draw = lambda share: torch.rand(200, generator=g) < share
    masks = {t: {f"0.{first}": draw(0.2 + 0.2 * i), f"1.{first}": draw(0.8 - 0.2 * i)} for i, t in enumerate(TASKS)}
    return nspec.specialize(model, nspec.NeuronMasks(masks))


def results(run: Any, model: nn.Module, switch: Any) -> list[Tensor]:
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with nspec.task(model, switch):
        y = run(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize(("kind", "act", "bias"), KINDS)
def test_one_graph_for_all_tasks_and_one_for_mixed_batches(kind: str, act: Any, bias: bool) -> None:
    model, counter = specialised(kind, act, bias), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for graphs, switches in ((1, TASKS), (2, [["a", "b", "a", "c"], ["b", "c", "b", "a"]])):
        for switch in switches:
            for a, b in zip(results(compiled, model, switch), results(model, model, switch), strict=True):
                torch.testing.assert_close(a, b)
            assert counter.frame_count <= graphs, f"a new graph for {switch}"
    with torch.no_grad(), nspec.task(model, "a"):
        x = torch.randn(2, 6)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(("kind", "act", "bias"), KINDS[:1] + KINDS[2:])
def test_checkpoints_inside_compiled_code(kind: str, act: Any, bias: bool) -> None:
    model = specialised(kind, act, bias)

    def run(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for a, b in zip(results(compiled, model, "b"), results(model, model, "b"), strict=True):
        torch.testing.assert_close(a, b)
    nspec.set_task(model, "b")
    plain = [p.grad for p in model.parameters()]
    assert plain == [None] * len(plain)
    for a, b in zip(results(run, model, "b"), results(model, model, "b"), strict=True):  # not compiled
        torch.testing.assert_close(a, b)
