"""The task of each row of a batch, past collators that know numbers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nspec.specialization.layers import nearest
from nspec.specialization.tasks import task_name

_BASE = -1  # stands for None in a tensor


class TaskCollator:
    """A collator that keeps the column of tasks; see :func:`task_collator`, which makes it.

    Args:
        collator: what makes a batch, a mutable mapping, of the other columns.
        column: the name of the column.
        tasks: of the model; None leaves the tasks as they are given.
        labels: what numbers in the column stand for, where that is not their place in ``tasks``.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        column: str = "task",
        tasks: Sequence[str] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        if not callable(collator):
            raise TypeError(f"collator is a {type(collator).__name__}, expected a callable that makes a batch of rows")
        self.collator, self.column, self.labels = collator, column, labels
        self.tasks = None if tasks is None else list(tasks)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The batch of the other columns, with the tasks as its last entry."""
        found, rest = [], []
        for place, row in enumerate(rows):
            where = f"row {place} of the batch"
            if not isinstance(row, Mapping):
                raise TypeError(f"{where} is a {type(row).__name__}, expected a mapping with a column {self.column!r}")
            found.append(task_in(row, self.column, self.labels, where))
            rest.append({name: value for name, value in row.items() if name != self.column})
        batch = self.collator(rest)
        if not hasattr(batch, "__setitem__") or not hasattr(batch, "keys"):
            raise TypeError(f"the collator made a {type(batch).__name__}, expected a mapping that takes the tasks too")
        batch[self.column] = found if self.tasks is None else torch.tensor(list(self._numbers(found)))
        return batch

    def _numbers(self, found: list[Any]) -> Iterator[int]:
        assert self.tasks is not None
        places = {name: place for place, name in enumerate(self.tasks)}
        for place, task in enumerate(found):
            name = known_name(task, self.tasks, f"row {place} of the batch")
            yield _BASE if name is None else places[name]


def task_collator(
    collator: Callable[[list[Any]], Any], column: str = "task", tasks: Sequence[str] | None = None
) -> TaskCollator:
    """Wraps a collator of rows so that the task of each row is in the batch, for a training loop of your own.

    The column is taken out of the rows, ``collator`` makes a batch of the others (most fail over text), and
    ``batch[column]`` is the list of tasks as they stand in the rows. Take it out again before the model gets the batch. A
    row without a task, for the base, holds None.

    Args:
        collator: any that makes a mapping of a list of mappings, such as those of Transformers or
            ``torch.utils.data.default_collate``.
        column: the name of the column.
        tasks: ``masks.tasks``. If given ``batch[column]`` is a tensor of their numbers, int64 ``[rows]``, for loaders that
            send batches from one process to others (``dispatch_batches`` of accelerate); they send no text. None is -1
            there, which ``nspec.task`` refuses: give it None.

    Raises:
        TypeError: ``collator`` cannot be called; in a batch, a row is no mapping or the batch is none.
        ValueError: in a batch, a row has no such column, or not a task of ``tasks``.

    Example:
        >>> rows = [{"input_ids": [5, 6], "task": "en-de"}, {"input_ids": [7, 8], "task": "en-fr"}]
        >>> collate = nspec.task_collator(torch.utils.data.default_collate)
        >>> batch = collate(rows)
        >>> batch.pop("task"), list(batch)
        (['en-de', 'en-fr'], ['input_ids'])
        >>> nspec.task_collator(torch.utils.data.default_collate, tasks=["en-fr", "en-de"])(rows)["task"]
        tensor([1, 0])
    """
    return TaskCollator(collator, column, tasks)


def tasks_of_batch(value: Any) -> list[Any]:
    """The tasks in a batch, from what a collator made of the column: a tensor, a list or one task for all."""
    if isinstance(value, Tensor):
        listed = value.tolist()
        return [None if one == _BASE else one for one in (listed if isinstance(listed, list) else [listed])]
    return [value] if value is None or isinstance(value, (str, int)) else list(value)


def task_in(row: Mapping[str, Any], column: str, labels: Sequence[str] | None, where: str) -> Any:
    """The task of a row as it stands there, by its name where the column has ``labels``. ValueError without the column."""
    if column not in row:
        raise ValueError(
            f"{where} has no column {column!r}, only {', '.join(map(str, row)) or 'none'}: give each row one with its "
            "task, or None for the base"
        )
    task = row[column]
    task = task.tolist() if hasattr(task, "tolist") else task
    return task if labels is None else task_name(task, labels)


def known_name(task: Any, tasks: Sequence[str], where: str) -> str | None:
    """The name of a task that is given by name or number.

    Raises:
        ValueError: a task that is none of ``tasks``.
        TypeError: it is neither a name nor a number nor None.
    """
    try:
        name = task_name(task, tasks)
        if name is not None and name not in tasks:
            raise ValueError(f"there are no masks of task {name!r}; {nearest(name, tasks)}")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
    return name


def labels_of(dataset: Any, column: str) -> list[str] | None:
    """The names of a column of class labels (``datasets.ClassLabel``), which numbers in it stand for."""
    features = getattr(dataset, "features", None)
    names = getattr(features.get(column), "names", None) if isinstance(features, Mapping) else None
    return None if names is None else list(names)


def check_column(dataset: Any, column: str, tasks: Sequence[str], what: str) -> None:
    """Looks whether the tasks of a data set are known, where that costs no row of it: lists and ``datasets.Dataset``.

    Raises:
        ValueError: the column is missing, or has a task that is none of ``tasks``.
        TypeError: it has something that is no task.
    """
    labels = labels_of(dataset, column)
    if isinstance(dataset, (list, tuple)):
        seen: set[str] = set()
        for place, row in enumerate(dataset):
            if not isinstance(row, Mapping):
                return  # the collator says so
            task = task_in(row, column, labels, f"row {place} of {what}")
            if not (isinstance(task, str) and task in seen):
                known_name(task, tasks, f"row {place} of {what}, column {column!r}")
                seen.add(task)
    elif (
        hasattr(dataset, "unique") and hasattr(dataset, "column_names") and dataset.format["type"] != "custom"
    ):  # no transform makes its rows
        if column not in dataset.column_names:
            task_in(dict.fromkeys(dataset.column_names), column, None, what)
        try:
            _check(dataset.data.column(column).unique().to_pylist(), labels, tasks, "")
        except (TypeError, ValueError):  # of the whole table; rows with other tasks may have been filtered out
            _check(dataset.select_columns([column]).unique(column), labels, tasks, f"{what}, column {column!r}")


def _check(values: Iterable[Any], labels: Sequence[str] | None, tasks: Sequence[str], where: str) -> None:
    for value in values:
        known_name(value if labels is None else task_name(value, labels), tasks, where)
