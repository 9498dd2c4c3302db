"""The attention heads that each direction of a run keeps: those that matter most to its validation loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import nspec
from nspec.analysis.heads import HeadImportance, head_importance
from nspec.mt.config import HeadsConfig
from nspec.mt.text.batches import evaluation_batches
from nspec.mt.text.collate import collate
from nspec.mt.text.prepared import Examples, PreparedData


def importance_of(
    model: Any,
    data: PreparedData,
    batch_tokens: int,
    sentences: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> HeadImportance:
    """How much each head of a dense model matters to each direction, with teacher forcing on validation text.

    Args:
        model: dense.
        data: the prepared text.
        batch_tokens: most tokens of a batch, padding counted.
        sentences: of each direction, at most; 0: all.
        progress: called as ``progress(task, batches done, batches in all)``.

    Raises:
        ValueError: see :func:`nspec.analysis.heads.head_importance`.
    """
    examples = Examples(data, "valid")
    plans = {task: evaluation_batches(data, "valid", task, batch_tokens, limit=sentences) for task in data.tasks}

    def batches(number: int, task: str) -> Iterator[dict[str, Any]]:
        for plan in plans[task]:
            batch = collate([examples[number, example] for example in plan])
            del batch["task"]
            yield batch

    total, done = sum(map(len, plans.values())), 0

    def note(task: str, _: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(task, done, total)

    inputs = {task: batches(number, task) for number, task in enumerate(data.tasks)}
    return head_importance(model, inputs, progress=note)


def kept_heads(importance: HeadImportance, config: HeadsConfig) -> nspec.NeuronMasks:
    """The heads of each direction.

    Raises:
        ValueError: a pattern that matches no attention module.
    """
    if config.layers:
        try:
            importance = importance.only(config.layers)
        except ValueError as error:
            raise ValueError(f"heads.layers: {error}") from None
    return importance.largest(config.share)
