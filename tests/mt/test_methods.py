"""What makes a system: applied, trained, resumed, saved and loaded again, for every method."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_translation import Toy, run_options

import nspec
from nspec.analysis.heads import attention_layers
from nspec.baselines import lass
from nspec.mt.methods import (
    ADAPTERS,
    NEURONS,
    Adapters,
    Heads,
    Lass,
    Method,
    Neurons,
    NeuronSpecialization,
    load_method,
)
from nspec.mt.model import load_system
from nspec.mt.training.config import TrainConfig
from nspec.mt.training.loop import Loop, build_optimizer
from nspec.mt.training.train import train_system
from nspec.mt.training.validation import Validator

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["forward", "silent", "update", "adapters", "adapters+shared", "lass", "heads", "neurons", "neurons+shared"]


def method_of(toy: Toy, name: str) -> Method:
    tasks = toy.data.tasks
    if name in ADAPTERS:
        return Adapters({task: task[:2] for task in tasks}, 4, seed=3, shared=name == "adapters+shared")
    if name == "lass":
        kept = {task: lass.magnitude_masks(toy.model(seed=seed), 0.5) for seed, task in enumerate(tasks)}
        return Lass(lass.WeightMasks(kept))
    if name == "heads":
        sizes = attention_layers(toy.model())
        kept = {t: {layer: torch.arange(n) % 2 == i % 2 for layer, n in sizes.items()} for i, t in enumerate(tasks)}
        return Heads(nspec.NeuronMasks(kept))
    if name in NEURONS:
        return Neurons(toy.masks(), name == "neurons+shared")
    return NeuronSpecialization(toy.masks(), "update" if name == "update" else "forward", silent=name == "silent")


def train(toy: Toy, name: str, folder: Path, updates: int) -> dict[str, torch.Tensor]:
    config = toy.config(updates=updates, valid_every=2)
    method = method_of(toy, name)
    train_system(
        name, config.train, toy.data, toy.model(config), folder, method=method, show=False, **run_options(config)
    )
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("name", NAMES[2:])  # those of masks: training/test_resuming.py
def test_a_training_that_goes_on_ends_like_one_without_a_break(toy: Toy, name: str, tmp_path: Path) -> None:
    whole = train(toy, name, tmp_path / "whole", 4)
    train(toy, name, tmp_path / "parts", 2)
    resumed = train(toy, name, tmp_path / "parts", 4)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_system_computes_what_the_trained_one_did(toy: Toy, name: str, tmp_path: Path) -> None:
    train(toy, name, tmp_path, 2)
    model, _ = load_system(tmp_path / "model")
    found = load_method(tmp_path / "model")
    assert found is not None
    assert found.tasks == toy.data.tasks
    assert found.digest() == method_of(toy, name).digest()
    expected: Any = toy.model()
    expected.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"), strict=False)
    method_of(toy, name).attach(expected)
    expected.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"), strict=False)
    expected.tie_weights()
    expected.eval()
    ids = torch.tensor([[5, 9, 7, 2]])
    outputs = []
    for task in found.tasks:
        with nspec.task(model, task), nspec.task(expected, task), torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=ids).logits
            assert torch.equal(logits, expected(input_ids=ids, decoder_input_ids=ids).logits)
            outputs.append(logits)
    assert name == "update" or not torch.equal(outputs[0], outputs[-1])


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_are_trained_alone_or_with_the_weights_that_they_stand_in(toy: Toy, name: str, tmp_path: Path) -> None:
    stored, dense = train(toy, name, tmp_path, 2), toy.model(toy.config(updates=2)).state_dict()
    same = {key: torch.equal(value, stored[key]) for key, value in dense.items() if key in stored}
    assert any(same.values()) != (name == "adapters+shared")
    assert any(bool(value.any()) for key, value in stored.items() if key.endswith(".up.weight"))


@pytest.mark.parametrize("name", [*ADAPTERS, *NEURONS])
def test_what_a_method_brings_may_have_a_learning_rate_of_its_own(toy: Toy, name: str) -> None:
    method, model = method_of(toy, name), toy.model()
    dense = {id(parameter) for parameter in model.parameters()}
    method.attach(model)
    for rate in (0.0, 0.3):
        method.lr = rate
        groups = build_optimizer(model, TrainConfig(lr=0.1), method).param_groups
        rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
        assert rates.keys() == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert all(lr == (0.1 if key in dense else rate or 0.1) for key, lr in rates.items())


@pytest.mark.parametrize("name", NEURONS)
def test_the_dense_weights_stay_or_train_on_and_merging_computes_the_same(toy: Toy, name: str, tmp_path: Path) -> None:
    stored, dense = train(toy, name, tmp_path, 2), toy.model(toy.config(updates=2)).state_dict()
    moved = {key for key, value in dense.items() if key in stored and not torch.equal(value, stored[key])}
    assert bool(moved) == (name == "neurons+shared")
    own = [key for key in stored if ".neurons." in key]
    assert {key.rsplit(".", 1)[1] for key in own} == set(toy.data.tasks)
    model, _ = load_system(tmp_path / "model")
    ids = torch.tensor([[5, 9, 7, 2]])
    for task in toy.data.tasks:
        merged: Any = nspec.merge(model, task)
        assert merged.state_dict().keys() == toy.model().state_dict().keys()
        with nspec.task(model, task), torch.no_grad():
            computed = model(input_ids=ids, decoder_input_ids=ids).logits
            assert torch.allclose(computed, merged(input_ids=ids, decoder_input_ids=ids).logits, atol=1e-5)


def test_a_direction_without_neurons_is_named_where_nothing_else_is_trained(toy: Toy) -> None:
    masks = toy.masks()
    none = masks.tasks[1]
    empty = {layer: torch.zeros_like(mask) for layer, mask in masks[none].items()}
    few = nspec.NeuronMasks({task: empty if task == none else dict(masks[task]) for task in masks.tasks})
    with pytest.raises(ValueError, match=f"{none} has no neuron in the masks"):
        Neurons(few).attach(toy.model())
    with warnings.catch_warnings():  # over shared weights it trains these
        warnings.simplefilter("error")
        Neurons(few, shared=True).attach(toy.model())


def test_a_checkpoint_of_another_method_is_refused(toy: Toy, tmp_path: Path) -> None:
    train(toy, "lass", tmp_path, 2)
    with pytest.raises(ValueError, match="mode was 'weight_masks', is 'adapters'"):
        train(toy, "adapters", tmp_path, 4)


def test_directions_that_a_method_does_not_know_are_an_error(toy: Toy, tmp_path: Path) -> None:
    config, method = toy.config(), Adapters({toy.data.tasks[0]: "a"}, 4)
    with pytest.raises(ValueError, match=f"no adapters for .*{toy.data.tasks[-1]}"):
        train_system(
            "x", config.train, toy.data, toy.model(), tmp_path, method=method, show=False, **run_options(config)
        )


def test_a_description_that_is_none_is_an_error(tmp_path: Path) -> None:
    assert load_method(tmp_path) is None
    (tmp_path / "nspec.json").write_text('{"method": "magic"}')
    with pytest.raises(ValueError, match="magic.*expected"):
        load_method(tmp_path)
    good = {"method": "adapters", "groups": {"a-b": "x"}, "bottleneck": 4, "seed": 0}
    wrong = [{"bottleneck": value} for value in (True, 0, -1, 10**11, 2.0, "4", None)]
    wrong += [{"groups": value} for value in (None, [], {}, {"a-b": 1}, {"a-b": None}, "x")]
    wrong += [{"seed": value} for value in ("1", True, 1.5)]
    for part in wrong:
        (tmp_path / "nspec.json").write_text(json.dumps(good | part))
        with pytest.raises(ValueError, match=r"nspec.json is .*expected .*names by direction"):
            load_method(tmp_path)
    (tmp_path / "nspec.json").write_text(json.dumps(good))
    assert load_method(tmp_path).tasks == ["a-b"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_with_weight_masks_leaves_what_no_task_of_an_update_keeps(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """Weight decay and momentum would move all: in each update, and so in the end what no direction keeps at all."""
    config = toy.config(updates=6, weight_decay=0.5, accumulate=accumulate, lr=1e-2, warmup=1)
    method = method_of(toy, "lass")
    assert isinstance(method, Lass)
    layers = {f"{layer}.weight": layer for layer in method.masks.layers}
    states = [{name: value.clone() for name, value in toy.model(config).state_dict().items() if name in layers}]
    used: list[set[str]] = []
    stepping, update = Lass.stepping, Loop._update

    def noting(self: Lass, model: Any, optimizer: Any, tasks: Any) -> Any:
        used.append(set(tasks))
        return stepping(self, model, optimizer, tasks)

    def updating(self: Loop) -> None:
        update(self)
        state = self.model.state_dict()
        states.append({name: state[name].clone() for name in layers})

    monkeypatch.setattr(Lass, "stepping", noting)
    monkeypatch.setattr(Loop, "_update", updating)
    train_system(
        "lass",
        config.train,
        toy.data,
        toy.model(config),
        tmp_path,
        method=method,
        show=False,
        **run_options(config),
    )
    assert max(map(len, used)) == (1 if accumulate == 1 else 3)
    for tasks, (before, after) in zip(used, itertools.pairwise(states), strict=True):
        for name, layer in layers.items():
            kept = torch.stack([method.masks[task][layer] for task in tasks]).any(0)
            assert torch.equal(after[name][~kept], before[name][~kept])
            assert not torch.equal(after[name][kept], before[name][kept])


@pytest.mark.parametrize("name", NAMES)
def test_a_validation_before_the_first_update_does_no_harm(toy: Toy, name: str) -> None:
    """Translations are made in inference mode: what a layer keeps from them may be needed by a backward pass."""
    config = toy.config(valid_bleu_sentences=2)
    model, method = toy.model(config), method_of(toy, name)
    method.attach(model)
    Validator(model, toy.data, config.train, config.decode, precision="fp32").measure()
    for tasks in (toy.data.tasks, toy.data.tasks[:2]):
        ids = torch.tensor([[5, 9, 7, 2]] * len(tasks))
        with nspec.task(model, tasks):
            model(input_ids=ids, labels=ids).loss.backward()
    for task in toy.data.tasks:
        with nspec.task(model, task):
            model(input_ids=ids, labels=ids).loss.backward()
