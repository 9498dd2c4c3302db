"""Switching tasks: nested, through wrappers, and with clear errors."""

from __future__ import annotations

import warnings

import accelerate
import numpy as np
import pytest
import torch
from models import batch, m2m100, masks_for
from torch import nn

import nspec
from nspec.baselines.adapters import TaskAdapters, add_adapters
from nspec.specialization.tasks import task_by_layer


def test_the_task_before_comes_back_also_after_an_error() -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model))
    fc1 = model.model.encoder.layers[0].fc1
    nspec.set_task(model, "de-en")
    with pytest.raises(KeyError), nspec.task(model, "en-de"):
        assert fc1.task == "en-de"
        with nspec.task(model, None):
            assert fc1.task is None
        assert fc1.task == "en-de"
        raise KeyError
    assert fc1.task == "de-en"


def test_an_unknown_task_is_an_error_that_names_the_nearest_and_changes_nothing() -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model))
    nspec.set_task(model, "de-en")
    with pytest.raises(ValueError, match=r"no masks of task 'en-dd'; known: en-de"):
        nspec.set_task(model, "en-dd")
    assert model.model.encoder.layers[0].fc1.task == "de-en"
    with pytest.raises(TypeError, match="expected the name of a task, its number or None"):
        nspec.set_task(model, 0.5)


def test_a_model_without_masks_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"is not specialised: call nspec.specialize"):
        nspec.set_task(m2m100(), "en-de")


def test_it_reaches_through_wrappers() -> None:
    model = m2m100(torch.float32)
    nspec.specialize(model, masks_for(model))
    wrapped = torch.nn.DataParallel(model)  # on a CPU it only forwards
    with nspec.task(wrapped, "en-de"):
        inside = wrapped(**batch()).loss
    with nspec.task(model, "en-de"):
        assert torch.equal(inside, model(**batch()).loss)


def test_each_layer_can_have_a_task_of_its_own() -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model))
    tasks = {f"model.{side}.layers.{i}.fc1": t for side, t in (("encoder", "de-en"), ("decoder", None)) for i in (0, 1)}
    with nspec.task(model, "en-de"):
        with task_by_layer(model, tasks.__getitem__):
            assert {name: model.get_submodule(name).task for name in tasks} == tasks
        assert {model.get_submodule(name).task for name in tasks} == {"en-de"}


def test_a_layer_that_does_not_know_its_task_leaves_all_as_they_were() -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model))
    nspec.set_task(model, "de-en")
    last = "model.decoder.layers.1.fc1"
    with pytest.raises(ValueError, match="no masks of task 'xx'"), task_by_layer(model, {last: "xx"}.get):
        pass
    assert model.model.encoder.layers[0].fc1.task == "de-en"
    with pytest.raises(ValueError, match="is not specialised"), task_by_layer(m2m100(), lambda name: None):
        pass


@pytest.mark.parametrize("mode", ["forward", "update"])
def test_training_without_a_task_is_warned_of_once_for_a_model(mode: str, recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")  # Python itself would show it once for both models
    model, other = m2m100(torch.float32), m2m100(torch.float32)
    for each in (model, other):
        nspec.specialize(each, masks_for(each), mode=mode)
    with nspec.task(model, "en-de"):
        model(**batch()).loss.backward()
    with nspec.task(model, None):  # said so
        model(**batch()).loss.backward()
    with torch.no_grad():
        model(**batch())
    model.eval()(**batch())
    assert not [w for w in recwarn if "specialised" in str(w.message)]
    for each in (model, model, other):
        each.train()(**batch()).loss.backward()
    told = [str(w.message) for w in recwarn if "without a task" in str(w.message)]
    assert len(told) == 2
    assert all("model.encoder.layers.0.fc1" in text and "nspec.task(model, name)" in text for text in told)


def test_tasks_are_given_by_their_numbers_too() -> None:
    model = m2m100()
    masks = masks_for(model, ("en-de", "de-en", "de-fr"))
    nspec.specialize(model, masks)
    fc1 = model.model.encoder.layers[0].fc1
    for given in (1, torch.tensor(1), np.int64(1)):
        with nspec.task(model, given):
            assert fc1.task == masks.tasks[1] == "de-en"
    for several in ([2, 0], torch.tensor([2, 0]), np.array([2, 0]), [torch.tensor(2), "en-de"]):
        with nspec.task(model, several):
            assert fc1.task == ("de-fr", "en-de")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, ValueError, "task is 3, expected a number from 0 to 1"),
        ([0, -1], ValueError, "the task of sentence 1 is -1, expected a number from 0 to 1"),
        (True, TypeError, "task is True, expected the name of a task, its number"),
        (torch.tensor([True, False]), TypeError, "the task of sentence 0 is True"),
        (torch.tensor([0.0, 1.0]), TypeError, "the task of sentence 0 is 0.0"),
        (torch.tensor([[0], [1]]), TypeError, r"the task of sentence 0 is \[0\]"),
        ([], ValueError, "the list of tasks is empty"),
        ({"en-de"}, TypeError, "task is {'en-de'}, expected"),
    ],
)
def test_what_is_no_task_is_an_error_that_shows_it(given: object, error: type[Exception], message: str) -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model))
    with pytest.raises(error, match=message):
        nspec.set_task(model, given)
    assert model.model.encoder.layers[0].fc1.task is None


def test_numbers_are_refused_where_layers_count_their_tasks_differently() -> None:
    model = m2m100()
    nspec.specialize(model, masks_for(model))
    add_adapters(model, {"de-en": "de-en", "en-de": "en-de"}, bottleneck=2)
    with nspec.task(model, "de-en"), pytest.raises(ValueError, match="count them differently: give its name"):
        nspec.set_task(model, 1)


@pytest.mark.parametrize("mode", ["forward", "update"])
def test_sentences_without_a_task_are_computed_by_the_dense_model(mode: str) -> None:
    model, data, tasks = m2m100(), batch(), ["en-de", None, "de-en"]
    nspec.specialize(model, masks_for(model), mode=mode)

    def run(task: object, rows: slice) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        with nspec.task(model, task):
            logits = model(**{name: value[rows] for name, value in data.items()}).logits
        logits.square().mean((1, 2)).sum().backward()
        return logits, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together, gradients = run(tasks, slice(3))
    apart = [run(task, slice(i, i + 1)) for i, task in enumerate(tasks)]
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in apart]), rtol=0, atol=1e-10)
    for found, *parts in zip(gradients, *(each for _, each in apart)):
        torch.testing.assert_close(found, sum(parts), rtol=0, atol=1e-10)
    assert torch.equal(run([None, None, None], slice(3))[0], run(None, slice(3))[0])


def test_layers_that_cannot_leave_out_single_sentences_say_so() -> None:
    adapters = TaskAdapters(8, {"a": "a"}, bottleneck=2)
    with pytest.raises(ValueError, match="some sentences have the task None, and TaskAdapters layers take either"):
        nspec.set_task(adapters, ["a", None])


def test_a_task_that_is_set_while_accelerate_fetches_a_batch_is_an_error() -> None:
    # It fetches one ahead: each pass would have the task of the next batch.
    model, rows = m2m100(torch.float32), batch()
    nspec.specialize(model, masks_for(model))

    def collate(tasks: list[str]) -> dict[str, torch.Tensor]:
        nspec.set_task(model, tasks[0])
        return rows

    own = torch.utils.data.DataLoader(["en-de", "de-en"], collate_fn=collate, batch_size=1)
    for one in own:
        model(**one)  # this one fetches nothing ahead
    with pytest.raises(RuntimeError, match="the task is that of the next batch"):
        for one in accelerate.Accelerator(cpu=True).prepare(own):
            model(**one)
    nspec.set_task(model, "en-de")
    model(**rows)


class ReadsWeights(nn.Module):
    def __init__(self, *calls: bool) -> None:
        super().__init__()
        self.calls = calls
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(4, 40), "fc2": nn.Linear(40, 4)}) for _ in calls)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block, calls in zip(self.blocks, self.calls):
            h = block["fc1"](x) if calls else nn.functional.linear(x, block["fc1"].weight, block["fc1"].bias)
            x = block["fc2"](h.relu())
        return x


def reading(*calls: bool) -> nn.Module:
    masks = {f"blocks.{i}.fc1": torch.arange(40) < 20 for i in range(len(calls))}
    return nspec.specialize(ReadsWeights(*calls), nspec.NeuronMasks({"a": masks}))


def uncalled(warned: pytest.WarningsRecorder) -> list[str]:
    return [str(one.message) for one in warned if "were never called" in str(one.message)]


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("calls", [(False, False), (True, False), (True, True)])
def test_layers_whose_weight_is_read_instead_of_calling_them_are_warned_of_once(
    calls: tuple[bool, ...], trains: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """In the first block with gradients, else in the eighth."""
    model, first = reading(*calls), None
    for passes in range(1, 12):
        with nspec.task(model, "a"):
            y = model(torch.randn(3, 4))
            if trains:
                y.sum().backward()
        first = first or (passes if uncalled(recwarn) else None)
    told = uncalled(recwarn)
    assert (first, len(told)) == ((None, 0) if all(calls) else (1 if trains else 8, 1))
    if told:
        assert f"{calls.count(False)} of 2" in told[0]
        assert f"the first is blocks.{calls.index(False)}.fc1" in told[0]


def test_they_are_warned_of_by_set_task_too_and_whatever_else_was_compiled(recwarn: pytest.WarningsRecorder) -> None:
    model = reading(False)
    torch._dynamo.utils.counters["frames"]["total"] += 1
    nspec.set_task(model, "a")
    model(torch.randn(3, 4)).sum().backward()
    assert not uncalled(recwarn)
    nspec.set_task(model, None)
    assert len(uncalled(recwarn)) == 1


def test_compiled_layers_are_not_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    model = reading(True)
    compiled = torch.compile(model, backend="eager")
    with nspec.task(model, "a"):
        compiled(torch.randn(3, 4)).sum().backward()
    assert not uncalled(recwarn)


@pytest.mark.parametrize("written", ["linear", "matmul"])
def test_activations_times_the_weight_that_gave_them_are_refused(written: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(4, 40), nn.Linear(40, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.fc1(x).relu()
            return h @ self.fc1.weight if written == "matmul" else nn.functional.linear(h, self.fc1.weight.t())

    model = nspec.specialize(Tied(), nspec.NeuronMasks({"a": {"fc1": torch.arange(40) < 20}}))
    for grad in (True, False):
        with nspec.task(model, "a"), torch.set_grad_enabled(grad), pytest.raises(ValueError, match="fc1.weight again"):
            model(torch.randn(3, 4))
