"""Trainings that are not plain: what each comes to where there is nothing for it to do, and that all can be resumed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_translation import Toy, last, rows, same_bits

from nspec.mt.training import train as training
from nspec.mt.training.config import CurriculumConfig, ReptileConfig, SurgeryConfig, TrainConfig
from nspec.mt.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = [
    Recipe("pcgrad", SurgeryConfig()),
    Recipe("gradvac", SurgeryConfig(beta=0.3)),
    Recipe("temperature", CurriculumConfig(temperature=0.5)),
    Recipe("curriculum", CurriculumConfig(start=0.05)),
    Recipe("reptile", ReptileConfig(share=0.6)),
]


@pytest.fixture(scope="module")
def alone(toy: Toy) -> Any:
    """Plain training on one direction, on one thread like what is compared with it: it is made before ``one_thread``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = toy.train("alone", task="en-de", accumulate=2)
    torch.set_num_threads(threads)
    return trained


@pytest.mark.parametrize(
    "recipe",
    [*RECIPES[:3], Recipe("reptile", ReptileConfig(share=1.0, inner=1, rate=1.0))],
    ids=lambda recipe: recipe.name,
)
def test_with_nothing_to_do_it_is_plain_training_bit_for_bit(toy: Toy, alone: Any, recipe: Recipe) -> None:
    """One direction; of Reptile one inner step, and all of its way."""
    own = toy.train(f"alone {recipe.name}", task="en-de", accumulate=2, recipe=recipe)
    assert same_bits(last(own), last(alone))
    assert rows(own) == rows(alone)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_it_goes_on_bit_for_bit_where_it_was_interrupted(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, recipe: Recipe
) -> None:
    measure, calls = training.Validator.measure, 0

    def interrupted(validator: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return measure(validator)

    options: dict[str, Any] = {"recipe": recipe, "accumulate": 4}
    straight = toy.train(f"straight {recipe.name}", **options)
    monkeypatch.setattr(training.Validator, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy.train(f"interrupted {recipe.name}", **options)
    monkeypatch.undo()
    torch.rand(7)  # the state of the generator must come from the checkpoint
    again = toy.train(f"interrupted {recipe.name}", **options)
    assert rows(again) == rows(straight)
    assert same_bits(last(again), last(straight))


def test_a_training_is_not_gone_on_with_by_another_recipe(toy: Toy) -> None:
    toy.train("changed", recipe=RECIPES[1], accumulate=2, updates=4)
    with pytest.raises(ValueError, match="recipe was"):
        toy.train("changed", recipe=RECIPES[0], accumulate=2, updates=8)
    toy.train("changed", recipe=RECIPES[1], accumulate=2, updates=8)
    toy.train("until the end", recipe=RECIPES[2], updates=4)
    with pytest.raises(ValueError, match="recipe was"):  # half the way to the temperature would be there already
        toy.train("until the end", recipe=RECIPES[2], updates=8)


@pytest.mark.parametrize("recipe", [RECIPES[0], RECIPES[4]], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 1}, "accumulate is 1"),
        ({"accumulate": 4, "tasks_per_batch": 2}, "expected tasks_per_batch 1, found 2"),
        ({"accumulate": 4, "precision": "fp16"}, "bf16 or fp32"),
    ],
)
def test_what_does_not_go_together_is_said(recipe: Recipe, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.check(TrainConfig(**options))


def test_several_processes_and_uneven_inner_steps_are_errors() -> None:
    with pytest.raises(ValueError, match="one process, found 2"):
        RECIPES[0].check(TrainConfig(accumulate=4), world=2)
    with pytest.raises(ValueError, match=r"divisor of accumulate \(4\).*found 3"):
        Recipe("reptile", ReptileConfig(inner=3)).check(TrainConfig(accumulate=4))


def test_the_inner_steps_of_a_meta_update_are_of_one_direction(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    descend = training.Loop._descend

    def noted(loop: Any, batches: Any, optimizer: Any) -> Any:
        seen.append([batch["task"] for batch in batches])
        return descend(loop, batches, optimizer)

    monkeypatch.setattr(training.Loop, "_descend", noted)
    folder = toy.train("meta", recipe=Recipe("reptile", ReptileConfig(0.5, 2, optimizer="sgd")), accumulate=4)
    meta, others = seen[:12], seen[12:]  # 6 of 12 updates, two steps each
    assert len(others) == 6
    assert [len(step) for step in meta] == [2] * 12
    assert all(len({*one, *two}) == 1 for one, two in zip(meta[::2], meta[1::2]))
    assert len({step[0] for step in meta}) > 1
    assert any(len(set(step)) > 1 for step in others)
    plain = toy.train("not meta", accumulate=4)
    assert rows(folder)[-1]["step"] == rows(plain)[-1]["step"]
