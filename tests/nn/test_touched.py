"""The rows of a step are those of the gradient that is stepped, whatever happened to other gradients before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nspec
from nspec import NeuronMasks, RowSparseAdamW

A, B = torch.arange(16) < 8, torch.arange(16) >= 8
OPTIONS = {"lr": 0.01, "weight_decay": 0.1}
MODES = ["forward", "update"]
X = torch.ones(3, 8)


class Training:
    """A specialised model of two tasks with disjoint neurons, both of which have momentum already."""

    def __init__(self, mode: str = "forward", compiled: bool = False, zero: str = "optimizer") -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        nspec.specialize(self.model, NeuronMasks({"a": {"0": A}, "b": {"0": B}}), mode=mode)
        torch._dynamo.reset()
        self.call: Callable[[Tensor], Tensor] = (
            torch.compile(self.model, backend="aot_eager") if compiled else self.model
        )
        self.optimizer = RowSparseAdamW(self.model.parameters(), **OPTIONS)
        self.zero = {
            "optimizer": self.optimizer.zero_grad,
            "optimizer, to zeros": lambda: self.optimizer.zero_grad(set_to_none=False),
            "model": self.model.zero_grad,
        }[zero]
        assert torch.equal(self.step("a", "b"), A | B)

    def loss(self, task: str) -> Tensor:
        with nspec.task(self.model, task):
            return self.call(X).square().sum()

    def backward(self, *tasks: str) -> None:
        for task in tasks:
            self.loss(task).backward()

    def stepped(self) -> Tensor:
        """Takes a step; the rows that changed."""
        before = self.model[0].weight.detach().clone()
        self.optimizer.step()
        return (self.model[0].weight.detach() != before).any(1)

    def step(self, *tasks: str) -> Tensor:
        self.backward(*tasks)
        changed = self.stepped()
        self.zero()
        return changed


ZEROS = ["optimizer", "optimizer, to zeros", "model"]
every = pytest.mark.parametrize(  # every two of the three together
    ("mode", "compiled", "zero"),
    [(mode, (place + number) % 2 > 0, zero) for place, mode in enumerate(MODES) for number, zero in enumerate(ZEROS)],
)


@every
def test_a_step_that_was_skipped_leaves_nothing_behind(mode: str, compiled: bool, zero: str) -> None:
    training = Training(mode, compiled, zero)
    for _ in range(2):
        training.backward("a")
        training.zero()
        assert torch.equal(training.step("b"), B)
    training.backward("a")
    training.zero()
    assert torch.equal(training.step("a", "b"), A | B)


@every
def test_gradients_may_be_zeroed_between_a_forward_pass_and_its_backward_pass(
    mode: str, compiled: bool, zero: str
) -> None:
    training = Training(mode, compiled, zero)
    for task, rows in (("a", A), ("b", B), ("a", A)):
        loss = training.loss(task)
        training.zero()
        loss.backward()
        assert torch.equal(training.stepped(), rows)
    training.backward("a")
    loss = training.loss("b")
    training.zero()
    loss.backward()
    assert torch.equal(training.stepped(), B)


@every
def test_losses_may_be_summed_or_accumulated_and_passes_without_a_backward_pass_do_not_count(
    mode: str, compiled: bool, zero: str
) -> None:
    training = Training(mode, compiled, zero)
    (training.loss("a") + training.loss("b")).backward()
    assert torch.equal(training.stepped(), A | B)
    training.zero()
    training.loss("a")  # an evaluation that forgot no_grad
    assert torch.equal(training.step("b"), B)
    thrown_away = training.loss("a")
    assert torch.equal(training.step("b", "b"), B)
    del thrown_away
    if not compiled:  # a compiled graph computes all gradients, whichever is asked for
        torch.autograd.grad(training.loss("a"), training.model[2].weight)  # no gradient of fc1.weight
        assert torch.equal(training.step("b"), B)


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale: bool, zero: str) -> None:
    """The losses are right, then infinite, then right; what is stepped is what a run without the infinite one steps."""
    training, other = Training(zero=zero), Training(zero=zero)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    scales = []

    def update(task: str, factor: float = 1.0) -> Tensor:
        scaler.scale(training.loss(task) * factor).backward()
        if unscale:
            scaler.unscale_(training.optimizer)
            nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
        before = training.model[0].weight.detach().clone()
        scaler.step(training.optimizer)
        scaler.update()
        training.zero()
        scales.append(scaler.get_scale())
        return (training.model[0].weight.detach() != before).any(1)

    assert torch.equal(update("a"), A)
    assert not update("a", float("inf")).any()
    assert torch.equal(update("b"), B)
    assert not update("b", float("nan")).any()
    assert torch.equal(update("b"), B)
    assert scales[1] < scales[0]
    for task in ("a", "b", "b"):
        other.backward(task)
        if unscale:
            nn.utils.clip_grad_norm_(other.model.parameters(), 1.0)
        other.optimizer.step()
        other.zero()
    for one, two in zip(training.model.parameters(), other.model.parameters()):
        assert torch.equal(one, two), "scales are powers of two"


@pytest.mark.parametrize("zero", ZEROS)
def test_gradients_that_were_kept_and_put_back_are_stepped(zero: str) -> None:
    """As gradient surgery does: a backward pass for each task, each from zero, and one step."""
    training = Training("update", zero=zero)
    parameters = list(training.model.parameters())
    kept = []
    for task in ("a", "b"):
        training.zero()
        training.backward(task)
        kept.append([p.grad.clone() for p in parameters])
    training.zero()
    for p, *gradients in zip(parameters, *kept):
        p.grad = sum(gradients)
    changed, alive = training.stepped(), (parameters[0].grad != 0).any(1)
    assert (changed | ~alive).all()
    assert (alive & A).any()
    training.zero()
    assert torch.equal(training.step("b"), B)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    training = Training()
    x = X.clone().requires_grad_()

    def backward(task: str) -> None:
        with nspec.task(training.model, task):
            checkpoint(training.model, x, use_reentrant=reentrant).square().sum().backward()

    backward("a")
    training.zero()
    backward("b")
    assert torch.equal(training.stepped(), B)


def test_noting_copies_no_gradient() -> None:
    """The gradient that the operator made is the one that the parameter gets."""
    training, seen = Training(), []
    training.model[0].weight.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    training.backward("a")
    assert training.model[0].weight.grad.data_ptr() == seen[0]


def test_two_optimisers_of_one_model_and_parameters_that_thaw() -> None:
    training = Training()
    second = RowSparseAdamW(training.model.parameters(), **OPTIONS)
    training.backward("a")
    training.zero()
    training.backward("b")
    before = training.model[0].weight.detach().clone()
    second.step()
    second.zero_grad()
    assert torch.equal((training.model[0].weight != before).any(1), B)
    weight = training.model[0].weight.requires_grad_(False)
    frozen = RowSparseAdamW(training.model.parameters(), **OPTIONS)
    training.backward("a")
    weight.requires_grad_(True)
    before = weight.detach().clone()
    training.backward("b")
    frozen.step()
    assert torch.equal((weight != before).any(1), B)
