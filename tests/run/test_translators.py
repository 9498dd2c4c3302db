"""Which model translates a direction."""

from __future__ import annotations

from typing import Any

import torch
from toy_translation import Toy

import nspec
from nspec.mt.methods import NEURONS, Neurons
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.translate import Translator
from nspec.nn.tuned_linear import TunedLayer
from nspec.run.translators import translator_of


def test_neurons_are_merged_for_each_direction_and_translate_as_they_do_beside_the_base(toy: Toy) -> None:
    model: Any = toy.model()
    Neurons(toy.masks()).attach(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".neurons." in name:  # each direction its own
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model.eval()
    loaded: list[str] = []

    def load(name: str) -> tuple[Any, Any]:
        loaded.append(name)
        return model, toy.data.tokenizer

    decode = DecodeConfig(beam=2)
    of_task = translator_of("own", NEURONS[0], load, decode)
    found = {}
    for task in toy.data.tasks:
        lines = toy.data.text("test", task)[0][:4]
        merged = of_task(task)
        assert not any(isinstance(module, TunedLayer) for module in merged.model.modules())
        found[task] = list(merged.translate(lines, task))
        assert found[task] == list(Translator(model, toy.data.tokenizer, decode).translate(lines, task))
    dense = Translator(toy.model().eval(), toy.data.tokenizer, decode)
    assert any(found[t] != list(dense.translate(toy.data.text("test", t)[0][:4], t)) for t in found)
    assert loaded == ["own"]
    assert nspec.despecialize(model) is model


def test_one_model_serves_all_directions_and_each_its_own(toy: Toy) -> None:
    loaded: list[str] = []

    def load(name: str) -> tuple[Any, Any]:
        loaded.append(name)
        return toy.model().eval(), toy.data.tokenizer

    first, second = toy.data.tasks[:2]
    of_task = translator_of("own", "", load, DecodeConfig(beam=2))
    assert of_task(first) is of_task(second)
    each = translator_of("own", "each", load, DecodeConfig(beam=2))
    assert each(first) is not each(second)
    assert loaded == ["own", f"own/{first}", f"own/{second}"]
