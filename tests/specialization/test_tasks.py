"""Switching tasks: nested, through wrappers, and with clear errors."""

from __future__ import annotations

import pytest
import torch
from models import batch, m2m100, masks_for

import nspec


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
