"""Threads: one model is switched by one thread at a time; results are right, or another thread is refused clearly."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import batch, m2m100, masks_for
from torch import nn

import nspec

BOTH = pytest.mark.parametrize("mode", ["forward", "update"])


def in_thread(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, or the error that it raises, in another thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run, name="other")
    thread.start()
    thread.join()
    return found[0]


def specialised(mode: str = "forward") -> nn.Module:
    model = m2m100(torch.float32).eval()
    return nspec.specialize(model, masks_for(model), mode=mode)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(**batch()).logits


@BOTH
def test_many_threads_may_run_a_task_that_was_set_for_all(mode: str) -> None:
    model = specialised(mode)
    inputs = [batch(seed) for seed in range(4)]
    nspec.set_task(model, "en-de")
    with torch.no_grad():
        want = [model(**one).logits for one in inputs]
    wrong: list[Any] = []

    def serve(number: int) -> None:
        try:
            with torch.no_grad():  # a thread has its own grad mode
                wrong.extend(number for _ in range(25) if not torch.equal(model(**inputs[number]).logits, want[number]))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert wrong == []


@BOTH
def test_two_threads_with_tasks_of_their_own_are_right_or_refused_and_never_wrong(mode: str) -> None:
    model = specialised(mode)
    want = {}
    for task in ("en-de", "de-en"):
        with nspec.task(model, task):
            want[task] = logits(model)
    found: list[Any] = []

    def serve(task: str) -> None:
        for _ in range(25):
            try:
                with nspec.task(model, task):
                    found.append(torch.equal(logits(model), want[task]))
            except RuntimeError as error:
                found.append(str(error))

    threads = [threading.Thread(target=serve, args=(task,)) for task in want]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 50
    assert True in found
    assert all(one is True or "switched by one thread at a time" in one for one in found)
    assert {layer.task for layer in (model.model.encoder.layers[0].fc1, model.model.decoder.layers[1].fc1)} == {None}


def test_a_thread_that_runs_a_model_inside_the_block_of_another_is_refused_also_dense() -> None:
    model = specialised()
    with nspec.task(model, "en-de"):
        error = in_thread(lambda: logits(model))
        assert isinstance(error, RuntimeError)
        assert "thread other runs a model that thread MainThread has switched" in str(error)
        logits(model)
    assert torch.equal(in_thread(lambda: logits(model)), logits(model))


@pytest.mark.parametrize(
    "switch", [lambda m: nspec.set_task(m, "de-en"), lambda m: nspec.set_task(m, None), nspec.despecialize]
)
def test_another_thread_may_not_switch(switch: Callable[[nn.Module], Any]) -> None:
    model = specialised()
    fc1 = model.model.encoder.layers[0].fc1
    nspec.set_task(model, "en-de")
    assert "let it set None first" in str(in_thread(lambda: switch(model)))
    with nspec.task(model, "de-en"):
        assert "hold a lock around nspec.task" in str(in_thread(lambda: switch(model)))
    assert fc1.task == "en-de"
    nspec.set_task(model, None)
    assert not isinstance(in_thread(lambda: switch(model)), Exception)


def test_what_a_thread_that_has_ended_set_may_be_switched() -> None:
    model = specialised()
    in_thread(lambda: nspec.set_task(model, "en-de"))
    assert model.model.encoder.layers[0].fc1.task == "en-de"
    nspec.set_task(model, "de-en")
    assert model.model.encoder.layers[0].fc1.task == "de-en"


def test_copies_and_merged_models_belong_to_no_thread() -> None:
    model = specialised()
    with nspec.task(model, "en-de"):
        want, copy, merged = logits(model), pickle.loads(pickle.dumps(model)), nspec.merge(model, "en-de")
    assert torch.equal(in_thread(lambda: logits(copy)), want)
    torch.testing.assert_close(in_thread(lambda: logits(merged)), want)


def test_a_backward_pass_may_compute_again_in_another_thread() -> None:
    """Autograd runs what is on a device in a thread of its own; here the whole backward pass is in one."""
    found = []
    for run in (lambda work: work(), in_thread):
        model = m2m100()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        nspec.specialize(model.train(), masks_for(model))
        with nspec.task(model, "en-de"):
            loss = model(**batch()).loss
            run(loss.backward)
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_blocks_that_end_in_another_order_than_they_began_leave_no_task() -> None:
    model = specialised()
    fc1 = model.model.encoder.layers[0].fc1
    nspec.set_task(model, "en-de")
    first, second, third = (
        nspec.task(model, "de-en"),
        nspec.task(model, None),
        nspec.task(model, ["en-de", "de-en", "en-de"]),
    )
    for block in (first, second, third):
        block.__enter__()
    second.__exit__(None, None, None)
    assert fc1.task == ("en-de", "de-en", "en-de")
    first.__exit__(None, None, None)
    assert fc1.task == ("en-de", "de-en", "en-de")
    third.__exit__(None, None, None)
    assert fc1.task == "en-de"


def test_a_switch_in_the_middle_of_a_pass_of_another_thread_is_an_error_there() -> None:
    model = specialised()
    middle, switched, found = threading.Event(), threading.Event(), []

    def wait(*_: Any) -> None:
        if threading.current_thread().name == "other":
            middle.set()
            switched.wait(20)

    model.model.decoder.layers[0].register_forward_pre_hook(wait)
    for task in ("en-de", None):
        middle.clear(), switched.clear()
        nspec.set_task(model, task)
        thread = threading.Thread(target=lambda: found.append(in_same_thread(lambda: logits(model))), name="other")
        thread.start()
        assert middle.wait(20)
        nspec.set_task(model, "de-en")
        switched.set()
        thread.join()
        assert "in the middle of a pass when another thread switched" in str(found[-1])
    assert torch.equal(in_thread(lambda: logits(model)), logits(model))  # a pass that begins afterwards


def in_same_thread(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except RuntimeError as error:
        return error


def test_tasks_of_asyncio_are_right_or_refused() -> None:
    import asyncio

    model = specialised()
    want = {}
    for task in ("en-de", "de-en"):
        with nspec.task(model, task):
            want[task] = logits(model)

    async def serve(task: str) -> Any:
        try:
            with nspec.task(model, task):
                await asyncio.sleep(0)
                return torch.equal(logits(model), want[task])
        except RuntimeError as error:
            return str(error)

    async def several() -> list[Any]:
        return await asyncio.gather(*(serve(task) for task in ("en-de", "de-en", "en-de")))

    found = asyncio.run(several())
    assert found[0] is True
    assert all("of asyncio) switches it now" in one for one in found[1:])
    assert model.model.encoder.layers[0].fc1.task is None
