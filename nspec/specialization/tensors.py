"""A tensor for each task and layer, the same layers for every task: what counts and masks have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

from .patterns import matching, nearest

_Same = TypeVar("_Same", bound="TaskTensors")
_Value = TypeVar("_Value")


class ByTask(Mapping[str, Mapping[str, Tensor]], Generic[_Value]):
    """A value for each task and layer, the same layers for every task: a mapping of tasks."""

    _by_task: dict[str, dict[str, _Value]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_task)

    def __len__(self) -> int:
        return len(self._by_task)

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order given."""
        return list(self._by_task)

    @property
    def layers(self) -> list[str]:
        """The qualified names of the layers, in the order of the first task."""
        return list(next(iter(self._by_task.values())))


class TaskTensors(ByTask[Tensor]):
    """``self[task][layer]`` is a tensor ``[d_ff]``; a mapping of tasks. Subclasses check and copy the values.

    Args:
        tasks: task -> {qualified name of fc1: tensor}, in the order of the model.

    Raises:
        ValueError: no task, tasks with different layers or widths, or a layer of width 0.
    """

    def __init__(self, tasks: dict[str, dict[str, Tensor]]) -> None:
        check_same_layers(tasks, neurons)
        if empty := [layer for layer, value in next(iter(tasks.values())).items() if not len(value)]:
            raise ValueError(f"layer {empty[0]} has a width of 0, expected 1 or more")
        self._by_task = tasks

    def __getitem__(self, task: str) -> Mapping[str, Tensor]:
        return self._by_task[task]

    def only(self: _Same, patterns: Iterable[str]) -> _Same:
        """The same tasks with the layers that a pattern matches, such as ``encoder`` or ``decoder.layers.[12]``.

        Args:
            patterns: one or more, for the whole name of a layer or for a part of it between dots; see
                :func:`nspec.specialization.patterns.matching`.

        Raises:
            ValueError: no pattern, or one that matches no layer; the message names the layers that there are.
            TypeError: ``patterns`` is a text itself.

        Example:
            >>> of_layers = {"encoder.layers.0.fc1": torch.ones(2).bool(), "decoder.layers.0.fc1": torch.ones(2).bool()}
            >>> nspec.NeuronMasks({"en-de": of_layers}).only(["decoder"]).layers
            ['decoder.layers.0.fc1']
        """
        kept = dict.fromkeys(matching(self.layers, patterns))
        return self._renamed({layer: layer for layer in kept})

    def renamed(
        self: _Same, names: Mapping[str, str] | Callable[[str], str] | str, replacement: str | None = None
    ) -> _Same:
        """The same values under other names of layers, for a model whose modules are called otherwise.

        Args:
            names: {name: new name}, where layers that are left out keep theirs; or a function of the name; or, with
                ``replacement``, the beginning of names that is replaced ("" matches all).
            replacement: what names then begin with.

        Raises:
            ValueError: a layer that is not there, no layer that begins so, or two layers that would have one name.
            TypeError: ``names`` is something else, or gives something else than names.

        Example:
            >>> masks = nspec.NeuronMasks({"en-de": {"model.fc1": torch.tensor([True, False])}})
            >>> masks.renamed("model.", "base_model.model.model.").layers
            ['base_model.model.model.fc1']
        """
        if isinstance(names, str):
            if not isinstance(replacement, str):
                raise TypeError(
                    "renamed takes a mapping, a function, or two texts: the old and the new beginning of names"
                )
            if not any(layer.startswith(names) for layer in self.layers):
                raise ValueError(f"no layer begins with {names!r}; {nearest(names, self.layers)}")
            begins = {layer: replacement + layer[len(names) :] for layer in self.layers if layer.startswith(names)}
            return self.renamed(begins)
        if replacement is not None:
            raise TypeError(f"replacement is {replacement!r}, expected None beside a {type(names).__name__}")
        if isinstance(names, Mapping):
            if unknown := [layer for layer in names if layer not in self.layers]:
                raise ValueError(f"there is no layer {unknown[0]!r}; {nearest(str(unknown[0]), self.layers)}")
            new = {layer: names.get(layer, layer) for layer in self.layers}
        elif callable(names):
            new = {layer: names(layer) for layer in self.layers}
        else:
            raise TypeError(f"names is a {type(names).__name__}, expected a mapping, a function or a text")
        seen: dict[str, str] = {}
        for layer, name in new.items():
            _check_name("layer", name)
            if name in seen:
                raise ValueError(f"layers {seen[name]} and {layer} would both be called {name}")
            seen[name] = layer
        return self._renamed(new)

    def _renamed(self: _Same, names: Mapping[str, str]) -> _Same:
        """Of the layers in ``names`` alone, under their new names."""
        tasks = {task: {new: own[old] for old, new in names.items()} for task, own in self._by_task.items()}
        return self._with(tasks, names)

    def _with(self: _Same, tasks: dict[str, dict[str, Tensor]], names: Mapping[str, str]) -> _Same:
        """One of the same kind with these values; ``names`` are the old and the new ones of the layers."""
        return type(self)(tasks)


def is_name(value: object) -> bool:
    """Whether it is a text that a file can hold: not empty, and no half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        return len(value.encode()) > 0
    except UnicodeEncodeError:
        return False


def each(
    values: Mapping[str, Mapping[str, Any]], check: Callable[[str, str, Any], _Value]
) -> dict[str, dict[str, _Value]]:
    """What ``check(task, layer, value)`` gives for each value of a mapping of tasks to mappings of layers.

    Raises:
        TypeError: no mapping of mappings, or a task or layer that is no text.
        ValueError: a name that is empty, or that no file can hold.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"found {type(values).__name__}, expected a mapping {{task: {{layer: tensor}}}}")
    for task, layers in values.items():
        _check_name("task", task)
        if not isinstance(layers, Mapping):
            raise TypeError(f"task {task} has {type(layers).__name__}, expected a mapping {{layer: tensor}}")
        for layer in layers:
            _check_name("layer", layer)
    return {
        task: {layer: check(task, layer, value) for layer, value in layers.items()} for task, layers in values.items()
    }


def _check_name(what: str, name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{what} {name!r} is {type(name).__name__}, expected the name of a {what}")
    if not is_name(name):
        raise ValueError(f"{what} {name!r} is no name: expected text that is not empty, in UTF-8")


def neurons(value: Tensor) -> str:
    """How wide a layer is, for messages."""
    return f"{len(value)} neurons"


def check_same_layers(tasks: Mapping[str, Mapping[str, _Value]], size: Callable[[_Value], str]) -> None:
    """Raises ValueError unless there is a task with layers and all tasks have the same layers, of the same size."""
    if not tasks:
        raise ValueError("no task: expected a mapping of at least one task")
    first, *others = tasks
    if not tasks[first]:
        raise ValueError(f"task {first} has no layer")
    sizes = {layer: size(value) for layer, value in tasks[first].items()}
    for task in others:
        for layer, value in tasks[task].items():
            if layer not in sizes:
                raise ValueError(f"task {task} has layer {layer}, which task {first} has not")
            if (found := size(value)) != sizes[layer]:
                raise ValueError(f"layer {layer} has {found} in task {task}, {sizes[layer]} in task {first}")
        if missing := [layer for layer in sizes if layer not in tasks[task]]:
            raise ValueError(f"task {task} lacks layer {missing[0]}, which task {first} has")
