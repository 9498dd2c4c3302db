"""Activation counts: for each task and layer, how many real tokens fired each neuron, and of how many."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .storage import Kind, Stacked, reading, save_stacked
from .tensors import TaskTensors, check_same_layers, each, neurons

_KIND = Kind("counts", ("I32", "I64"))


class ActivationCounts(TaskTensors):
    """``counts[task][layer]`` is an int64 tensor ``[d_ff]``: the number of tokens that fired each neuron.

    A neuron fires for a token where its pre-activation (of a gated block, that of its gate) is above 0. ReLU, GELU, SiLU,
    squared ReLU and their like are above 0 there and nowhere else (but for subnormal numbers, half of which may be rounded
    to 0); of activations that are never 0 (the sigmoid) it is the definition.

    A mapping of tasks. ``counts + counts`` adds them up (batches of one task that were counted apart) and joins tasks.

    Args:
        counts: task -> {qualified name of fc1: integer tensor ``[d_ff]``, none negative}. Copied.
        tokens: task -> the number of tokens that were counted: one for all layers, or {layer: number} where they differ,
            as in encoder and decoder, and in experts. Tasks may be left out: their numbers are not known.

    Raises:
        ValueError: no task, tasks with different layers or widths, a layer without neurons, a name that is empty,
            negative counts, numbers of tokens of another task or other layers, or a neuron that fired more often than there
            are tokens.
        TypeError: a value that is not an integer tensor, or a name that is no text, or no mapping of mappings, or a number
            of tokens that is no whole one.

    Example:
        >>> counts = ActivationCounts({"en-de": {"fc1": torch.tensor([1, 6, 3])}}, tokens={"en-de": 12})
        >>> counts.tokens["en-de"], counts.rates()["en-de"]["fc1"].tolist()
        (12, [0.08333333333333333, 0.5, 0.25])
    """

    def __init__(
        self, counts: Mapping[str, Mapping[str, Tensor]], tokens: Mapping[str, int | Mapping[str, int]] | None = None
    ) -> None:
        super().__init__(each(counts, _checked))
        self._tokens = {} if tokens is None else _checked_tokens(tokens, self._by_task)

    @property
    def tokens(self) -> dict[str, int | dict[str, int] | None]:
        """For each task the number of tokens that were counted; {layer: number} where it differs between layers.

        None: not known, as of counts that were saved by an older version or made without it.
        """
        return {task: _short(self._tokens[task]) if task in self._tokens else None for task in self.tasks}

    def rates(self) -> dict[str, dict[str, Tensor]]:
        """For each task and layer the share of tokens that fired each neuron, float64 ``[d_ff]``; 0 without tokens.

        Raises:
            ValueError: the number of tokens of a task is not known.
        """
        if unknown := [task for task in self.tasks if task not in self._tokens]:
            raise ValueError(
                f"how many tokens of {unknown[0]} were counted is not known, as the counts were made or saved without: "
                "profile again, or make them with ActivationCounts(counts, tokens={...})"
            )
        return {
            task: {layer: count.double() / max(1, self._tokens[task][layer]) for layer, count in layers.items()}
            for task, layers in self._by_task.items()
        }

    def __repr__(self) -> str:
        return f"ActivationCounts({len(self.tasks)} tasks, {len(self.layers)} layers)"

    def __add__(self, other: ActivationCounts) -> ActivationCounts:
        if not isinstance(other, ActivationCounts):
            return NotImplemented
        joined = {task: dict(layers) for task, layers in self._by_task.items()}
        tokens = {task: dict(of_task) for task, of_task in self._tokens.items()}
        for task, layers in other._by_task.items():
            mine, theirs = joined.get(task), other._tokens.get(task)
            if mine is None:
                joined[task] = dict(layers)
                if theirs is not None:
                    tokens[task] = dict(theirs)
                continue
            check_same_layers({f"{task} (left)": mine, f"{task} (right)": layers}, neurons)
            joined[task] = {layer: _sum(task, layer, mine[layer], count) for layer, count in layers.items()}
            if theirs is None:
                tokens.pop(task, None)  # of one part it is not known
            elif task in tokens:
                tokens[task] = {layer: number + theirs[layer] for layer, number in tokens[task].items()}
        return ActivationCounts(joined, tokens)

    def all_reduce(self) -> ActivationCounts:
        """The sum over the processes of ``torch.distributed``; itself where there is one process.

        Every process must hold the same tasks and layers, in the same order. The number of tokens of a task is known
        afterwards where every process knew its own.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        unknown = torch.tensor([int(task not in self._tokens) for task in self.tasks])
        zeros = dict.fromkeys(self.layers, 0)
        tokens = torch.tensor([[*self._tokens.get(task, zeros).values()] for task in self.tasks])
        counts = [count for layers in self._by_task.values() for count in layers.values()]
        flat = torch.cat([unknown, tokens.flatten(), *counts])
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        moved = flat.to(device)
        torch.distributed.all_reduce(moved)
        sizes = [len(unknown), tokens.numel(), *map(len, counts)]
        unknown, summed, *parts = moved.cpu().split(sizes)
        known = {
            task: dict(zip(self.layers, numbers))
            for task, numbers, lacking in zip(self.tasks, summed.view(tokens.shape).tolist(), unknown.tolist())
            if not lacking
        }
        each_part = iter(parts)
        return ActivationCounts(
            {t: {layer: next(each_part) for layer in layers} for t, layers in self._by_task.items()}, known
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``counts.safetensors`` (one integer tensor ``[tasks, d_ff]`` per layer) and a readable ``counts.json``.

        Both hold the numbers of tokens that are known.

        Raises:
            OSError: the files cannot be written; what was there is unchanged.
        """
        stacked = {layer: torch.stack([self._by_task[task][layer] for task in self.tasks]) for layer in self.layers}
        narrow = {
            layer: count.to(torch.int32) if int(count.max() if count.numel() else 0) < 2**31 else count
            for layer, count in stacked.items()
        }
        widths = {layer: count.shape[1] for layer, count in stacked.items()}
        readable = {
            "tasks": self.tasks,
            "layers": {layer: {"d_ff": width} for layer, width in widths.items()},
            "activations": {t: {layer: total(self._by_task[t][layer]) for layer in self.layers} for t in self.tasks},
        }
        tokens = {task: number for task, number in self.tokens.items() if number is not None}
        more = {"tokens": tokens} if tokens else {}
        save_stacked(Path(folder), _KIND, Stacked(narrow, self.tasks, widths, more), readable | more)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ActivationCounts:
        """Reads what :meth:`save` wrote, also in versions before the numbers of tokens were kept.

        Raises:
            FileNotFoundError: there is no ``counts.safetensors`` in the folder.
            ValueError: the file is broken, is not one of counts, or holds something else than it says; the message names
                the file, what was found and what was expected.
        """
        with reading(Path(folder), _KIND) as (stacked, tasks, _, more):
            counts = {t: {layer: rows[i] for layer, rows in stacked.items()} for i, t in enumerate(tasks)}
            try:
                return cls(counts, more.get("tokens"))
            except TypeError as error:  # of the numbers of tokens: the tensors are integers
                raise ValueError(str(error)) from error

    def _with(
        self: ActivationCounts, tasks: dict[str, dict[str, Tensor]], names: Mapping[str, str]
    ) -> ActivationCounts:
        tokens = {task: {new: self._tokens[task][old] for old, new in names.items()} for task in self._tokens}
        return ActivationCounts(tasks, tokens)


def total(count: Tensor) -> int:
    """The sum of one layer's counts, int64 ``[d_ff]``, exactly: it may be larger than an int64."""
    return (int((count >> 32).sum()) << 32) + int((count & 0xFFFFFFFF).sum())


def _sum(task: str, layer: str, one: Tensor, other: Tensor) -> Tensor:
    both = one + other
    if int(both.min()) < 0:  # of two that are not negative, every sum beyond an int64 is
        raise ValueError(f"the counts of {task}, {layer} add up to more than {2**63 - 1}")
    return both


def _checked(task: str, layer: str, count: Tensor) -> Tensor:
    if not isinstance(count, Tensor) or count.dtype not in (torch.int64, torch.int32):
        found = count.dtype if isinstance(count, Tensor) else type(count).__name__
        raise TypeError(f"counts of {task}, {layer}: found {found}, expected an int64 tensor [d_ff]")
    if count.dim() != 1:
        raise ValueError(f"counts of {task}, {layer} have shape {list(count.shape)}, expected [d_ff]")
    if count.numel() and int(count.min()) < 0:
        raise ValueError(f"counts of {task}, {layer} go down to {int(count.min())}, expected none below 0")
    return count.detach().to("cpu", torch.int64, copy=True)


def _short(tokens: Mapping[str, int]) -> int | dict[str, int]:
    numbers = {*tokens.values()}
    return numbers.pop() if len(numbers) == 1 else dict(tokens)


def _checked_tokens(tokens: Any, counts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, int]]:
    """For each task and layer the number of tokens, checked against the counts."""
    if not isinstance(tokens, Mapping):
        raise TypeError(f"tokens is a {type(tokens).__name__}, expected a mapping {{task: number of tokens}}")
    found: dict[str, dict[str, int]] = {}
    for task, given in tokens.items():
        if task not in counts:
            raise ValueError(f"tokens has task {task!r}, expected those of the counts: {', '.join(counts)}")
        of_task = dict(given) if isinstance(given, Mapping) else dict.fromkeys(counts[task], given)
        if of_task.keys() != counts[task].keys():
            other = next(iter(of_task.keys() ^ counts[task].keys()))
            raise ValueError(f"tokens of {task} has other layers than the counts: {other!r} is in one of them alone")
        found[task] = {}
        for layer, count in counts[task].items():
            number = of_task[layer]
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"tokens of {task}, {layer} is {number!r}, expected a whole number")
            if not int(count.max()) <= number < 2**63:
                raise ValueError(
                    f"tokens of {task}, {layer} is {number}, expected {int(count.max())} or more (and less than 2^63), "
                    "as a neuron fired so often"
                )
            found[task][layer] = number
    return found
