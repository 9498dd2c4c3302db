"""A number per neuron, summed over tokens, for each task and layer, and of how many tokens: counts and scores."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .storage import Kind, Stacked, reading, save_stacked
from .tensors import TaskTensors, check_same_layers, neurons

_Same = TypeVar("_Same", bound="TokenSums")


class TokenSums(TaskTensors):
    """``self[task][layer]`` is a tensor ``[d_ff]``: sums over the tokens of a task. They add up, also over processes.

    Args:
        sums: task -> {qualified name of fc1: tensor}, checked by the subclass, which takes the same two arguments.
        tokens: task -> the number of tokens: one for all layers, or {layer: number} where they differ. Tasks may be left
            out: their numbers are not known.

    Raises:
        ValueError: no task, tasks with different layers or widths, a layer of width 0, or numbers of tokens of another
            task, other layers, or too small.
        TypeError: a number of tokens that is no whole one.
    """

    _KIND: ClassVar[Kind]
    """How they are stored; messages call them by its name, which is a plural."""

    def __init__(
        self, sums: dict[str, dict[str, Tensor]], tokens: Mapping[str, int | Mapping[str, int]] | None
    ) -> None:
        super().__init__(sums)
        self._tokens = {} if tokens is None else self._checked_tokens(tokens)

    @property
    def tokens(self) -> dict[str, int | dict[str, int] | None]:
        """For each task the number of tokens that were counted; {layer: number} where it differs between layers.

        None: not known, as of counts that were saved by an older version or made without it.
        """
        return {task: _short(self._tokens[task]) if task in self._tokens else None for task in self.tasks}

    def _means(self) -> dict[str, dict[str, Tensor]]:
        """The sums by the number of tokens, float64; 0 without tokens. ValueError where that number is not known."""
        if unknown := [task for task in self.tasks if task not in self._tokens]:
            kind = type(self).__name__
            raise ValueError(
                f"how many tokens of {unknown[0]} were counted is not known, as the {self._KIND.name} were made or saved "
                f"without: profile again, or make them with {kind}({self._KIND.name}, tokens={{...}})"
            )
        return {
            task: {layer: value.double() / max(1, self._tokens[task][layer]) for layer, value in layers.items()}
            for task, layers in self._by_task.items()
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.tasks)} tasks, {len(self.layers)} layers)"

    def __add__(self: _Same, other: _Same) -> _Same:
        if type(other) is not type(self):
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
            joined[task] = {layer: self._plus(task, layer, mine[layer], value) for layer, value in layers.items()}
            if theirs is None:
                tokens.pop(task, None)  # of one part it is not known
            elif task in tokens:
                tokens[task] = {layer: number + theirs[layer] for layer, number in tokens[task].items()}
        return self._like(joined, tokens)

    def all_reduce(self: _Same) -> _Same:
        """The sum over the processes of ``torch.distributed``; itself where there is one process.

        Every process must hold the same tasks and layers, in the same order. The number of tokens of a task is known
        afterwards where every process knew its own.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self
        unknown = torch.tensor([int(task not in self._tokens) for task in self.tasks])
        zeros = dict.fromkeys(self.layers, 0)
        tokens = torch.tensor([[*self._tokens.get(task, zeros).values()] for task in self.tasks])
        unknown, summed = _everywhere([unknown, tokens.flatten()])
        values = iter(_everywhere([value for layers in self._by_task.values() for value in layers.values()]))
        known = {
            task: dict(zip(self.layers, numbers))
            for task, numbers, lacking in zip(self.tasks, summed.view(tokens.shape).tolist(), unknown.tolist())
            if not lacking
        }
        return self._like({t: {layer: next(values) for layer in layers} for t, layers in self._by_task.items()}, known)

    def _save(self, folder: str | os.PathLike[str], shown: dict[str, Any], own: dict[str, Any]) -> None:
        """Writes the sums and the numbers of tokens that are known.

        Args:
            folder: of the two files.
            shown: what the readable file has instead of the sums.
            own: what both files say beside.
        """
        stacked = {layer: torch.stack([self._by_task[task][layer] for task in self.tasks]) for layer in self.layers}
        widths = {layer: sums.shape[1] for layer, sums in stacked.items()}
        known = {task: number for task, number in self.tokens.items() if number is not None}
        tokens = {"tokens": known} if known else {}
        readable = own | {"tasks": self.tasks, "layers": {layer: {"d_ff": width} for layer, width in widths.items()}}
        stored = {layer: self._stored(sums) for layer, sums in stacked.items()}
        save_stacked(
            Path(folder), self._KIND, Stacked(stored, self.tasks, widths, own | tokens), readable | shown | tokens
        )

    @classmethod
    @contextlib.contextmanager
    def _reading(cls, folder: str | os.PathLike[str]) -> Iterator[tuple[dict[str, dict[str, Tensor]], dict[str, Any]]]:
        """The sums and the other entries that :meth:`_save` wrote; errors of what is made of them name the file."""
        with reading(Path(folder), cls._KIND) as (stacked, tasks, _, more):
            try:
                yield {t: {layer: rows[i] for layer, rows in stacked.items()} for i, t in enumerate(tasks)}, more
            except TypeError as error:  # of the numbers of tokens: the tensors are of the dtypes of the kind
                raise ValueError(str(error)) from error

    def _stored(self, sums: Tensor) -> Tensor:
        """The sums of a layer, ``[tasks, d_ff]``, as a file holds them."""
        return sums

    def _like(self: _Same, sums: dict[str, dict[str, Tensor]], tokens: Mapping[str, Mapping[str, int]]) -> _Same:
        """One of the same kind."""
        return type(self)(sums, tokens)

    def _plus(self, task: str, layer: str, one: Tensor, other: Tensor) -> Tensor:
        return one + other

    def _fewest(self, value: Tensor) -> int:
        """The smallest number of tokens that such sums can be of."""
        return 0

    def _with(self: _Same, tasks: dict[str, dict[str, Tensor]], names: Mapping[str, str]) -> _Same:
        tokens = {task: {new: self._tokens[task][old] for old, new in names.items()} for task in self._tokens}
        return self._like(tasks, tokens)

    def _checked_tokens(self, tokens: Any) -> dict[str, dict[str, int]]:
        """For each task and layer the number of tokens, checked against the sums."""
        if not isinstance(tokens, Mapping):
            raise TypeError(f"tokens is a {type(tokens).__name__}, expected a mapping {{task: number of tokens}}")
        noun, found = self._KIND.name, dict[str, dict[str, int]]()
        for task, given in tokens.items():
            if task not in self._by_task:
                raise ValueError(f"tokens has task {task!r}, expected those of the {noun}: {', '.join(self._by_task)}")
            layers = self._by_task[task]
            of_task = dict(given) if isinstance(given, Mapping) else dict.fromkeys(layers, given)
            if of_task.keys() != layers.keys():
                other = next(iter(of_task.keys() ^ layers.keys()))
                raise ValueError(
                    f"tokens of {task} has other layers than the {noun}: {other!r} is in one of them alone"
                )
            found[task] = {}
            for layer, value in layers.items():
                number, fewest = of_task[layer], self._fewest(value)
                if not isinstance(number, int) or isinstance(number, bool):
                    raise TypeError(f"tokens of {task}, {layer} is {number!r}, expected a whole number")
                if not fewest <= number < 2**63:
                    why = ", as a neuron fired so often" if fewest else ""
                    raise ValueError(
                        f"tokens of {task}, {layer} is {number}, expected {fewest} or more (and less than 2^63){why}"
                    )
                found[task][layer] = number
        return found


def _everywhere(parts: list[Tensor]) -> tuple[Tensor, ...]:
    """The sums over all processes of tensors of one dtype, on the CPU."""
    flat = torch.cat(parts).to("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    torch.distributed.all_reduce(flat)
    return flat.cpu().split([len(part) for part in parts])


def _short(tokens: Mapping[str, int]) -> int | dict[str, int]:
    numbers = {*tokens.values()}
    return numbers.pop() if len(numbers) == 1 else dict(tokens)
