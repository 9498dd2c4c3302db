"""AdamW that touches, of specialised layers, only the rows that were used since the last step."""

from __future__ import annotations

import copy
import gc
import re
import weakref

import pytest
import torch
from torch import nn

import nspec
from nspec import MaskedLinear, NeuronMasks, RowSparseAdamW

OPTIONS = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
EVEN, LOW = torch.arange(64) % 2 == 0, torch.arange(64) < 20


def specialised() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 4)).double()
    return nspec.specialize(model, NeuronMasks({"even": {"0": EVEN}, "low": {"0": LOW}}))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *tasks: str | None) -> torch.Tensor:
    """One update over a micro-batch of each task; the rows of fc1.weight that changed."""
    before = model[0].weight.detach().clone()
    for name in tasks:
        with nspec.task(model, name):
            model(torch.randn(5, 4, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return (model[0].weight != before).any(1)


def test_rows_outside_the_task_stay_bitwise_even_with_momentum_and_decay() -> None:
    model = specialised()
    optimizer = RowSparseAdamW(model.parameters(), **OPTIONS)
    assert torch.equal(step(model, optimizer, "even"), EVEN)
    assert torch.equal(step(model, optimizer, "low"), LOW)
    assert torch.equal(step(model, optimizer, "even"), EVEN)


def test_micro_batches_of_several_tasks_update_the_union() -> None:
    model = specialised()
    optimizer = RowSparseAdamW(model.parameters(), **OPTIONS)
    assert torch.equal(step(model, optimizer, "even", "low"), EVEN | LOW)
    assert step(model, optimizer, None).all()


def test_evaluation_between_steps_touches_nothing() -> None:
    model = specialised()
    optimizer = RowSparseAdamW(model.parameters(), **OPTIONS)
    with torch.no_grad(), nspec.task(model, "low"):
        model(torch.randn(5, 4, dtype=torch.float64))
    assert torch.equal(step(model, optimizer, "even"), EVEN)


def test_with_every_row_used_it_is_torch_adamw() -> None:
    model = specialised()
    other = copy.deepcopy(model)
    ours, theirs = RowSparseAdamW(model.parameters(), **OPTIONS), torch.optim.AdamW(other.parameters(), **OPTIONS)
    for seed in range(4):
        torch.manual_seed(seed)
        step(model, ours, None)
        torch.manual_seed(seed)
        step(other, theirs, None)
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_copy_of_the_model_gets_an_optimiser_of_its_own() -> None:
    model = copy.deepcopy(specialised())
    assert torch.equal(step(model, RowSparseAdamW(model.parameters(), **OPTIONS), "low"), LOW)


def test_state_goes_through_a_checkpoint() -> None:
    model = specialised()
    optimizer = RowSparseAdamW(model.parameters(), **OPTIONS)
    step(model, optimizer, "even")
    other = specialised()
    other.load_state_dict(model.state_dict())
    resumed = RowSparseAdamW(other.parameters(), **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, resumed)):
        torch.manual_seed(1)
        step(m, o, "low")
    assert torch.equal(model[0].weight, other[0].weight)


def test_a_masked_linear_alone_works_too() -> None:
    layer = MaskedLinear(4, 64)
    layer.set_mask(LOW)
    optimizer = RowSparseAdamW(layer.parameters(), **OPTIONS)
    before = layer.weight.detach().clone()
    layer(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert torch.equal((layer.weight != before).any(1), LOW)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_given_model_is_asked_for_its_layers_and_nothing_else(wrapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from nspec.nn import masked_linear

    model = specialised()
    monkeypatch.setattr(masked_linear, "_LAYERS", ())
    with pytest.raises(ValueError, match="no parameter belongs to a specialised layer"):
        RowSparseAdamW(model.parameters(), **OPTIONS)
    optimizer = RowSparseAdamW(model.parameters(), **OPTIONS, model=nn.Sequential(model) if wrapped else model)
    assert torch.equal(step(model, optimizer, "low"), LOW)
    with pytest.raises(ValueError, match="belongs to a specialised layer, or to neurons, of the Linear: call"):
        RowSparseAdamW(model.parameters(), **OPTIONS, model=nn.Linear(1, 1))
    with pytest.raises(TypeError, match="model is a str, expected a torch.nn.Module or None"):
        RowSparseAdamW(model.parameters(), **OPTIONS, model="model")


@pytest.mark.parametrize("how", ["assigned", "loaded", "moved"])
def test_a_layer_whose_parameter_was_replaced_is_known(how: str) -> None:
    model = specialised()
    if how == "assigned":
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    elif how == "loaded":
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    else:
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    assert torch.equal(step(model, RowSparseAdamW(model.parameters(), **OPTIONS), "low"), LOW)


def test_a_parameter_that_a_wrapper_has_put_aside_still_belongs_to_its_layer() -> None:
    model = specialised()
    optimizer = RowSparseAdamW(model.parameters(), **OPTIONS)
    step(model, optimizer, "even")
    own, before = model[0].weight, model[0].weight.detach().clone()
    with nspec.task(model, "low"):
        model(torch.randn(5, 4, dtype=torch.float64)).square().mean().backward()
    model[0].weight = nn.Parameter(before.clone())
    optimizer.step()
    assert torch.equal((own != before).any(1), LOW)


def test_a_flattened_weight_is_an_error_that_says_what_to_do() -> None:
    model = specialised()
    model[0].weight = nn.Parameter(model[0].weight.detach().flatten())
    with pytest.raises(ValueError, match=r"shape \[256\], expected \[64, 4\]: .*fully_shard"):
        RowSparseAdamW(model.parameters())


def test_layers_that_are_gone_are_forgotten() -> None:
    from nspec.nn import masked_linear

    model = specialised()
    step(model, RowSparseAdamW(model.parameters(), **OPTIONS), "low")
    known = weakref.ref(model[0])
    assert any(layer is known() for layer in masked_linear._LAYERS)
    del model
    gc.collect()
    assert known() is None


def test_a_step_in_a_capture_is_an_error_and_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = specialised()
    optimizer = RowSparseAdamW(model.parameters(), **OPTIONS)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_available", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="capture forward and backward pass, and step outside"):
            step(model, optimizer, "even")
    assert torch.equal(step(model, optimizer, "low"), EVEN | LOW)  # the gradients of the step that failed are there yet


def test_a_model_that_is_not_specialised_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter belongs to a specialised layer"):
        RowSparseAdamW(nn.Linear(2, 2).parameters())
    model = specialised()
    nspec.despecialize(model)
    with pytest.raises(ValueError, match="no parameter belongs to a specialised layer"):
        RowSparseAdamW(model.parameters())


NAN, INF = float("nan"), float("inf")
OUT_OF_RANGE = [{name: value} for name in ("lr", "eps", "weight_decay") for value in (-1, NAN, INF, -INF)]
OUT_OF_RANGE += [
    {"betas": betas} for betas in ((0.9,), (0.9, 0.99, 0.999), (), (0.9, 1.0), (NAN, 0.9), (-0.1, 0.9), (2, INF))
]


@pytest.mark.parametrize("options", OUT_OF_RANGE, ids=str)
def test_options_out_of_range_are_errors(options: dict) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=re.escape(f"{name}={value}") + ".*expected finite numbers >= 0"):
        RowSparseAdamW(specialised().parameters(), **options)


@pytest.mark.parametrize(
    "options",
    [{"lr": "0.1"}, {"lr": True}, {"eps": None}, {"betas": 0.9}, {"betas": ("a", 0.9)}, {"betas": None}],
    ids=str,
)
def test_options_that_are_no_numbers_are_errors(options: dict) -> None:
    with pytest.raises(TypeError, match="expected"):
        RowSparseAdamW(specialised().parameters(), **options)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("how", ["prune", "weight_norm", "parametrisation"])
@pytest.mark.parametrize("when", ["before the optimiser", "after a step"])
def test_a_weight_that_is_made_anew_in_each_pass_is_refused_as_its_rows_are_not_parameters(how: str, when: str) -> None:
    from torch.nn.utils import parametrizations, prune, weight_norm

    model = nn.Sequential(nn.Linear(4, 72), nn.ReLU(), nn.Linear(72, 4), nn.Linear(4, 72), nn.ReLU(), nn.Linear(72, 4))
    active = torch.arange(72) < 30
    nspec.specialize(model, nspec.NeuronMasks({"a": {"0": active, "3": active}}))
    make = {
        "prune": lambda: prune.l1_unstructured(model[0], "weight", amount=0.3),
        "weight_norm": lambda: weight_norm(model[0]),
        "parametrisation": lambda: parametrizations.weight_norm(model[0]),
    }[how]
    if when == "before the optimiser":
        make()
        with pytest.raises(ValueError, match="made anew in each pass.*make it permanent first"):
            nspec.RowSparseAdamW(model.parameters())
        return
    optimizer = nspec.RowSparseAdamW(model.parameters())
    with nspec.task(model, "a"):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        make()
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if new := [p for p in model[0].parameters() if id(p) not in known]:
            optimizer.add_param_group({"params": new})
        with pytest.raises(ValueError, match="made anew in each pass"):
            optimizer.step()
