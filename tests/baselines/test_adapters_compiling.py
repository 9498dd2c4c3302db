"""torch.compile of a model with adapters: as many graphs for ten groups as for one, with the values of eager execution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import nspec
from nspec.baselines.adapters import adapter_parameters, add_adapters

TASKS = [f"en-{letter}" for letter in "abcdefghij"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x).relu())


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = add_adapters(nn.Sequential(Block(), Block()), {task: task for task in TASKS}, 4, layers=["0", "1"])
    for parameter in adapter_parameters(model):
        nn.init.normal_(parameter)
    return model


def results(run: Any, model: nn.Module, task: Any, x: Tensor) -> list[Tensor | None]:
    model.zero_grad(set_to_none=True)
    with nspec.task(model, task):
        y = run(x)
    y.square().sum().backward()
    return [y.detach(), *(None if p.grad is None else p.grad.clone() for p in model.parameters())]


def test_ten_groups_need_the_graphs_of_one() -> None:
    model, counter = adapted(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))
    after = []
    for switch in [*TASKS, None, TASKS[:4]]:
        for ours, eager in zip(results(compiled, model, switch, x), results(model, model, switch, x), strict=True):
            assert (ours is None) == (eager is None)  # no gradient for the groups that are not in the batch
            if ours is not None:
                torch.testing.assert_close(ours, eager)
        after.append(counter.frame_count)
    assert after[0] > 0
    assert after[-1] == after[0]
