"""Training on micro-batches of several directions: the loss and gradient of their sentences run task by task."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from toy_translation import Toy, rows, run_options

import nspec
from nspec.mt.methods import NeuronSpecialization
from nspec.mt.text.batches import TaskBatchSampler
from nspec.mt.text.collate import collate
from nspec.mt.text.prepared import Examples
from nspec.mt.training.loop import TrainingDiverged
from nspec.mt.training.loss import label_smoothed_loss
from nspec.mt.training.train import train_system

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("mode", [None, "forward", "update"])
def test_mixed_micro_batches_give_the_loss_of_their_sentences_with_the_neurons_of_each(toy: Toy, mode: Any) -> None:
    """The logged loss, gradient norm and tokens are those of the same sentences run task by task."""
    options: dict[str, Any] = {"updates": 1, "accumulate": 2, "log_every": 1, "tasks_per_batch": 3}
    config = toy.config(**options, model={"dropout": 0.0, "attention_dropout": 0.0})
    masks = None if mode is None else toy.masks()
    folder = toy.folder / f"mixed {mode}"
    train_system(
        "x",
        config.train,
        toy.data,
        toy.model(config),
        folder,
        method=NeuronSpecialization(masks, mode) if masks else None,
        show=False,
        **run_options(config),
    )
    train, dataset = config.train, Examples(toy.data, "train")
    keys = [
        key
        for batch in TaskBatchSampler(
            toy.data, "train", train.batch_tokens, train.temperature, 2, seed=1, tasks_per_batch=3
        )
        for key in batch
    ]
    examples = [dataset[key] for key in keys]
    model = toy.model(config)
    if masks is not None:
        nspec.specialize(model, masks, mode=mode)
    count = sum(len(example.target) - 1 for example in examples)  # the tag is given, not asked for
    total = 0.0
    tasks = {example.task for example in examples}
    assert len(tasks) > 2
    for task in tasks:
        inputs = collate([example for example in examples if example.task == task])
        assert inputs.pop("task") == task
        labels = inputs.pop("labels")
        with nspec.task(model, task) if masks else contextlib.nullcontext():
            logits = model(**inputs).logits
            loss = label_smoothed_loss(logits, labels, 0.1, count)
            loss.backward()
        total += loss.item()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    row = rows(folder)[0]
    assert row["loss"] == pytest.approx(total, rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tokens"] == sum(len(example.source) + len(example.target) for example in examples)


def test_a_loss_that_diverges_in_a_mixed_micro_batch_names_its_tasks(toy: Toy) -> None:
    with pytest.raises(TrainingDiverged, match=r"a batch of ..-.. \+ ..-.. .*is nan"):
        toy.train("mixed diverged", tasks_per_batch=4, lr=1e30, warmup=1, clip_norm=0.0, weight_decay=1.0)
