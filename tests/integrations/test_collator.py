"""The column of tasks goes past any collator, and what is no task is named with its row."""

from __future__ import annotations

import doctest
import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

import nspec
import nspec.integrations.collator
from nspec.integrations.collator import check_column

ROWS = [{"x": 1.0, "task": "b"}, {"x": 2.0, "task": None}, {"x": 3.0, "task": "a"}]


def test_a_batch_has_the_tasks_last_and_the_rows_stay() -> None:
    rows = [dict(row) for row in ROWS]
    batch = nspec.task_collator(default_collate)(rows)
    assert list(batch) == ["x", "task"]
    assert batch["task"] == ["b", None, "a"]
    assert rows == ROWS


def test_for_other_processes_the_tasks_are_numbers() -> None:
    collate = pickle.loads(pickle.dumps(nspec.task_collator(default_collate, tasks=["a", "b"])))  # as workers get it
    assert torch.equal(collate(ROWS)["task"], torch.tensor([1, -1, 0]))
    assert torch.equal(collate([{"x": 1, "task": torch.tensor(1)}])["task"], torch.tensor([1]))
    with pytest.raises(ValueError, match="row 1 of the batch: there are no masks of task 'c'; known: a, b"):
        collate([ROWS[0], {"x": 1, "task": "c"}])
    with pytest.raises(ValueError, match="row 0 of the batch: task is 2, expected a number from 0 to 1"):
        collate([{"x": 1, "task": 2}])


def test_what_cannot_be_collated_is_an_error() -> None:
    with pytest.raises(TypeError, match="collator is a NoneType, expected a callable"):
        nspec.task_collator(None)
    with pytest.raises(
        ValueError, match="row 0 of the batch has no column 'direction', only x, task: give each row one"
    ):
        nspec.task_collator(default_collate, "direction")(ROWS)
    with pytest.raises(TypeError, match="row 0 of the batch is a tuple, expected a mapping with a column 'task'"):
        nspec.task_collator(default_collate)([(1, "a")])
    with pytest.raises(TypeError, match="the collator made a list, expected a mapping"):
        nspec.task_collator(list)(ROWS)


@pytest.mark.parametrize(
    ("last", "error", "message"),
    [
        ({"task": "c"}, ValueError, "row 3 of rows, column 'task': there are no masks of task 'c'; known: a, b"),
        ({"task": 2}, ValueError, "row 3 of rows, column 'task': task is 2, expected a number from 0 to 1"),
        ({"task": True}, TypeError, "row 3 of rows, column 'task': task is True, expected the name"),
        ({"task": ["a"]}, TypeError, r"row 3 of rows, column 'task': task is \['a'\]"),
        ({"x": 1}, ValueError, "row 3 of rows has no column 'task', only x: give each row one"),
    ],
    ids=["name", "number", "bool", "list", "missing"],
)
def test_a_list_of_rows_is_looked_through(last: dict[str, Any], error: type[Exception], message: str) -> None:
    check_column(ROWS, "task", ["a", "b"], "rows")
    with pytest.raises(error, match=message):
        check_column([*ROWS, last], "task", ["a", "b"], "rows")


def test_the_example_of_the_docstring_runs() -> None:
    found = doctest.testmod(nspec.integrations.collator, extraglobs={"nspec": nspec, "torch": torch})
    assert (found.failed, found.attempted > 3) == (0, True)
