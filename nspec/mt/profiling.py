"""Counting activations on prepared text, the batches shared out over the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

import nspec
from nspec import processes
from nspec.mt.config import ProfileConfig
from nspec.mt.text.batches import LengthSource, evaluation_batches
from nspec.mt.text.collate import collate
from nspec.mt.text.prepared import Examples, TokenIds


class CountedText(LengthSource, TokenIds, Protocol):
    """What activations are counted on: prepared text, that of another folder, or a part of one of these."""


def profile_tasks(
    model: nn.Module,
    data: CountedText,
    config: ProfileConfig,
    batch_tokens: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> nspec.ActivationCounts:
    """Counts how often each feed-forward neuron fires, per direction, with teacher forcing in evaluation mode.

    Each process runs whole batches, which are the same however many processes there are, so the counts are too.

    Args:
        model: dense, or specialised and then profiled dense.
        data: the text.
        config: which text, how much, and whether padding counts.
        batch_tokens: most tokens of a batch, padding counted.
        progress: called as ``progress(task, batches done, batches in all)`` after each batch of this process.

    Returns:
        The counts of all tasks of ``data``, summed over the processes.

    Raises:
        ValueError: a direction without text, or a model without feed-forward blocks.
    """
    examples = Examples(data, config.split)
    rank, world = processes.rank(), processes.world()
    mine: dict[str, list[list[int]]] = {}
    for number, task in enumerate(data.tasks):
        batches = evaluation_batches(data, config.split, task, batch_tokens, config.sentences, config.share)
        if not batches:
            raise ValueError(f"{task} has no {config.split} text to profile it on")
        if share := batches[(rank - number) % world :: world]:
            mine[task] = share
    total = sum(map(len, mine.values()))
    done = 0

    def inputs(task: str) -> Iterator[dict[str, Any]]:
        number = data.tasks.index(task)
        for batch in mine[task]:
            collated = collate([examples[number, example] for example in batch])
            del collated["task"]
            yield collated

    def note(task: str, _: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(task, done, total)

    found: nspec.ActivationCounts | None = None
    if mine:
        found = nspec.profile(model, {task: inputs(task) for task in mine}, padding=config.padding, progress=note)
    return _everyone(found, data.tasks)


def _everyone(found: nspec.ActivationCounts | None, tasks: list[str]) -> nspec.ActivationCounts:
    """The sum over the processes, some of which may have had no batch of some task, or none at all."""
    mine = None if found is None else {layer: len(found[found.tasks[0]][layer]) for layer in found.layers}
    widths = next(width for width in processes.gather(mine) if width is not None)
    zeros = {layer: torch.zeros(width, dtype=torch.int64) for layer, width in widths.items()}
    counts = {} if found is None else dict(found)
    tokens = {} if found is None else found.tokens
    return nspec.ActivationCounts(
        {task: counts.get(task, zeros) for task in tasks}, {task: tokens.get(task) or 0 for task in tasks}
    ).all_reduce()
