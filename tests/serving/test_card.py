"""Model cards say what was made, of what, and how much of each layer is in it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from models import m2m100, masks_for

import nspec
from nspec.serving import densities, model_card


def test_a_card_gives_density_and_width_of_each_layer_and_the_base() -> None:
    model: Any = m2m100()
    masks = masks_for(model)
    nspec.specialize(model, masks)
    small = nspec.merge(model, "de-en", compact=True)
    card = model_card(model, "de-en", small, base="some/model", languages=["de", "en"], text="## Use")
    head, body = card.split("---\n")[1:]
    assert 'base_model: "some/model"\nlanguage:\n- "de"\n- "en"' in head
    assert "# de-en" in body
    assert "`some/model`" in body
    assert "## Use" in body
    rows = re.findall(r"\| `([\w.]+)` \| (\d+) \| (\d+) \| ([\d.]+) \| (\d+) \|", body)
    assert [name for name, *_ in rows] == masks.layers
    for name, dense, kept, density, here in rows:
        assert int(kept) == int(masks["de-en"][name].sum())
        assert float(density) == pytest.approx(densities(model, "de-en")[name], abs=5e-4)
        assert int(dense) == 200
        assert int(here) == small.get_submodule(name).out_features
    assert f"{sum(p.numel() for p in small.parameters()):,} parameters, the dense one" in body


def test_a_card_of_a_model_without_masked_neurons_says_how_it_was_trained() -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model), "update")
    assert "sparse updates" in model_card(model, "en-de", nspec.merge(model, "en-de"))
    nspec.finetune(nspec.despecialize(model), masks_for(model))
    assert "fine-tuned for the task en-de" in model_card(model, "en-de", nspec.merge(model, "en-de"))
    model = m2m100()
    masks = masks_for(model)
    few = {t: {n: m & (t == masks.tasks[0]) for n, m in layers.items()} for t, layers in masks.items()}
    with pytest.warns(UserWarning, match="masks have no neuron of"):
        nspec.finetune(model, nspec.NeuronMasks(few), quiet=True)
    for task, told in zip(masks.tasks, ("fine-tuned for the task", "has no neurons of its own")):
        assert told in model_card(model, task, nspec.merge(model, task))
