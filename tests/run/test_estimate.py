"""How long a run will take: from the work of its stages and the speed of a few steps, mended as stages end."""

from __future__ import annotations

import pytest
import torch
from toy_translation import Toy

from nspec.run.estimate import Estimate, Speed, estimate, measure
from nspec.run.stages import stages_of

SPEED = Speed(micro_batch=2.0, step=1.0, token=0.0, sentence=0.5)


def test_work_is_micro_batches_steps_and_sentences(toy: Toy) -> None:
    config = toy.config(updates=10, accumulate=3, valid_bleu_sentences=0)
    config.run.systems, config.specialize = ["dense", "continued", "finetuned"], config.train
    config.finetune.updates = 4
    names = [stage.name for stage in stages_of(config)]
    found = estimate(config, toy.data, names, SPEED).expected
    assert found["train"] == found["specialize:continued"] == 10 * (3 * 2.0 + 1.0)
    assert found["specialize:finetuned"] == len(toy.data.tasks) * 4 * 7.0
    sentences = sum(toy.data.size("test", task) for task in toy.data.tasks)
    assert found["evaluate:dense"] == sentences * 0.5
    assert estimate(config, toy.data, ["train"], SPEED, processes=2).left() == 35.0


def test_stages_that_have_ended_correct_those_of_their_kind() -> None:
    found = Estimate({"train": 100.0, "specialize:a": 50.0, "evaluate:dense": 10.0, "score:dense": 1.0})
    assert found.left() == 161.0
    found.done("train", 200.0)
    assert found.left("training") == 100.0
    assert found.left("translation") == 10.0
    found.done("prepare", 5.0)  # not among them
    assert "about 1 min 51 s (training 1 min 40 s, translation 10.0 s, the rest 1.0 s)" in str(found)


def test_a_stage_with_hardly_any_work_tells_what_loading_costs_and_scales_nothing() -> None:
    later = {"specialize:a": 100.0, "evaluate:dense": 10.0, "evaluate:a": 0.001, "score:dense": 1.0, "report": 8.0}
    found = Estimate({"train": 0.01, "profile": 0.002} | later)
    found.done("train", 4.01)
    found.done("profile", 3.0)
    assert found.left() == pytest.approx(sum(later.values()) + 4.0)  # the other training loads as well
    found.done("evaluate:a", 2.001)
    assert found.left("translation") == pytest.approx(12.0)
    found.done("specialize:a", 1.0)
    assert found.left("the rest") == 9.0


@pytest.mark.usefixtures("one_thread")
def test_measuring_leaves_no_trace_in_random_numbers(toy: Toy) -> None:
    torch.manual_seed(3)
    speed = measure(toy.config(), toy.data)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert min(vars(speed).values()) > 0
