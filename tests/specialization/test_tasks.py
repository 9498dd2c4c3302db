"""Switching tasks: nested, through wrappers, and with clear errors."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import batch, m2m100, masks_for

import nspec
from nspec.specialization.tasks import task_by_layer


def test_the_task_before_comes_back_also_after_an_error() -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model))
    fc1 = model.model.encoder.layers[0].fc1
    nspec.set_task(model, "de-en")
    with pytest.raises(KeyError), nspec.task(model, "en-de"):
        assert fc1.task == "en-de"
        with nspec.task(model, None):
            assert fc1.task is None
        assert fc1.task == "en-de"
        raise KeyError
    assert fc1.task == "de-en"


def test_an_unknown_task_is_an_error_that_names_the_nearest_and_changes_nothing() -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model))
    nspec.set_task(model, "de-en")
    with pytest.raises(ValueError, match=r"no masks of task 'en-dd'; known: en-de"):
        nspec.set_task(model, "en-dd")
    assert model.model.encoder.layers[0].fc1.task == "de-en"
    with pytest.raises(TypeError, match="expected the name of a task or None"):
        nspec.set_task(model, 3)


def test_a_model_without_masks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"is not specialised: call nspec.specialize"):
        nspec.set_task(m2m100(), "en-de")


def test_it_reaches_through_wrappers() -> None:
    model = m2m100(torch.float32)
    nspec.specialize(model, masks_for(model))
    wrapped = torch.nn.DataParallel(model)  # on a CPU it only forwards
    with nspec.task(wrapped, "en-de"):
        inside = wrapped(**batch()).loss
    with nspec.task(model, "en-de"):
        assert torch.equal(inside, model(**batch()).loss)


def test_each_layer_can_have_a_task_of_its_own() -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model))
    tasks = {f"model.{side}.layers.{i}.fc1": t for side, t in (("encoder", "de-en"), ("decoder", None)) for i in (0, 1)}
    with nspec.task(model, "en-de"):
        with task_by_layer(model, tasks.__getitem__):
            assert {name: model.get_submodule(name).task for name in tasks} == tasks
        assert {model.get_submodule(name).task for name in tasks} == {"en-de"}


def test_a_layer_that_does_not_know_its_task_leaves_all_as_they_were() -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model))
    nspec.set_task(model, "de-en")
    last = "model.decoder.layers.1.fc1"
    with pytest.raises(ValueError, match="no masks of task 'xx'"), task_by_layer(model, {last: "xx"}.get):
        pass
    assert model.model.encoder.layers[0].fc1.task == "de-en"
    with pytest.raises(ValueError, match="is not specialised"), task_by_layer(m2m100(), lambda name: None):
        pass


@pytest.mark.parametrize("mode", ["forward", "update"])
def test_training_without_a_task_is_warned_of_once_for_a_model(mode: str, recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")  # Python itself would show it once for both models
    model, other = m2m100(torch.float32), m2m100(torch.float32)
    for each in (model, other):
        nspec.specialize(each, masks_for(each), mode=mode)
    with nspec.task(model, "en-de"):
        model(**batch()).loss.backward()
    with nspec.task(model, None):  # said so
        model(**batch()).loss.backward()
    with torch.no_grad():
        model(**batch())
    model.eval()(**batch())
    assert not [w for w in recwarn if "specialised" in str(w.message)]
    for each in (model, model, other):
        each.train()(**batch()).loss.backward()
    told = [str(w.message) for w in recwarn if "without a task" in str(w.message)]
    assert len(told) == 2
    assert all("model.encoder.layers.0.fc1" in text and "nspec.task(model, name)" in text for text in told)
