"""A tiny specialised model, rows whose tasks can be read from their first token, and a spy that compares the two."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import M2M100Config, M2M100ForConditionalGeneration, Seq2SeqTrainer, Seq2SeqTrainingArguments

import nspec

TASKS = ["de-en", "en-de", "en-fr"]
FIRST = 10  # the first token of a row of the first task


class MyTrainer(nspec.TaskTrainerMixin, Seq2SeqTrainer):
    """As the README has it."""


def specialised(mode: str = "forward") -> nn.Module:
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 40))}
    off = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop"), 0.0)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_layerdrop": 0.0}
    config = M2M100Config(vocab_size=40, d_model=8, max_position_embeddings=32, **sizes, **off, **heads)
    model = M2M100ForConditionalGeneration(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    layers = [f"model.{side}.layers.0.fc1" for side in ("encoder", "decoder")]
    drawn = {task: {layer: torch.rand(40) < 0.4 for layer in layers} for task in TASKS}
    return nspec.specialize(model, nspec.NeuronMasks(drawn), mode=mode)


def rows(tasks: list[Any], column: str = "task") -> list[dict[str, Any]]:
    """A row for each task; the first token tells it, 0 for None. ``note`` is a column that the model does not take."""
    made = []
    for i, task in enumerate(tasks):
        name = TASKS[task] if isinstance(task, int) else task
        first = 0 if name is None else FIRST + TASKS.index(name)
        words = [20 + (7 * i + j) % 20 for j in range(5)]
        made.append({"input_ids": [first, *words], "labels": [*words[::-1], 2], column: task, "note": "x"})
    return made


def arguments(folder: Any, **options: Any) -> Seq2SeqTrainingArguments:
    given = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "num_train_epochs": 1, "use_cpu": True}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    return Seq2SeqTrainingArguments(str(folder), **(given | quiet | {"learning_rate": 0.01} | options))


def spied(model: nn.Module) -> list[tuple[Any, Any]]:
    """The list to which each pass through the encoder adds its tasks, as they should be and as they are."""
    seen: list[tuple[Any, Any]] = []
    layers = [module for module in model.modules() if hasattr(module, "qualified_name")]

    def spy(module: nn.Module, given: Any, named: dict[str, Any]) -> None:
        ids = (given[0] if given else named["input_ids"])[:, 0].tolist()
        tasks = tuple(None if i < FIRST else TASKS[i - FIRST] for i in ids)
        want = tasks[0] if len(set(tasks)) == 1 else tasks
        seen.append((want, {layer.task for layer in layers}))

    model.model.encoder.register_forward_pre_hook(spy, with_kwargs=True)
    return seen


def all_right(seen: list[tuple[Any, Any]]) -> bool:
    """Whether there were passes, of more than one task, and each had its own."""
    return len({want for want, _ in seen}) > 1 and all(found == {want} for want, found in seen)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())
