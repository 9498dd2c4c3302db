"""torch.compile: a bounded number of graphs however many tasks there are, with the values of eager execution."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import nspec

NAMES = tuple(f"t{i}" for i in range(10))
BOTH = pytest.mark.parametrize("mode", ["forward", "update"])


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def specialised(mode: str) -> nn.Sequential:
    """Two blocks; in each, the widths of the tasks grow at other tasks, and the last task has every neuron."""
    torch.manual_seed(0)
    blocks = [(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 6)) for _ in range(2)]
    model = nn.Sequential(*blocks[0], nn.LayerNorm(6), *blocks[1])
    g = torch.Generator().manual_seed(1)
    draw = lambda share: torch.rand(200, generator=g) < share
    masks = {t: {"0": draw(0.1 + 0.1 * i), "4": draw(1.0 - 0.09 * i)} for i, t in enumerate(NAMES)}
    return nspec.specialize(model, nspec.NeuronMasks(masks), mode=mode)


def results(run: Any, model: nn.Module, switch: Any, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with nspec.task(model, switch, batch_dim=0):
        y = run(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def check(mode: str, switches: list[Any], graphs: int) -> None:
    model, counter = specialised(mode), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for number, switch in enumerate(switches):
        x = torch.randn(6 if isinstance(switch, str) else len(switch), 3, 6)
        for a, b in zip(results(compiled, model, switch, x), results(model, model, switch, x), strict=True):
            torch.testing.assert_close(a, b)
        assert counter.frame_count <= graphs, f"a new graph for {switch}, number {number}"


@BOTH
def test_ten_tasks_need_one_graph(mode: str) -> None:
    check(mode, [*NAMES, *NAMES], 1)


@BOTH
def test_ten_mixed_batches_need_three_graphs(mode: str) -> None:
    """Another for other numbers of sentences, and another for batches that are sorted already."""
    mixes = [[NAMES[i], NAMES[(i + 1) % 10], NAMES[i], NAMES[(3 * i) % 10], NAMES[i], NAMES[i]] for i in range(10)]
    mixes = [mix[: 3 + i % 4] for i, mix in enumerate(mixes)]
    check(mode, [*mixes, *(sorted(mix) for mix in mixes)], 3)


@BOTH
def test_single_mixed_and_dense_passes_take_turns(mode: str) -> None:
    turns: list[Any] = ["t1", ["t2", "t3", "t2"], None, ["t4"] * 6]
    model, counter = specialised(mode), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for number in range(20):
        switch = turns[number % 4]
        x = torch.randn(6, 3, 6)
        for a, b in zip(results(compiled, model, switch, x), results(model, model, switch, x), strict=True):
            torch.testing.assert_close(a, b)
        if number == 7:
            seen = counter.frame_count
    assert counter.frame_count == seen


@BOTH
@pytest.mark.parametrize("switch", ["t1", ["t2", "t1", "t2"]])
def test_without_gradients_the_compiled_model_gives_the_same(mode: str, switch: Any) -> None:
    model = specialised(mode).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, 6)
    with torch.no_grad(), nspec.task(model, switch):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), model(x))
            model[2].weight.mul_(1.5)


@BOTH
@pytest.mark.parametrize("switch", ["t1", ["t2", "t1", "t2"]])
def test_checkpoints_inside_a_compiled_model(mode: str, switch: Any) -> None:
    model = specialised(mode)

    def run(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, 6)
    for a, b in zip(results(compiled, model, switch, x), results(model, model, switch, x), strict=True):
        torch.testing.assert_close(a, b)


@BOTH
def test_compiled_layers_inside_a_checkpoint_find_their_task_with_the_contexts(mode: str) -> None:
    model = specialised(mode)
    compiled = torch.compile(model, backend="aot_eager")
    contexts = nspec.checkpoint_contexts(model)
    x = torch.randn(3, 4, 6)
    with nspec.task(model, "t2"):
        y = torch.utils.checkpoint.checkpoint(compiled, x, use_reentrant=False, context_fn=contexts)
    nspec.set_task(model, "t5")
    ours = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    for a, b in zip(ours, results(model, model, "t2", x)[2:], strict=True):
        torch.testing.assert_close(a, b)
