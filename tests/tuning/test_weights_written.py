"""What others write to the weights that neurons lie in: averages, broadcasts, copies, training of the base itself."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

import nspec


def make() -> Any:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6), nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 6)]
    return nn.Sequential(*layers).double()


def tuned(**options: Any) -> tuple[Any, Any]:
    base = make()
    masks = {
        "a": {"0": torch.arange(16) < 4, "3": torch.arange(16) > 11},
        "b": {"0": torch.arange(16) > 13, "3": torch.arange(16) < 3},
    }
    return base, nspec.finetune(copy.deepcopy(base), nspec.NeuronMasks(masks), quiet=True, **options)


def train(model: Any, task: str | None = "a", steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        with nspec.task(model, task):
            optimizer.zero_grad()
            model(inputs()).square().sum().backward()
            optimizer.step()


def inputs() -> Tensor:
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def output(model: Any, task: str | None = None) -> Tensor:
    with torch.no_grad(), nspec.task(model, task):
        return model(inputs())  # type: ignore[no-any-return]


def plain(model: Any) -> Tensor:
    with torch.no_grad():
        return model(inputs())  # type: ignore[no-any-return]


def test_an_average_of_models_has_the_base_and_every_task_s_own_neurons() -> None:
    base, model = tuned()
    average: Any = AveragedModel(model)
    for _ in range(3):
        train(model, steps=1)
        with nspec.task(model, "a"):
            plain(model)  # the weights hold rows of a, which the average takes along
            average.update_parameters(model)
    assert torch.equal(output(average.module), plain(base))
    assert torch.equal(output(average.module, "b"), plain(base))  # not trained
    assert not torch.allclose(output(average.module, "a"), plain(base))
    assert torch.equal(plain(nspec.merge(average.module, "b")), plain(base))
    undone = nspec.despecialize(average.module)
    assert all(torch.equal(p, q) for p, q in zip(undone.parameters(), base.parameters()))


def test_copies_of_all_parameters_that_are_put_back_bring_no_rows_of_a_task() -> None:
    base, model = tuned()
    train(model)
    with nspec.task(model, "a"):
        wanted = plain(model)
        kept, vector = [p.detach().clone() for p in model.parameters()], parameters_to_vector(model.parameters())
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept):
            parameter.copy_(value)
    assert torch.equal(output(model), plain(base))
    assert torch.equal(output(model, "a"), wanted)
    vector_to_parameters(vector.detach(), model.parameters())
    assert torch.equal(output(model), plain(base))
    assert torch.equal(output(model, "a"), wanted)


def test_a_model_is_undone_and_merged_bit_for_bit_after_writes_through_data() -> None:
    base, model = tuned()
    train(model)
    twin = copy.deepcopy(model)
    with nspec.task(model, "a"):
        plain(model)
        for mine, other in zip(twin.parameters(), model.parameters()):
            mine.data.copy_(other.data)
    assert torch.equal(plain(nspec.merge(twin, "b")), plain(base))
    undone = nspec.despecialize(twin)
    assert all(torch.equal(p, q) for p, q in zip(undone.parameters(), base.parameters()))


def test_a_base_that_was_trained_too_stays_what_it_became_when_it_is_frozen(tmp_path: Path) -> None:
    _, model = tuned(also=["0", "2"])
    train(model, None)  # the base alone
    train(model)
    wanted = {task: output(model, task) for task in (None, "a", "b")}
    with pytest.warns(UserWarning, match="numbers of other modules are trained too"):
        nspec.save_neurons(model, tmp_path)
    model.requires_grad_(False)
    for task in (None, "a", None, "b", "a"):
        torch.testing.assert_close(output(model, task), wanted[task], rtol=1e-12, atol=1e-12)
    assert torch.equal(plain(nspec.despecialize(model)), wanted[None])


def test_averages_of_a_base_that_is_trained_too_follow_it_frozen_or_not() -> None:
    _, model = tuned(also=["0", "2"])
    copied, average = copy.deepcopy(model).requires_grad_(False), AveragedModel(model)
    for _ in range(3):
        train(model, None, 1)
        with torch.no_grad():
            for mine, other in zip(copied.parameters(), model.parameters()):
                mine.copy_(other)
        for task in (None, "a"):
            torch.testing.assert_close(output(copied, task), output(model, task), rtol=1e-12, atol=1e-12)
    average.update_parameters(model)
    wanted = output(model)
    for number in (0, 2):
        model[number].weight.requires_grad_(False)
        model[number].bias.requires_grad_(False)
    train(model, "a", 2)
    average.update_parameters(model)
    torch.testing.assert_close(output(average.module), wanted, rtol=1e-12, atol=1e-12)


def test_rows_of_a_task_that_are_copied_in_before_the_base_is_unfrozen_are_taken_out() -> None:
    base, model = tuned()
    train(model)
    with nspec.task(model, "a"):
        plain(model)
        kept = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept):
            parameter.copy_(value)
    model[0].weight.requires_grad_(True)
    assert torch.equal(output(model), plain(base))


def test_a_weight_that_was_parametrised_afterwards_is_refused() -> None:
    _, model = tuned()
    parametrize.register_parametrization(model[0], "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="0: its weight was parametrised"):
        model(inputs())


def test_a_weight_written_to_between_forward_and_backward_pass_is_an_error_as_in_pytorch() -> None:
    _, model = tuned()
    with nspec.task(model, "a"):
        loss = model(inputs().requires_grad_()).sum()
    model.load_state_dict(make().state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
        loss.backward()


def test_functional_call_leaves_the_caller_s_tensors_alone_and_takes_them_for_the_base() -> None:
    base, model = tuned()
    train(model)
    given = {name: p.detach() * 2 for name, p in base.named_parameters()}
    before = {name: value.clone() for name, value in given.items()}
    with nspec.task(model, "a"), torch.no_grad():
        plain(model)
        found = functional_call(model, given, inputs())
    assert all(torch.equal(given[name], before[name]) for name in given)
    changed = copy.deepcopy(model)
    changed = nspec.despecialize(changed)
    changed.load_state_dict(given)
    rows = {
        name: p.detach() for name, p in model.named_parameters() if ".neurons.a" in name or ".neuron_biases.a" in name
    }
    with torch.no_grad():
        for first, last, chosen in (("0", "2", torch.arange(4)), ("3", "5", torch.arange(12, 16))):
            changed.get_submodule(first).weight[chosen] = rows[f"{first}.neurons.a"]
            changed.get_submodule(first).bias[chosen] = rows[f"{first}.neuron_biases.a"]
            changed.get_submodule(last).weight[:, chosen] = rows[f"{last}.neurons.a"].t()
    torch.testing.assert_close(found, plain(changed), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6)])
def test_a_batch_without_a_token_has_a_backward_pass(shape: tuple[int, ...]) -> None:
    _, model = tuned()
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    with nspec.task(model, "a"):
        model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    grads = [p.grad for name, p in model.named_parameters() if ".a" in name]
    assert all(grad is not None and not grad.any() for grad in grads)
    assert len(grads) == 6


class Clamped(nn.Module):
    """A gated block that differs from others far from 0 alone, as those with a limit do."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(6, 16, bias=False), nn.Linear(6, 16, bias=False)
        self.down_proj = nn.Linear(16, 6, bias=False)
        self.act_fn = nn.SiLU()
        self.limit = limit
        self.config = SimpleNamespace(scale=1.0)

    def forward(self, x: Tensor) -> Tensor:
        g, u = self.gate_proj(x), self.up_proj(x)
        if self.limit:
            g, u = g.clamp(max=self.limit), u.clamp(-self.limit, self.limit)
        if self.config.scale != 1:
            u = u * self.config.scale
        return self.down_proj(self.act_fn(g) * u)  # type: ignore[no-any-return]


def of_clamped(limit: float) -> tuple[Any, Any]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 6), Clamped(limit)).double()
    masks = nspec.NeuronMasks({"a": {"1.gate_proj": torch.arange(16) < 4}})
    return base, nspec.finetune(copy.deepcopy(base), masks, quiet=True)


def test_a_block_that_clamps_what_is_far_from_0_runs_its_own_code() -> None:
    base, model = of_clamped(10.0)
    x = inputs() * 1e3
    assert torch.equal(model(x), base(x))


def test_a_block_whose_attributes_or_class_are_changed_later_runs_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = of_clamped(0.0)
    assert torch.equal(model(inputs()), base(inputs()))
    for one in (base, model):
        one[1].limit = 0.1
    assert torch.equal(model(inputs()), base(inputs()))
    base, model = of_clamped(0.0)
    for one in (base, model):
        one[1].config.scale = 2.0
    assert torch.equal(model(inputs()), base(inputs()))
    base, model = of_clamped(0.0)
    monkeypatch.setattr(
        Clamped, "forward", lambda self, x: 3 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    )
    assert torch.equal(model(inputs()), base(inputs()))


def test_an_activation_whose_setting_is_changed_later_has_its_own_gradient() -> None:
    torch.manual_seed(0)
    block = Clamped(0.0)
    block.act_fn = nn.GELU()
    base = nn.Sequential(nn.Linear(6, 6), block).double()
    model = nspec.finetune(
        copy.deepcopy(base), nspec.NeuronMasks({"a": {"1.gate_proj": torch.arange(16) < 4}}), quiet=True
    )
    found = []
    for one in (base, model):
        one[1].act_fn.approximate = "tanh"
        x = inputs().requires_grad_()
        one(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_an_activation_that_differs_far_from_0_alone_is_not_taken_for_another() -> None:
    from nspec.nn.tuned_block import _kind_of

    assert _kind_of(nn.ReLU()) == "relu"
    assert _kind_of(nn.SiLU()) == "silu"
    assert _kind_of(nn.GELU()) == "gelu"
    assert _kind_of(nn.Hardtanh(0, 20)) is None


def test_neurons_of_a_model_whose_dtype_was_changed_fit_the_same_base_in_that_dtype(tmp_path: Path) -> None:
    base, model = tuned()
    train(model)
    model.half()
    nspec.save_neurons(model, tmp_path)
    found = nspec.load_neurons(copy.deepcopy(base).half(), tmp_path)
    x = inputs().half()
    with torch.no_grad(), nspec.task(model, "a"), nspec.task(found, "a"):
        assert torch.equal(model(x), found(x))


def test_a_dtype_in_letters_is_an_error_that_says_what_is_expected() -> None:
    masks = nspec.NeuronMasks({"a": {"0": torch.arange(16) < 4}})
    with pytest.raises(TypeError, match=r"dtype is 'float32', expected one of PyTorch's"):
        nspec.finetune(make(), masks, dtype="float32")  # type: ignore[arg-type]
