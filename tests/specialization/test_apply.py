"""Specialised models: exact in loss and every gradient, undone without a trace, merged to plain weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import batch, m2m100, masks_for
from torch import nn

import nspec


def masked_copy(model: nn.Module, masks: nspec.NeuronMasks, task: str) -> nn.Module:
    """The definition: the same model with fc1.weight multiplied by the mask."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer, mask in masks[task].items():
            other.get_submodule(layer).weight.mul_(mask[:, None])
    return other


@pytest.mark.parametrize("task", ["en-de", "de-en"])
def test_forward_mode_has_the_loss_and_gradients_of_masked_weights(task: str) -> None:
    model = m2m100()
    masks = masks_for(model)
    other = masked_copy(model, masks, task)
    nspec.specialize(model, masks)
    with nspec.task(model, task):
        loss = model(**batch()).loss
        loss.backward()
    want = other(**batch()).loss
    want.backward()
    assert abs(loss.item() - want.item()) < 1e-10
    compared = 0
    for (name, ours), (_, theirs) in zip(model.named_parameters(), other.named_parameters()):
        gradient = theirs.grad
        layer = name.removesuffix(".weight")
        if layer in masks[task]:
            gradient = gradient * masks[task][layer][:, None]  # d(m ⊙ W)/dW
        torch.testing.assert_close(ours.grad, gradient, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
        compared += 1
    assert compared == len(list(model.parameters()))


def test_update_mode_has_the_dense_loss_and_zeroes_only_the_inactive_rows_of_fc1() -> None:
    model = m2m100()
    masks = masks_for(model)
    dense = copy.deepcopy(model)
    nspec.specialize(model, masks, mode="update")
    with nspec.task(model, "en-de"):
        loss = model(**batch()).loss
        loss.backward()
    want = dense(**batch()).loss
    want.backward()
    assert loss.item() == want.item()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), dense.named_parameters()):
        layer = name.removesuffix(".weight")
        if layer in masks["en-de"]:
            active = masks["en-de"][layer]
            assert (ours.grad[~active] == 0).all()
            assert (theirs.grad[~active] != 0).any()
            torch.testing.assert_close(ours.grad[active], theirs.grad[active], rtol=0, atol=1e-10)
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10)


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


def test_generate_gives_what_the_merged_model_gives() -> None:
    model = m2m100().eval()
    nspec.specialize(model, masks_for(model))
    merged = nspec.merge(model, "en-de")
    options = {
        "num_beams": 3,
        "max_new_tokens": 8,
        "forced_bos_token_id": 7,
        "attention_mask": batch()["attention_mask"],
    }
    with nspec.task(model, "en-de"), torch.inference_mode():
        ours = model.generate(batch()["input_ids"], **options)
    assert torch.equal(ours, merged.generate(batch()["input_ids"], **options))


def test_gradient_checkpointing_within_the_task() -> None:
    plain, checkpointed = m2m100(), m2m100()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, checkpointed):
        nspec.specialize(model.train(), masks_for(model))
        with nspec.task(model, "en-de"):
            model(**batch()).loss.backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_training_under_autocast_is_close_to_float32() -> None:
    model = m2m100(torch.float32)
    nspec.specialize(model, masks_for(model))
    with nspec.task(model, "en-de"):
        want = model(**batch()).loss
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch()).loss
            loss.backward()
    assert abs(loss.item() - want.item()) < 0.05 * want.item()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("mode", ["forward", "update"])
def test_a_layer_compiles_to_one_graph(mode: str) -> None:
    model = m2m100(torch.float32)
    nspec.specialize(model, masks_for(model), mode=mode)
    layer = model.model.encoder.layers[0]

    def run(x: torch.Tensor) -> torch.Tensor:
        return layer.fc2(layer.activation_fn(layer.fc1(x)))

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 24, requires_grad=True)
    for task in ("en-de", "de-en", None):
        with nspec.task(model, task):
            ours = torch.autograd.grad(compiled(x).square().sum(), [x, layer.fc1.weight, layer.fc2.weight])
            theirs = torch.autograd.grad(run(x).square().sum(), [x, layer.fc1.weight, layer.fc2.weight])
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b)


def test_copies_and_pickles_are_independent_and_equal() -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with nspec.task(other, "en-de"), nspec.task(model, "en-de"):
            assert torch.equal(other(**batch()).loss, model(**batch()).loss)
        nspec.despecialize(other)
    with nspec.task(model, "en-de"):
        model(**batch())


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


def test_t5_with_relu_is_specialised_by_its_own_names() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "d_model": 16, "d_kv": 4, "d_ff": 80, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)).double().eval()
    masks = masks_for(model)
    assert masks.layers[0] == "encoder.block.0.layer.1.DenseReluDense.wi"
    other = masked_copy(model, masks, "en-de")
    nspec.specialize(model, masks)
    with nspec.task(model, "en-de"):
        torch.testing.assert_close(model(**batch()).loss, other(**batch()).loss, rtol=0, atol=1e-10)


# What goes wrong, and what is said then.


def test_masks_of_another_model_are_named_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"model.encoder.layers.0.fc1 has d_ff=200 in the masks, 128 in the model"):
        nspec.specialize(m2m100(d_ff=128), masks_for(m2m100()))


def test_masks_with_other_layer_names_give_the_nearest() -> None:
    masks = nspec.NeuronMasks({"a": {"encoder.layers.0.fc1": torch.ones(200, dtype=torch.bool)}})
    with pytest.raises(
        ValueError, match=r"'encoder.layers.0.fc1', which the model does not have; known: model.encoder"
    ):
        nspec.specialize(m2m100(), masks)


def test_a_wrapped_model_is_named_as_such() -> None:
    model = m2m100()
    wrapped = nn.Sequential()
    wrapped.module = model
    with pytest.raises(ValueError, match="the model is wrapped: specialise it first"):
        nspec.specialize(wrapped, masks_for(model))


def test_activation_dropout_and_other_activations_are_refused() -> None:
    model = m2m100(activation_dropout=0.1)
    with pytest.raises(ValueError, match=r"activation_dropout is 0.1, expected 0 in mode 'forward'"):
        nspec.specialize(model, masks_for(model))
    nspec.specialize(model, masks_for(model), mode="update")
    gelu = m2m100(activation_function="gelu")
    with pytest.raises(ValueError, match="expected ReLU"):
        nspec.specialize(gelu, masks_for(gelu))


class Secretive(nn.Module):
    """Says nothing of what it computes between fc1 and fc2."""

    def __init__(self, between) -> None:
        super().__init__()
        self.fc1, self.fc2, self._between = nn.Linear(4, 80), nn.Linear(80, 4), between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self._between(self.fc1(x)))


@pytest.mark.parametrize(
    "between",
    [nn.functional.gelu, lambda h: nn.functional.dropout(torch.relu(h), 0.1), lambda h: torch.relu(h) * 2, lambda h: h],
)
def test_what_a_layer_does_in_secret_is_found_by_the_first_pass(between) -> None:
    model = Secretive(between)
    nspec.specialize(model, masks_for(model))
    with nspec.task(model, "en-de"), pytest.raises(ValueError, match="is not ReLU alone"):
        model(torch.randn(30, 4))


def test_relu_in_secret_is_fine() -> None:
    model = Secretive(torch.relu)
    nspec.specialize(model, masks_for(model))
    with nspec.task(model, "en-de"):
        model(torch.randn(30, 4)).sum().backward()


class OtherNames(nn.Module):
    """A feed-forward block whose attributes have names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 80), nn.Linear(80, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.relu(self.inner(x)))


def test_layers_with_other_names_are_profiled_and_specialised_when_they_are_given() -> None:
    model, names, x = OtherNames(), [("inner", "outer")], torch.randn(30, 4)
    with pytest.raises(ValueError, match=r"no feed-forward pair found in OtherNames.*\('inner', 'outer'\)"):
        nspec.profile(model, {"t": [x]})
    masks = nspec.select(nspec.profile(model, {"t": [x]}, layers=names), k=0.5)
    want = masked_copy(model, masks, "t")(x)
    nspec.specialize(model, masks, layers=names)
    with nspec.task(model, "t"):
        torch.testing.assert_close(model(x), want)
    with pytest.raises(ValueError, match="outer has 4 outputs, but outer has 80 inputs"):
        nspec.specialize(OtherNames(), masks, layers=[("outer", "outer")])


def test_specialising_twice_and_undoing_nothing_are_errors() -> None:
    model = m2m100()
    with pytest.raises(ValueError, match="is not specialised"):
        nspec.despecialize(model)
    masks = masks_for(model)
    nspec.specialize(model, masks)
    with pytest.raises(ValueError, match="specialised already"):
        nspec.specialize(model, masks)
    with pytest.raises(ValueError, match="mode is 'both'"):
        nspec.specialize(m2m100(), masks, mode="both")


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
        model = nn.Sequential(nn.Linear(4, 72), nn.ReLU(), nn.Linear(72, 3))
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
        model = nn.Sequential(nn.Linear(4, 72), nn.ReLU(), nn.Linear(72, 3))
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
    model = nn.Sequential(nn.Linear(4, 72), nn.ReLU(), nn.Linear(72, 3)).double()
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


class Gated(nn.Module):
    """A block whose up projection is multiplied by a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 80), nn.Linear(4, 80), nn.Linear(80, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.gate_proj(x)) * self.up_proj(x))


def test_where_nothing_is_found_the_message_says_why() -> None:
    from transformers.pytorch_utils import Conv1D

    adapted = nn.Module()
    adapted.fc1, adapted.fc2 = nn.Identity(), nn.Linear(80, 4)
    adapted.fc1.base_layer = nn.Linear(4, 80)
    conv = nn.Module()
    conv.c_fc, conv.c_proj = Conv1D(80, 4), Conv1D(4, 80)
    for model, why in (
        (nn.Sequential(Gated()), "blocks are gated, such as 0: the method needs one layer with ReLU"),
        (nn.Sequential(adapted), "0.fc1 is a .*Identity, expected nn.Linear; specialise before adapters are put on"),
        (nn.Sequential(conv), "0.c_fc is a transformers.*Conv1D, expected nn.Linear"),
        (nn.Sequential(nn.Linear(4, 4)), "no two of which the first widens"),
        (nn.Identity(), "no linear layers"),
    ):
        with pytest.raises(ValueError, match=why):
            nspec.profile(model, {"t": [torch.randn(3, 4)]})
    masks = nspec.NeuronMasks({"t": {"up_proj": torch.ones(80, dtype=torch.bool)}})
    with pytest.raises(ValueError, match="^up_proj: the block is gated"):
        nspec.specialize(Gated(), masks, layers=[("up_proj", "down_proj")])


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
