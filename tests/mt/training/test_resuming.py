"""What a training survives: kills, SIGTERM, a full disk, a loss that is not finite."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import cut, damaged_copy, flip, interrupt
from safetensors import SafetensorError
from toy_translation import Toy, last, rows, same_bits

from nspec import files
from nspec.mt.training import checkpoints, loop
from nspec.mt.training import train as training
from nspec.mt.training.loop import TrainingDiverged

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_training_killed_at_any_time_ends_as_an_undisturbed_one(toy: Toy) -> None:
    job: dict[str, Any] = {"mode": "forward", "updates": 60, "valid_every": 7, "log_every": 5, "accumulate": 2}
    undisturbed = toy.train("undisturbed", **job)
    killed = toy.folder / "killed"
    for step in (7, 35):
        process = toy.start("killed", **job)
        wait_for(killed / "checkpoints" / f"checkpoint-{step}" / "model.safetensors", process)
        process.kill()  # while this checkpoint or what follows is being written
        process.communicate()
        assert not (killed / "summary.json").exists()
    partial = killed / "checkpoints" / "checkpoint-59"
    partial.mkdir()
    (partial / "model.safetensors").write_text("torn")
    toy.train("killed", **job)
    assert rows(killed) == rows(undisturbed)
    assert same_bits(killed / "model", undisturbed / "model")
    assert same_bits(last(killed), last(undisturbed))
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in (killed, undisturbed))
    for key in ("updates", "tokens", "best_step", "best_value", "density"):
        assert a[key] == b[key]


@pytest.mark.parametrize(  # every two of the three together
    ("mode", "optimizer", "tasks_per_batch"),
    [
        ("forward", "adamw", 1),
        ("forward", "row_sparse_adamw", 3),
        ("update", "adamw", 3),
        ("update", "row_sparse_adamw", 1),
    ],
)
def test_an_interrupted_training_goes_on_bit_for_bit(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, mode: str, optimizer: str, tasks_per_batch: int
) -> None:
    name = f"{mode} {optimizer} {tasks_per_batch}"
    options: dict[str, Any] = {"mode": mode, "optimizer": optimizer, "tasks_per_batch": tasks_per_batch}
    measure = training.Validator.measure
    calls = 0

    def interrupted(validator: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return measure(validator)

    monkeypatch.setattr(training.Validator, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy.train(name, **options)
    monkeypatch.undo()
    torch.rand(7)  # the state of the generator must come from the checkpoint
    interrupted_one = toy.train(name, **options)
    straight = toy.train(f"straight {name}", **options)
    assert rows(interrupted_one) == rows(straight)
    assert same_bits(last(interrupted_one), last(straight))


def wait_for(path: Path, process: Any) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_sigterm_saves_a_checkpoint_from_which_training_goes_on(toy: Toy) -> None:
    toy.data  # noqa: B018
    job: dict[str, Any] = {"updates": 3000, "valid_every": 3000, "log_every": 5}
    process = toy.start("terminated", **job)
    log = toy.folder / "terminated" / "log.jsonl"
    wait_for(log, process)
    while not log.read_text().count("\n") > 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    step = checkpoints.TrainingState.read(last(toy.folder / "terminated")).step
    assert step % 3000 != 0
    assert rows(toy.folder / "terminated")[-1]["step"] <= step
    job |= {"updates": step + 3}
    toy.train("terminated", **job)
    assert rows(toy.folder / "terminated")[-1]["step"] == step + 3


def test_a_loss_that_is_not_finite_stops_before_the_update(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    smoothed = loop.label_smoothed_loss
    calls = 0

    def spoiled(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return smoothed(*args) * (math.nan if calls == 12 else 1.0)

    monkeypatch.setattr(loop, "label_smoothed_loss", spoiled)
    with pytest.raises(
        TrainingDiverged, match=r"update 6: the loss of a batch of ..-.. is nan.*learning rate of 0.0018"
    ):
        toy.train("diverged", accumulate=2)
    monkeypatch.undo()
    assert [path.name for path in checkpoints.whole(toy.folder / "diverged" / "checkpoints")] == ["checkpoint-4"]
    folder = toy.train("diverged", accumulate=2)
    assert rows(folder) == rows(toy.train("converged", accumulate=2))


def test_an_infinite_gradient_stops_too(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    smoothed = loop.label_smoothed_loss

    def spoiled(logits: torch.Tensor, *args: Any) -> torch.Tensor:
        logits.register_hook(lambda gradient: gradient * math.inf)
        return smoothed(logits, *args)

    monkeypatch.setattr(loop, "label_smoothed_loss", spoiled)
    with pytest.raises(TrainingDiverged, match="norm of the gradient is (nan|inf)"):
        toy.train("exploded")


@pytest.mark.parametrize("kind", ["from safetensors", "from torch", "from the system"])
def test_a_full_disk_while_a_checkpoint_is_written_leaves_the_older_ones(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name = f"full disk {kind}"
    save = torch.save
    error = {
        "from safetensors": SafetensorError("I/O error: No space left on device"),
        "from torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        "from the system": OSError(28, "No space left on device"),
    }[kind]
    usage = shutil.disk_usage(toy.folder)._replace(free=5000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)

    def full(value: Any, path: Any) -> None:
        if "checkpoint-8" in str(path):
            raise error
        save(value, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError, match=r"write .*checkpoint-8: No space left on device \(0 MiB free\); those before it are intact"
    ):
        toy.train(name)
    monkeypatch.undo()
    assert [path.name for path in checkpoints.whole(toy.folder / name / "checkpoints")] == ["checkpoint-4"]
    assert rows(toy.train(name)) == rows(toy.train("roomy"))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut": cut,
    "emptied": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
    "flipped": flip,
}


@pytest.mark.parametrize(
    ("file", "kind"),
    [("model.safetensors", "cut"), ("rng_state.pth", "emptied"), ("scheduler.pt", "gone"), ("optimizer.pt", "flipped")]
    + [("nspec_state.json", "cut"), ("nspec_state.json", "emptied")],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_gone_on_from(
    toy: Toy, caplog: pytest.LogCaptureFixture, file: str, kind: str
) -> None:
    folder = damaged_copy(toy, f"{kind} {file}")
    DAMAGES[kind](folder / "checkpoints" / "checkpoint-8" / file)
    toy.train(folder.name, mode="forward")
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert f"checkpoint-8/{file}" in warning
    assert "goes on from checkpoint-4" in warning
    assert "\n" not in warning
    straight = toy.folder / "straight for damages"
    if not straight.exists():
        toy.train(straight.name, mode="forward")
    assert rows(folder) == rows(straight)
    assert same_bits(folder / "model", straight / "model")
    assert same_bits(last(folder), last(straight))


def test_without_a_whole_checkpoint_the_error_says_what_to_delete_and_nothing_is_lost(toy: Toy) -> None:
    folder = damaged_copy(toy, "all damaged")
    for step in (4, 8):
        cut(folder / "checkpoints" / f"checkpoint-{step}" / "optimizer.pt")
    before = sorted(folder.rglob("*"))
    with pytest.raises(
        ValueError, match=r"checkpoint-8/optimizer.pt has \d+ bytes; \d+ were .*checkpoint-4/.*delete"
    ) as error:
        toy.train(folder.name, mode="forward")
    assert "\n" not in str(error.value)
    assert sorted(folder.rglob("*")) == before


def test_best_weights_that_are_damaged_are_not_taken_for_the_model(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measure = training.Validator.measure
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(
        training.Validator, "measure", lambda self: {**measure(self), "valid_loss": next(losses, None) or interrupt()}
    )
    with pytest.raises(KeyboardInterrupt):
        toy.train("bad best", updates=16)
    names = [path.name for path in checkpoints.whole(toy.folder / "bad best" / "checkpoints")]
    assert names == ["checkpoint-8", "checkpoint-12"]  # the best up to either is that of update 8
    flip(toy.folder / "bad best" / "checkpoints" / "checkpoint-8" / "model.safetensors")
    with pytest.raises(ValueError, match="checkpoint-8/model.safetensors has other contents"):
        toy.train("bad best", updates=16)
    assert not caplog.records


def test_the_best_weights_of_the_checkpoint_before_are_kept_too(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest may be the best and turn out damaged: the one before it needs the best of its time."""
    measure = training.Validator.measure
    losses = iter([1.0, 2.0, 0.5])
    monkeypatch.setattr(
        training.Validator, "measure", lambda self: {**measure(self), "valid_loss": next(losses, None) or interrupt()}
    )
    with pytest.raises(KeyboardInterrupt):
        toy.train("kept best", updates=16)
    names = [path.name for path in checkpoints.whole(toy.folder / "kept best" / "checkpoints")]
    assert names == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]


@pytest.mark.parametrize(("first", "valid_every"), [(8, 4), (9, 4), (9, 3)])
def test_a_finished_training_that_goes_on_equals_one_that_was_asked_for_more(
    toy: Toy, first: int, valid_every: int
) -> None:
    """Also where the former end was between validations and lines of the log, which a longer training does not have."""
    name = f"longer {first} {valid_every}"
    options: dict[str, Any] = {"mode": "update", "valid_every": valid_every, "optimizer": "row_sparse_adamw"}
    toy.train(name, updates=first, **options)
    longer = toy.train(name, updates=15, **options)
    straight = toy.train(f"straight {name}", updates=15, **options)
    assert rows(longer) == rows(straight)
    assert same_bits(longer / "model", straight / "model")
    assert same_bits(last(longer), last(straight))
    timed = {"train_seconds", "tokens_per_second", "peak_memory_bytes", "system"}
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (longer, straight)]
    first_one, second = ({k: v for k, v in each.items() if k not in timed} for each in summaries)
    assert first_one == second


def test_a_validation_that_only_the_end_brought_does_not_pick_the_model_of_a_longer_training(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = training.Validator.measure
    losses = {4: 2.0, 8: 1.5, 9: 1.0, 12: 3.0}

    def told(validator: Any) -> Any:
        return {**measure(validator), "valid_loss": losses[told.step]}  # type: ignore[attr-defined]

    def validating(self: Any, extra: bool) -> None:
        told.step = self.progress.step  # type: ignore[attr-defined]
        validate(self, extra)

    validate = loop.Loop._validate
    monkeypatch.setattr(loop.Loop, "_validate", validating)
    monkeypatch.setattr(training.Validator, "measure", told)
    folder = toy.train("extra", updates=9)
    assert json.loads((folder / "summary.json").read_text())["best_step"] == 9
    toy.train("extra", updates=12)
    assert json.loads((folder / "summary.json").read_text())["best_step"] == 8
    straight = toy.train("without extra", updates=12)
    assert same_bits(folder / "model", straight / "model")
    assert last(folder).name == "checkpoint-12"


def test_a_training_that_stopped_early_goes_on_with_more_patience(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"lr": 0.0, "valid_every": 2}
    toy.train("patient at first", updates=20, patience=3, **options)
    caplog.clear()
    toy.train("patient at first", updates=30, patience=3, **options)
    assert "stopped early after update 8, as 3 validations" in caplog.text
    longer = toy.train("patient at first", updates=30, patience=5, **options)
    assert json.loads((longer / "summary.json").read_text())["updates"] == 12
    assert rows(longer) == rows(toy.train("more patient", updates=30, patience=5, **options))


def test_fewer_updates_than_are_done_are_an_error(toy: Toy) -> None:
    toy.train("shorter", updates=8)
    with pytest.raises(ValueError, match="a training of 8 updates; expected at least 8, found updates = 4"):
        toy.train("shorter", updates=4)


def test_a_finished_training_without_its_checkpoint_cannot_go_on(toy: Toy) -> None:
    folder = toy.train("no checkpoint", updates=4)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match="trained for 4 updates and has no checkpoint to go on from to 8"):
        toy.train("no checkpoint", updates=8)
    toy.train("no checkpoint", updates=4)


def test_a_kill_between_the_last_checkpoint_of_a_longer_training_and_its_model_loses_nothing(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.train("cut short", updates=8)
    monkeypatch.setattr(training, "save_system", lambda *_: interrupt())
    with pytest.raises(KeyboardInterrupt):
        toy.train("cut short", updates=12)
    monkeypatch.undo()
    folder = toy.train("cut short", updates=12)
    assert json.loads((folder / "summary.json").read_text())["updates"] == 12
    assert same_bits(folder / "model", toy.train("not cut short", updates=12) / "model")


@pytest.mark.slow
def test_processes_agree_on_the_checkpoint_before_a_damaged_one(toy: Toy) -> None:
    toy.data  # noqa: B018
    job: dict[str, Any] = {"mode": "forward", "accumulate": 2, "valid_every": 4}
    toy.run("two", ranks=2, updates=8, **job)
    shutil.copytree(toy.folder / "two", toy.folder / "two damaged")
    straight = toy.run("two straight", ranks=2, updates=12, **job)
    longer = toy.run("two", ranks=2, updates=12, **job)
    assert rows(longer) == rows(straight)
    assert same_bits(last(longer), last(straight))
    flip(toy.folder / "two damaged" / "checkpoints" / "checkpoint-8" / "rng_state_1.pth")
    process = toy.start("two damaged", ranks=2, updates=12, **job)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "checkpoint-8/rng_state_1.pth has other contents than were written. No checkpoint is whole" in errors


def test_sigterm_in_the_last_validation_ends_the_process_and_loses_nothing(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = toy.train("to the end")
    measure, times = training.Validator.measure, []

    def terminated(self: Any) -> Any:
        times.append(1)
        if len(times) == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # handled while a training runs
        return measure(self)

    monkeypatch.setattr(training.Validator, "measure", terminated)
    with pytest.raises(SystemExit) as ended:
        toy.train("terminated at last")
    assert ended.value.code == 143
    assert len(times) == 3
    folder = toy.train("terminated at last")
    assert len(times) == 3
    assert same_bits(folder / "model", right / "model")
