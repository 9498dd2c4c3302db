"""Activation checkpointing: what is computed again in the backward pass uses the neurons of its forward pass."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import batch, m2m100, masks_for
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nspec

BOTH = pytest.mark.parametrize("mode", ["forward", "update"])
EITHER = pytest.mark.parametrize("reentrant", [False, True])
TASKS: list[Any] = ["a", "b", None, ["b", "a", "b", "c"]]


class Block(nn.Module):
    """A residual feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 96), nn.Linear(96, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


class Blocks(nn.Module):
    """Two of them, each under ``run``, which may be a checkpoint."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.run = Block(), Block(), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.second, self.run(self.first, x))


def plainly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def specialised(mode: str, run: Callable[..., Tensor] = plainly) -> Blocks:
    torch.manual_seed(0)
    model = Blocks(run).double()
    g = torch.Generator().manual_seed(1)
    draw = lambda: {layer: torch.rand(96, generator=g) < 0.4 for layer in ("first.fc1", "second.fc1")}
    nspec.specialize(model, nspec.NeuronMasks({task: draw() for task in "abc"}), mode=mode)
    return model


def checkpointed(mode: str, reentrant: bool) -> Blocks:
    return specialised(mode, partial(checkpoint, use_reentrant=reentrant))


def x_of(seed: int) -> Tensor:
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def loss_of(model: nn.Module, task: Any, seed: int = 0) -> Tensor:
    with nspec.task(model, task):
        return model(x_of(seed)).square().sum()


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def wanted(mode: str, *tasks: Any) -> list[Tensor]:
    """The gradients without checkpoints, summed over the tasks; task i has the input of seed i."""
    model = specialised(mode)
    for seed, task in enumerate(tasks):
        loss_of(model, task, seed).backward()
    return gradients(model)


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@BOTH
@EITHER
@pytest.mark.parametrize("task", TASKS)
def test_the_backward_pass_may_run_after_the_block_and_under_another_task(
    mode: str, reentrant: bool, task: Any
) -> None:
    model = checkpointed(mode, reentrant)
    loss = loss_of(model, task)
    nspec.set_task(model, "c")
    loss.backward()
    assert model.first.fc1.task == "c"
    assert_equal(gradients(model), wanted(mode, task))


@BOTH
@EITHER
def test_tasks_follow_one_another_in_training(mode: str, reentrant: bool) -> None:
    model = checkpointed(mode, reentrant)
    for task in (*TASKS, "a"):
        loss = loss_of(model, task)
        loss.backward()  # the loss before is alive until the next one takes its name
        assert_equal(gradients(model), wanted(mode, task))


@BOTH
@EITHER
def test_forward_passes_may_run_ahead_of_backward_passes(mode: str, reentrant: bool) -> None:
    """As in a pipeline: each backward pass finds its own forward pass among those that are open."""
    model = checkpointed(mode, reentrant)
    first, again = loss_of(model, "a", 0), loss_of(model, "a", 1)
    first.backward()
    other = loss_of(model, "b", 2)
    again.backward()
    other.backward()
    assert_equal(gradients(model), wanted(mode, "a", "a", "b"))


@BOTH
@EITHER
def test_passes_that_are_never_followed_by_a_backward_pass_do_no_harm(mode: str, reentrant: bool) -> None:
    model = checkpointed(mode, reentrant)
    loss_of(model, "b")
    kept = loss_of(model, "c")
    with torch.no_grad():
        loss_of(model, "c")
    loss_of(model, "a").backward()
    assert_equal(gradients(model), wanted(mode, "a"))
    assert kept.requires_grad


@BOTH
@EITHER
def test_a_graph_that_is_kept_is_computed_again_alike(mode: str, reentrant: bool) -> None:
    model = checkpointed(mode, reentrant)
    loss = loss_of(model, "a")
    loss.backward(retain_graph=True)
    gradients(model)
    other = loss_of(model, "b")
    loss.backward()
    assert_equal(gradients(model), wanted(mode, "a"))
    other.backward()


@BOTH
def test_one_backward_pass_of_several_tasks_is_an_error_without_the_contexts(mode: str) -> None:
    model = checkpointed(mode, reentrant=False)
    with pytest.raises(
        RuntimeError, match="fc1 is computed again .* several tasks: .* context_fn=nspec.checkpoint_contexts"
    ):
        (loss_of(model, "a", 0) + loss_of(model, "b", 1)).backward()
    model.zero_grad()
    (loss_of(model, "a", 0) + loss_of(model, "a", 1)).backward()
    assert_equal(gradients(model), wanted(mode, "a", "a"))


@BOTH
def test_the_contexts_keep_several_tasks_in_one_backward_pass_apart(mode: str) -> None:
    model = specialised(mode)
    contexts = nspec.checkpoint_contexts(model)
    model.run = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    sum(loss_of(model, task, seed) for seed, task in enumerate(TASKS)).backward()
    assert model.first.fc1.task is None
    assert_equal(gradients(model), wanted(mode, *TASKS))


@BOTH
def test_reentrant_checkpoints_keep_several_tasks_in_one_backward_pass_apart(mode: str) -> None:
    model = checkpointed(mode, reentrant=True)
    sum(loss_of(model, task, seed) for seed, task in enumerate(TASKS)).backward()
    assert_equal(gradients(model), wanted(mode, *TASKS))


@BOTH
@EITHER
def test_a_task_that_is_set_inside_the_checkpointed_function_is_its_own(mode: str, reentrant: bool) -> None:
    model = specialised(mode)

    def run(x: Tensor) -> Tensor:
        with nspec.task(model, "b"):
            return model(x)

    with nspec.task(model, "a"):
        loss = checkpoint(run, x_of(0), use_reentrant=reentrant).square().sum()
    loss.backward()
    assert_equal(gradients(model), wanted(mode, "b"))


@BOTH
@pytest.mark.parametrize(("outer", "inner"), [(False, False), (True, False), (True, True)])
def test_checkpoints_inside_checkpoints(mode: str, outer: bool, inner: bool) -> None:
    model = checkpointed(mode, reentrant=inner)
    for task in ("a", ["b", "a", "b", "c"]):
        with nspec.task(model, task):
            loss = checkpoint(model, x_of(0), use_reentrant=outer).square().sum()
        loss.backward()
        assert_equal(gradients(model), wanted(mode, task))


@BOTH
@EITHER
def test_only_the_rows_of_the_forward_pass_are_stepped(mode: str, reentrant: bool) -> None:
    model = checkpointed(mode, reentrant)
    optimizer = nspec.RowSparseAdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    before = model.first.fc1.weight.detach().clone()
    active = model.first.fc1._nspec.sets["a"].active
    loss = loss_of(model, "a")
    nspec.set_task(model, "c")
    loss.backward()
    optimizer.step()
    assert torch.equal((model.first.fc1.weight != before).any(1), active)


@BOTH
def test_a_gradient_of_later_parameters_alone_finds_the_forward_pass(mode: str) -> None:
    """The engine then leaves out the nodes of fc1, although it is computed again."""
    model, plain = specialised(mode), specialised(mode)
    for m, run in ((model, partial(checkpoint, use_reentrant=False)), (plain, plainly)):
        with nspec.task(m, "a"):
            y = run(lambda x, m=m: m.second(m.first(x)), x_of(0).detach())
        (m.found,) = torch.autograd.grad(y.square().sum(), [m.second.fc2.weight])
    torch.testing.assert_close(model.found, plain.found, rtol=0, atol=1e-12)


def test_a_layer_in_a_backward_pass_that_is_no_recomputation_is_an_error() -> None:
    model = specialised("update")

    class Calls(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return model(dy)

    with pytest.raises(RuntimeError, match="fc1 runs inside a backward pass, and which of its forward passes"):
        Calls.apply(x_of(0)).sum().backward()


@EITHER
def test_layers_with_open_passes_can_be_copied_and_pickled_and_keep_nothing_alive(reentrant: bool) -> None:
    model = checkpointed("forward", reentrant)
    loss = loss_of(model, "a")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss_of(other, "b").backward()
        assert_equal(gradients(other), wanted("forward", "b"))
    del loss, other
    gc.collect()
    passes = model.first.fc1._nspec.passes
    assert not list(passes._reentrant)
    assert not [node for node, _ in passes._marked if node() is not None]


@BOTH
@EITHER
@pytest.mark.parametrize("enable", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
def test_hugging_face_checkpointing_after_the_block(mode: str, reentrant: bool, enable: str) -> None:
    plain, model = m2m100().train(), m2m100().train()
    if not hasattr(model, enable):
        pytest.skip(f"this version of transformers has no {enable}")
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # one of them is the older name
        getattr(model, enable)({"use_reentrant": reentrant})
    tasks = ["de-en", "en-de", "de-en"]
    for m in (plain, model):
        nspec.specialize(m, masks_for(m), mode=mode)
        for switch in ("en-de", tasks):
            with nspec.task(m, switch):
                loss = m(**batch()).loss
            loss.backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)
