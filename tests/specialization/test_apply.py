"""Specialised models: exact in loss and every gradient, undone without a trace, merged to plain weights."""

from __future__ import annotations

import pytest
import torch
from models import batch, m2m100, masked_copy, masks_for
from torch import nn

import nspec


@pytest.mark.parametrize("mode", ["forward", "update"])
def test_without_a_task_it_is_the_dense_model_bitwise(mode: str) -> None:
    model = m2m100()
    want = model(**batch()).loss
    nspec.specialize(model, masks_for(model), mode=mode)
    assert torch.equal(model(**batch()).loss, want)
    with nspec.task(model, "en-de"):
        masked = model(**batch()).loss
    assert torch.equal(model(**batch()).loss, want)
    assert torch.equal(masked, want) == (mode == "update")


@pytest.mark.parametrize("mode", ["forward", "update"])
def test_despecialize_leaves_no_trace(mode: str) -> None:
    model = m2m100()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = {name: (id(m), type(m), set(m.__dict__)) for name, m in model.named_modules()}
    parameters = [id(p) for p in model.parameters()]
    nspec.specialize(model, masks_for(model), mode=mode)
    assert list(model.state_dict()) == list(before)
    assert [id(p) for p in model.parameters()] == parameters
    with nspec.task(model, "en-de"):
        model(**batch()).loss.backward()
    nspec.despecialize(model)
    assert {name: (id(m), type(m), set(m.__dict__)) for name, m in model.named_modules()} == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("mode", ["forward", "update"])
def test_merge_is_a_plain_model_that_computes_the_task(mode: str) -> None:
    model = m2m100().eval()
    masks = masks_for(model)
    nspec.specialize(model, masks, mode=mode)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merged = nspec.merge(model, "en-de")
    assert not any(type(m).__module__.startswith("nspec") for m in merged.modules())
    with nspec.task(model, "en-de"):
        torch.testing.assert_close(merged(**batch()).logits, model(**batch()).logits, rtol=0, atol=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_decoding_without_gradients_follows_changed_weights_and_tasks() -> None:
    """The packed weights that inference keeps must never be stale."""
    model = m2m100().eval()
    masks = masks_for(model)
    nspec.specialize(model, masks)
    for change in (None, "in place", "optimizer", "data", "state dict"):
        if change == "in place":
            with torch.no_grad():
                model.model.encoder.layers[0].fc1.weight.add_(0.1)
        elif change == "optimizer":
            with nspec.task(model, "en-de"):
                model(**batch()).loss.backward()
            torch.optim.AdamW(model.parameters(), lr=0.1).step()
        elif change == "data":
            model.model.decoder.layers[0].fc2.weight.data = model.model.decoder.layers[0].fc2.weight.data * 2
        elif change == "state dict":
            model.load_state_dict(m2m100(seed=3).state_dict())
        for task in ("en-de", "de-en"):
            with torch.no_grad(), nspec.task(model, task):
                first, second = model(**batch()).logits, model(**batch()).logits
            with nspec.task(model, task):
                with_grad = model(**batch()).logits
            assert torch.equal(first, second)
            torch.testing.assert_close(first, with_grad, rtol=0, atol=1e-12)


def test_hooks_on_the_layers_stay() -> None:
    model = m2m100()
    seen = []
    model.model.encoder.layers[0].fc2.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    nspec.specialize(model, masks_for(model))
    with nspec.task(model, "en-de"):
        model(**batch())
    assert seen == [torch.Size([3, 9, 24])]


def test_torch_encoder_layer_is_masked_in_evaluation_too() -> None:
    """Its fused inference path reads the weights behind our back unless it is switched off."""
    torch.manual_seed(0)
    model = (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 96, dropout=0.0, batch_first=True), 2).double().eval()
    )
    masks = masks_for(model)
    other = masked_copy(model, masks, "en-de")
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        dense, want = model(x), other(x)
        nspec.specialize(model, masks)
        with nspec.task(model, "en-de"):
            torch.testing.assert_close(model(x), want, rtol=0, atol=1e-10)
        assert not torch.allclose(dense, want)
        torch.testing.assert_close(model(x), dense)
    nspec.despecialize(model)
    assert all(layer.activation_relu_or_gelu == 1 for layer in model.layers)


def test_layers_without_masks_stay_dense() -> None:
    model = m2m100()
    masks = masks_for(model)
    decoder_only = nspec.NeuronMasks({t: {n: m for n, m in masks[t].items() if "decoder" in n} for t in masks})
    other = masked_copy(model, decoder_only, "en-de")
    other(**batch()).loss.backward()
    nspec.specialize(model, decoder_only)
    assert type(model.model.encoder.layers[0].fc1) is nn.Linear
    with nspec.task(model, "en-de"):
        model(**batch()).loss.backward()
    for layer in ("model.encoder.layers.0.fc1", "model.encoder.layers.1.fc1"):
        ours, theirs = model.get_submodule(layer).weight.grad, other.get_submodule(layer).weight.grad
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_passes_without_gradients_follow_fused_optimisers_and_compiled_training() -> None:
    """Fused optimisers write into weights without raising their versions."""
    torch._dynamo.reset()
    for run in (lambda m: m, lambda m: torch.compile(m, backend="eager")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 72), nn.ReLU(), nn.Linear(72, 4))
        masks, x = masks_for(model), torch.randn(5, 4)
        nspec.specialize(model, masks)
        nspec.set_task(model, "en-de")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            with torch.no_grad():
                before = model(x)
            loss = run(model)(x).square().sum()
            with torch.no_grad():
                torch.testing.assert_close(model(x), before)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                found = model(x)
            torch.testing.assert_close(found, model(x).detach())
            assert not torch.allclose(found, before)


def test_weights_of_inference_mode_compute_too() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 72), nn.ReLU(), nn.Linear(72, 4))
        nspec.specialize(model, masks_for(model))
        with nspec.task(model, "en-de"):
            first = model(torch.ones(2, 4))
            model[0].weight.mul_(2)
            assert not torch.equal(model(torch.ones(2, 4)), first)


def test_despecialize_within_a_block_leaves_a_plain_model() -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model))
    with nspec.task(model, "en-de"):
        nspec.despecialize(model)
    assert type(model.model.encoder.layers[0].fc1) is nn.Linear


def test_parts_with_different_tasks_are_switched_together_or_not_at_all() -> None:
    model = nn.ModuleList([nn.Sequential(nn.Linear(4, 72), nn.ReLU(), nn.Linear(72, 4)) for _ in range(2)])
    for part, tasks in zip(model, (("a", "b"), ("a",))):
        nspec.specialize(part, masks_for(part, tasks))
    nspec.set_task(model, "a")
    for switch in (lambda: nspec.set_task(model, "b"), lambda: nspec.merge(model, "b")):
        with pytest.raises(ValueError, match="no masks of task 'b'; known: a"):
            switch()
    assert [part[0].task for part in model] == ["a", "a"]


def test_a_second_derivative_stays_in_the_rows_of_the_task_in_mode_update() -> None:
    model = nn.Sequential(nn.Linear(4, 72), nn.ReLU(), nn.Linear(72, 4)).double()
    masks = masks_for(model)
    nspec.specialize(model, masks, mode="update")
    x = torch.randn(4, 5, 4, dtype=torch.float64, requires_grad=True)
    parts = {}
    for switch in ("en-de", "de-en", ["de-en", "en-de", "de-en", "en-de"]):
        model.zero_grad()
        with nspec.task(model, switch):
            (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        if isinstance(switch, str):
            mine = slice(None) if switch is None else [i % 2 == (switch == "en-de") for i in range(4)]
            g[mine].square().sum().backward()
            parts[switch] = model[0].weight.grad.clone()
            assert not parts[switch][~masks[switch]["0"]].any()
            assert switch == "de-en" or parts[switch].any()
        else:
            g.square().sum().backward()
            torch.testing.assert_close(model[0].weight.grad, parts["en-de"] + parts["de-en"])


def test_checkpoints_of_an_evaluated_torch_encoder_in_mode_update() -> None:
    """Its fused path, which calls no layer, is taken where gradients are off: in a reentrant checkpoint."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 96, dropout=0.0, batch_first=True), 1).eval()
    masks = masks_for(model)
    nspec.specialize(model, masks, mode="update")
    x = torch.randn(2, 5, 8, requires_grad=True)
    with nspec.task(model, "en-de"):
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True).square().sum().backward()
    assert not model.layers[0].linear1.weight.grad[~masks["en-de"]["layers.0.linear1"]].any()
