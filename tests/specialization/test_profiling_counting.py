"""What is counted is what fc1 really gives, whatever hangs on it; and nothing is counted that proves nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import batch, m2m100
from torch import Tensor, nn

import nspec


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 4))


def fired(model: nn.Sequential, x: Tensor) -> Tensor:
    return (model[0](x) > 0).sum(0)


def test_a_forward_of_its_own_is_called_counted_and_left_there() -> None:
    model, x = mlp(), torch.randn(20, 4)
    plain, calls = model[0].forward, []

    def observed(x: Tensor) -> Tensor:
        calls.append(len(x))
        return plain(x)

    model[0].forward = observed
    counts = nspec.profile(model, {"t": [x]})
    assert calls.count(20) == 1
    assert torch.equal(counts["t"]["0"], (plain(x) > 0).sum(0))
    assert vars(model[0])["forward"] is observed
    with pytest.raises(RuntimeError):
        nspec.profile(model, {"t": [torch.randn(20, 5)]})
    assert vars(model[0])["forward"] is observed


def test_what_cannot_be_specialised_is_not_profiled() -> None:
    model, x = mlp(), torch.randn(20, 4)
    plain = model[0].forward
    model[0].forward = lambda x: -plain(x)
    with pytest.raises(ValueError, match=r"^0: fc1 of this block is a Linear, .*\(off by"):
        nspec.profile(model, {"t": [x]})

    model = mlp()
    model[0] = nspec.MaskedLinear.from_linear(model[0])
    assert torch.equal(nspec.profile(model, {"t": [x]})["t"]["0"], fired(model, x))
    model[0].set_mask(torch.arange(40) < 20)
    with pytest.raises(ValueError, match=r"^0: fc1 of this block is a MaskedLinear, .*\(off by"):
        nspec.profile(model, {"t": [x]})


def test_hooks_that_change_an_output_are_counted_as_they_compute() -> None:
    model, x = mlp(), torch.randn(20, 4)
    model[0].register_forward_hook(lambda module, args, output: -output)
    assert torch.equal(nspec.profile(model, {"t": [x]})["t"]["0"], fired(model, x))


def test_hooks_of_all_modules_that_change_an_output_are_counted_as_they_compute() -> None:
    model, x = mlp(), torch.randn(20, 4)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: -output if module is model[0] else None
    )
    try:
        assert torch.equal(nspec.profile(model, {"t": [x]})["t"]["0"], fired(model, x))
    finally:
        handle.remove()


def test_a_model_that_accelerate_offloads_is_counted_and_works_afterwards() -> None:
    accelerate = pytest.importorskip("accelerate")
    one = batch()
    want = nspec.profile(m2m100(), {"t": [one]})
    model = accelerate.cpu_offload(m2m100(), execution_device="cpu")
    logits = model(**one).logits
    counts = nspec.profile(model, {"t": [one]})
    assert all(torch.equal(counts["t"][layer], want["t"][layer]) for layer in want.layers)
    with pytest.raises(IndexError):
        nspec.profile(model, {"t": [{**one, "input_ids": torch.full((3, 9), 10**6)}]})
    assert torch.equal(model(**one).logits, logits)


class FeedForward(nn.Module):
    def __init__(self, activation: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.between = nn.Linear(4, 40), nn.Linear(40, 4), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.between(self.fc1(x)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("own_forward", [False, True])
@pytest.mark.parametrize("before", [0, 2])
def test_a_value_that_is_not_finite_is_an_error_in_any_batch(value: float, own_forward: bool, before: int) -> None:
    model, bad = mlp(), torch.randn(20, 4)
    bad[3, 2] = value
    if own_forward:
        model[0].forward = model[0].forward
    batches = [torch.randn(20, 4) for _ in range(before)] + [bad]
    with pytest.raises(ValueError, match=rf"^0: activations are not finite in batch {before + 1} of task t: of 800"):
        nspec.profile(model, {"t": batches})


def test_padding_may_be_anything() -> None:
    model, x = mlp(), torch.randn(20, 4)
    real = torch.arange(20) != 3
    want = fired(model, x[real])
    x[3] = float("nan")
    counts = nspec.profile(model, {"t": [x, x, x[real]]}, valid=lambda layer, batch: real if len(batch) == 20 else None)
    assert torch.equal(counts["t"]["0"], 3 * want)


def test_minus_infinity_has_not_fired() -> None:
    model, x = mlp(), torch.randn(20, 4)
    model[0].bias.data[7] = -float("inf")
    assert int(nspec.profile(model, {"t": [x]})["t"]["0"][7]) == 0


@pytest.mark.parametrize("first", [torch.randn(0, 4), torch.zeros(5, 4)], ids=["empty", "nothing fires"])
def test_a_batch_that_shows_nothing_does_not_pass_for_an_activation(first: Tensor) -> None:
    x = torch.randn(20, 4)
    model = FeedForward(nn.LayerNorm(40))
    model.fc1.bias.data.fill_(-0.1)
    for batches in ([first, x], [x]):
        with pytest.raises(ValueError, match="fc1: what fires in this block cannot be counted"):
            nspec.profile(model, {"t": batches})
    relu = FeedForward(torch.relu)
    relu.fc1.bias.data.fill_(-0.1)
    assert torch.equal(nspec.profile(relu, {"t": [first, x]})["t"]["fc1"], (relu.fc1(x) > 0).sum(0))


def test_a_check_that_failed_fails_again() -> None:
    model, x = FeedForward(nn.LayerNorm(40)), torch.randn(20, 4)

    def twice() -> Any:
        with pytest.raises(ValueError, match="cannot be counted"):
            nspec.profile(model, {"inner": [x]})
        yield x

    with pytest.raises(ValueError, match="cannot be counted"):
        nspec.profile(model, {"t": twice()})


class Bypassing(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.relu(self.fc1(x)), self.fc2.weight)


def test_a_layer_whose_fc2_is_not_called_shows_nothing() -> None:
    with pytest.raises(ValueError, match=r"fc1: fc2 did not get the activations of fc1 in task t"):
        nspec.profile(Bypassing(torch.relu), {"t": [torch.randn(20, 4)]})
