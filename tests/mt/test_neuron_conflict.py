from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from toy_translation import Toy

from nspec.mt.neuron_conflict import neuron_conflict
from nspec.mt.text.batches import evaluation_batches
from nspec.mt.text.collate import IGNORED, collate
from nspec.mt.text.prepared import Examples
from nspec.specialization.layers import find_blocks

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_is_how_much_faster_a_loss_falls_with_a_neuron_of_its_own(toy: Toy) -> None:
    model, data = toy.model().train(), toy.data
    before = copy.deepcopy(model.state_dict())
    seen: list[tuple[str, int, int]] = []
    found = neuron_conflict(model, data, 200, progress=lambda *progress: seen.append(progress))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert seen[-1] == (data.tasks[-1], 2 * len(data.tasks), 2 * len(data.tasks))

    # By the definition: each direction's mean loss in one batch, and each neuron's parameters by themselves.
    examples, gradients = Examples(data, "valid"), {}
    model.eval()
    for number, task in enumerate(data.tasks):
        every = [example for batch in evaluation_batches(data, "valid", task, 200) for example in batch]
        inputs = collate([examples[number, example] for example in every])
        labels, _ = inputs.pop("labels"), inputs.pop("task")
        model.zero_grad()
        logits = model(**inputs, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).backward()
        gradients[task] = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    mean = {name: torch.stack([of[name] for of in gradients.values()]).mean(0) for name in gradients[task]}
    for task in data.tasks:
        for block in find_blocks(model):
            fc1, fc2 = block.name, block.name.replace("fc1", "fc2")
            for neuron in range(0, block.d_ff, 7):
                apart = together = 0.0
                for name, where in (
                    (f"{fc1}.weight", neuron),
                    (f"{fc1}.bias", neuron),
                    (f"{fc2}.weight", (..., neuron)),
                ):
                    own = gradients[task][name][where]
                    apart += float((own * own).sum())
                    together += float((own * mean[name][where]).sum())
                assert float(found[task][block.name][neuron]) == pytest.approx(apart - together, rel=1e-3, abs=1e-9)


def test_it_is_of_the_text_that_was_asked_for(toy: Toy) -> None:
    few, other = (neuron_conflict(toy.model(), toy.data, 200, split, 2) for split in ("valid", "train"))
    every = neuron_conflict(toy.model(), toy.data, 200)
    task, layer = toy.data.tasks[0], next(iter(few[toy.data.tasks[0]]))
    assert not torch.equal(few[task][layer], every[task][layer])
    assert not torch.equal(few[task][layer], other[task][layer])


def test_frozen_neurons_and_a_single_direction_are_errors(toy: Toy) -> None:
    model = toy.model()
    model.model.decoder.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"model.decoder.layers.0.fc1: its parameters are frozen, and have no gradients"
    ):
        neuron_conflict(model, toy.data, 200)
    with pytest.raises(ValueError, match=f"between two or more, and the text has {toy.data.tasks[0]} alone"):
        neuron_conflict(toy.model(), toy.data.only(toy.data.tasks[0]), 200)


def test_a_gradient_that_is_not_finite_names_the_direction(toy: Toy) -> None:
    model = toy.model()
    with torch.no_grad():
        next(iter(find_blocks(model))).fc1.weight[0] = float("nan")
    with pytest.raises(ValueError, match=f"{toy.data.tasks[0]}: a gradient is not finite"):
        neuron_conflict(model, toy.data, 200)
