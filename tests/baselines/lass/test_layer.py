"""LaSS: the masked model is the model whose weights are multiplied by the masks, in values, gradients and decoding."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.utils.prune
from masked_weights import TASKS, Layers, assert_same, batch, gradients, loss_of, m2m100, multiplied, random_masks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nspec
from nspec.baselines.lass import (
    LassLinear,
    WeightMasks,
    apply_weight_masks,
    magnitude_masks,
    prunable_layers,
    remove_weight_masks,
)


@pytest.mark.parametrize("task", ["en-de", "de-en"])
def test_loss_and_gradients_are_those_of_multiplied_weights(task: str) -> None:
    model = m2m100()
    masks = random_masks(model)
    other = multiplied(model, masks, task)
    apply_weight_masks(model, masks)
    with nspec.task(model, task):
        loss = loss_of(model, batch())
        loss.backward()
    want = loss_of(other, batch())
    want.backward()
    assert abs(loss.item() - want.item()) < 1e-12 * abs(want.item())
    wanted = gradients(other)
    for layer, mask in masks[task].items():
        wanted[f"{layer}.weight"] = wanted[f"{layer}.weight"] * mask  # d(M ⊙ W)/dW
        ours = model.get_submodule(layer).weight.grad
        assert (ours[~mask] == 0).all()
        assert (ours[mask] != 0).any()
    assert_same(gradients(model), wanted)


@pytest.mark.parametrize("tasks", [["en-fr", "en-de", "en-fr", "de-en"], ["en-de", "en-de", "de-en", "de-en"]])
def test_a_batch_of_several_tasks_is_its_sentences_task_by_task(tasks: list[str]) -> None:
    model = m2m100()
    masks = random_masks(model)
    apart, whole = copy.deepcopy(model), batch()
    total = 0.0
    for task in set(tasks):
        other = multiplied(apart, masks, task)
        mine = torch.tensor([name == task for name in tasks])
        loss = loss_of(other, {name: value[mine] for name, value in whole.items()})
        loss.backward()
        total += loss.item()
        for (name, theirs), ours in zip(other.named_parameters(), apart.parameters()):
            layer = name.removesuffix(".weight")
            gradient = theirs.grad * masks[task][layer] if layer in masks.layers else theirs.grad
            ours.grad = gradient if ours.grad is None else ours.grad + gradient
    apply_weight_masks(model, masks)
    with nspec.task(model, tasks):
        loss = loss_of(model, whole)
        loss.backward()
    assert abs(loss.item() - total) < 1e-12 * abs(total)
    assert_same(gradients(model), gradients(apart))


def test_rows_of_beams_and_time_first_use_the_masks_of_their_sentence() -> None:
    model = Layers((5, 3))
    masks = random_masks(model)
    layer = model.linears[0]
    tasks = ["en-fr", "en-de", "en-fr"]
    x = torch.randn(6, 4, 3, dtype=torch.float64)  # two beams of each sentence
    wanted = torch.stack(
        [x[row] @ (layer.weight * masks[tasks[row // 2]]["linears.0"]).t() + layer.bias for row in range(6)]
    )
    apply_weight_masks(model, masks)
    with nspec.task(model, tasks):
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match="5 rows along dimension 0"):
            model(x[:5])
    with nspec.task(model, tasks, batch_dim=1), torch.no_grad():
        torch.testing.assert_close(model(x.transpose(0, 1)), wanted.transpose(0, 1), rtol=0, atol=1e-12)
    with nspec.task(model, ["en-de"] * 3):
        torch.testing.assert_close(model(x)[2:4], wanted[2:4], rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match="5 rows along dimension 0"):
            model(x[:5])


def test_masked_weights_are_not_read_and_their_gradient_is_zero_beside_values_that_are_not_finite() -> None:
    model = Layers((4, 3))
    mask = torch.tensor([[True, False, True]] * 4)
    apply_weight_masks(model, WeightMasks({"a": {"linears.0": mask}}))
    layer = model.linears[0]
    with torch.no_grad():
        layer.weight[~mask] = math.nan
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with nspec.task(model, "a"):
        model(x).sum().backward()
        assert x.grad.isfinite().all()
        assert (x.grad[:, 1] == 0).all()
        assert layer.weight.grad.isfinite().all()
        layer.weight.grad = None
        model(torch.full((2, 3), math.inf, dtype=torch.float64)).sum().backward()
    assert (layer.weight.grad[~mask] == 0).all()
    assert layer.weight.grad[mask].isinf().all()


def test_a_frozen_weight_still_gives_gradients_to_input_and_bias() -> None:
    model = Layers((4, 3))
    mask = torch.rand(4, 3) < 0.5
    apply_weight_masks(model, WeightMasks({"a": {"linears.0": mask}}))
    layer = model.linears[0]
    layer.weight.requires_grad_(False)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    with nspec.task(model, "a"):
        model(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, (layer.weight * mask).sum(0).expand(2, 3))
    assert layer.bias.grad.tolist() == [2.0] * 4


def test_autocast_computes_in_its_dtype_and_leaves_gradients_in_that_of_the_weights() -> None:
    model = Layers((4, 3)).float()
    mask = torch.rand(4, 3) < 0.5
    apply_weight_masks(model, WeightMasks({"a": {"linears.0": mask}}))
    with nspec.task(model, "a"), torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(2, 3))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    weight = model.linears[0].weight
    assert weight.grad.dtype == torch.float32
    assert (weight.grad[~mask] == 0).all()


def test_without_a_task_it_is_the_dense_model_and_a_block_restores_what_was_set() -> None:
    model = m2m100().eval()
    dense = model(**batch()).logits
    apply_weight_masks(model, random_masks(model))
    assert torch.equal(model(**batch()).logits, dense)
    nspec.set_task(model, "en-de")
    first = model(**batch()).logits
    assert not torch.equal(first, dense)
    with nspec.task(model, "de-en"):
        assert not torch.equal(model(**batch()).logits, first)
        with nspec.task(model, None):
            assert torch.equal(model(**batch()).logits, dense)
    assert torch.equal(model(**batch()).logits, first)
    assert {layer.task for layer in model.modules() if isinstance(layer, LassLinear)} == {"en-de"}


def test_masks_are_unpacked_once_for_a_task_and_dropped_for_the_next() -> None:
    model = Layers((4, 3))
    apply_weight_masks(model, random_masks(model))
    layer, x = model.linears[0], torch.randn(2, 3, dtype=torch.float64)
    with nspec.task(model, "en-de"):
        model(x)
    nspec.set_task(model, None)
    (first,) = layer._nspec.unpacked.values()
    with nspec.task(model, "en-de"):
        model(x)
    assert next(iter(layer._nspec.unpacked.values())) is first
    with nspec.task(model, ["de-en", "en-fr"]):
        model(x)
        assert len(layer._nspec.unpacked) == 2
        assert all(bits is not first for bits in layer._nspec.unpacked.values())


def test_passes_without_gradients_follow_changed_weights_and_tasks() -> None:
    """The masked weight that they keep must never be stale."""
    model = Layers((4, 3))
    masks = random_masks(model)
    apply_weight_masks(model, masks)
    layer, x = model.linears[0], torch.randn(2, 3, dtype=torch.float64)

    def check(task: str) -> None:
        wanted = x @ (layer.weight * masks[task]["linears.0"]).t() + layer.bias
        torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-12)

    with torch.no_grad(), nspec.task(model, "en-de"):
        check("en-de")
        kept = layer._nspec.product
        check("en-de")
        assert layer._nspec.product is kept
        layer.weight.add_(1)
        check("en-de")
        layer.weight.data = torch.randn(4, 3, dtype=torch.float64)
        check("en-de")
        layer.load_state_dict({"weight": torch.randn(4, 3), "bias": torch.randn(4)})
        check("en-de")
        with nspec.task(model, "de-en"):
            check("de-en")
        layer.weight.data.add_(1)  # not counted, but a task has been set since
        nspec.set_task(model, "en-de")
        check("en-de")
        with torch.enable_grad():
            model(x).sum().backward()
        layer.weight.data.add_(1)  # as a wrapper updates, after a training pass
        check("en-de")


def test_generation_under_a_task_is_that_of_multiplied_weights_and_training_goes_on() -> None:
    model = m2m100().eval()
    masks = random_masks(model)
    tasks = ["en-de", "de-en", "en-fr", "en-de"]
    others = {task: multiplied(model, masks, task) for task in TASKS}
    apply_weight_masks(model, masks)
    part = {name: value for name, value in batch().items() if name != "labels"}
    search = {"num_beams": 3, "min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False, "output_scores": True}

    def generate(model: nn.Module, rows: slice) -> tuple[Tensor, Tensor]:
        sentences = {name: value[rows] for name, value in part.items()}
        found = model.generate(**sentences, **search, return_dict_in_generate=True)
        return found.sequences, found.sequences_scores

    with nspec.task(model, tasks):
        together, scores = generate(model, slice(None))
    for row, task in enumerate(tasks):
        rows = slice(row, row + 1)
        want, want_scores = generate(others[task], rows)
        with torch.inference_mode(), nspec.task(model, task):
            found, found_scores = generate(model, rows)
        dense_scores = generate(model, rows)[1]
        for sequences, of_sequences in ((found, found_scores), (together[rows], scores[rows])):
            assert torch.equal(sequences, want)
            torch.testing.assert_close(of_sequences, want_scores, rtol=0, atol=1e-5)  # the search keeps float32
        assert (dense_scores - want_scores).abs() > 1e-3
    with torch.inference_mode(), nspec.task(model, "en-de"):
        model(**batch())
    with nspec.task(model, "en-de"):  # what inference unpacked first must be fit for a backward pass
        loss_of(model, batch()).backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_computes_again_with_the_masks_of_the_first_pass(reentrant: bool) -> None:
    model = Layers((4, 4), (4, 4))
    masks = random_masks(model)
    apply_weight_masks(model, masks)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    for task in ("en-de", ["en-fr", "de-en"]):
        found = []
        for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
            with nspec.task(model, task):
                loss = run(x).square().sum()
            nspec.set_task(model, "en-fr")  # the backward pass comes after a switch
            loss.backward()
            found.append({"x": x.grad, **gradients(model)})
            x.grad = None
            model.zero_grad()
        assert_same(found[1], found[0])


def test_one_backward_pass_may_hold_checkpoints_of_several_tasks() -> None:
    model = Layers((4, 4), (4, 4))
    apply_weight_masks(model, random_masks(model))
    x = torch.randn(2, 4, dtype=torch.float64)
    found = []
    for options in ({}, {"use_reentrant": False, "context_fn": nspec.checkpoint_contexts(model)}):
        total = torch.zeros((), dtype=torch.float64)
        for task in TASKS:
            with nspec.task(model, task):
                total = total + (checkpoint(model, x, **options) if options else model(x)).square().sum()
        total.backward()
        found.append(gradients(model))
        model.zero_grad()
    assert_same(found[1], found[0])


def test_modules_parameters_and_keys_stay_and_removal_leaves_no_trace() -> None:
    model = m2m100()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules = {name: (id(m), type(m), set(m.__dict__)) for name, m in model.named_modules()}
    parameters = [id(p) for p in model.parameters()]
    seen: list[str] = []
    hook = model.model.encoder.layers[0].fc1.register_forward_hook(lambda *_: seen.append("fc1"))
    assert apply_weight_masks(model, random_masks(model)) is model
    assert list(model.state_dict()) == list(before)
    assert [id(p) for p in model.parameters()] == parameters
    layers = [m for m in model.modules() if isinstance(m, LassLinear)]
    assert len(layers) == len(prunable_layers(m2m100()))
    assert all(layer.tasks == list(TASKS) and layer.decodes_by_task for layer in layers)
    with nspec.task(model, "en-de"):
        model(**batch()).loss.backward()
    assert seen == ["fc1"]
    hook.remove()
    assert remove_weight_masks(model) is model
    assert {name: (id(m), type(m), set(m.__dict__)) for name, m in model.named_modules()} == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_compute_the_same_and_switch_apart(way: str) -> None:
    model = m2m100().eval()
    apply_weight_masks(model, random_masks(model))
    nspec.set_task(model, "en-de")
    want = model(**batch()).logits
    other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert not any(m._nspec.unpacked for m in other.modules() if isinstance(m, LassLinear))  # bits are enough
    assert torch.equal(other(**batch()).logits, want)
    nspec.set_task(other, "de-en")
    assert not torch.equal(other(**batch()).logits, want)
    assert torch.equal(model(**batch()).logits, want)


def test_masks_that_do_not_fit_are_refused_and_nothing_is_changed() -> None:
    def masks(layer: str, *shape: int) -> WeightMasks:
        return WeightMasks({"a": {"linears.0": torch.ones(4, 3).bool(), layer: torch.ones(*shape).bool()}})

    model = Layers((4, 3), (2, 4))
    with pytest.raises(TypeError, match="masks is a dict, expected a WeightMasks"):
        apply_weight_masks(model, {})
    with pytest.raises(ValueError, match=r"linears.1 has weights \[4, 2\] in the masks, \[2, 4\] in the model"):
        apply_weight_masks(model, masks("linears.1", 4, 2))
    with pytest.raises(ValueError, match=r"'linears.2', which the model does not have; known: linears"):
        apply_weight_masks(model, masks("linears.2", 4, 2))
    with pytest.raises(ValueError, match="the model is wrapped"):
        apply_weight_masks(nn.DataParallel(model), masks("linears.1", 2, 4))
    assert not any(isinstance(module, LassLinear) for module in model.modules())
    with pytest.raises(ValueError, match="has no weight masks"):
        remove_weight_masks(model)
    apply_weight_masks(model, masks("linears.1", 2, 4))
    with pytest.raises(ValueError, match="has weight masks already"):
        apply_weight_masks(model, masks("linears.1", 2, 4))
    with pytest.raises(ValueError, match="no masks of task 'b'; known: a"):
        nspec.set_task(model, "b")


def test_layers_whose_masks_would_be_passed_by_are_refused_with_the_way_out() -> None:
    def patched(layer: nn.Linear) -> None:
        layer.forward = layer.forward  # as accelerate's hooks leave it

    def pruned(layer: nn.Linear) -> None:
        nn.utils.prune.l1_unstructured(layer, "weight", amount=0.5)

    def parametrised(layer: nn.Linear) -> None:
        nn.utils.parametrizations.weight_norm(layer)

    ways_out = {
        patched: r"linears.1 has a forward of its own.*remove_hook_from_module\(model, recurse=True\)",
        pruned: r"linears.1.weight is no parameter but is made by a hook from .*weight_orig.* torch.nn.utils.prune.remove",
        parametrised: r"linears.1 is ParametrizedLinear, expected a plain nn.Linear .*remove_parametrizations",
        lambda layer: layer.to("meta"): r"linears.1.weight is on the meta device",
    }
    for change, message in ways_out.items():
        model = Layers((4, 3), (2, 4))
        masks = random_masks(model)
        change(model.linears[1])
        before = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=message):
            apply_weight_masks(model, masks)
        assert [type(module) for module in model.modules()] == before
    model = Layers((4, 3), (2, 4))
    masks = random_masks(model)
    pruned(model.linears[1])
    with torch.no_grad():
        model.linears[1].weight_orig.add_(1.0)
    with pytest.raises(ValueError, match="prune.remove"):  # its weight is the one before the change
        magnitude_masks(model, 0.3, layers=["linears.1"])
    nn.utils.prune.remove(model.linears[1], "weight")
    apply_weight_masks(model, masks)
