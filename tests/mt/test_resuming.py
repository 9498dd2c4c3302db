"""What a training survives: kills, SIGTERM, a full disk, a loss that is not finite."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from toy_translation import Toy, last, rows, same_bits

from nspec.mt import checkpoints, trainer, training
from nspec.mt.supervision import TrainingDiverged

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


@pytest.mark.parametrize("tasks_per_batch", [1, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "row_sparse_adamw"])
@pytest.mark.parametrize("mode", ["forward", "update"])
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
    step = checkpoints.Progress.read(last(toy.folder / "terminated")).step
    assert step % 3000 != 0
    assert rows(toy.folder / "terminated")[-1]["step"] <= step
    job |= {"updates": step + 3}
    toy.train("terminated", **job)
    assert rows(toy.folder / "terminated")[-1]["step"] == step + 3


def test_a_loss_that_is_not_finite_stops_before_the_update(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    smoothed = trainer.label_smoothed_loss
    calls = 0

    def spoiled(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return smoothed(*args) * (math.nan if calls == 12 else 1.0)

    monkeypatch.setattr(trainer, "label_smoothed_loss", spoiled)
    with pytest.raises(
        TrainingDiverged, match=r"update 6: the loss of a batch of ..-.. is nan.*learning rate of 0.0018"
    ):
        toy.train("diverged", accumulate=2)
    monkeypatch.undo()
    assert [path.name for path in checkpoints.whole(toy.folder / "diverged" / "checkpoints")] == ["checkpoint-4"]
    folder = toy.train("diverged", accumulate=2)
    assert rows(folder) == rows(toy.train("converged", accumulate=2))


def test_an_infinite_gradient_stops_too(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    smoothed = trainer.label_smoothed_loss

    def spoiled(logits: torch.Tensor, *args: Any) -> torch.Tensor:
        logits.register_hook(lambda gradient: gradient * math.inf)
        return smoothed(logits, *args)

    monkeypatch.setattr(trainer, "label_smoothed_loss", spoiled)
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
        "from torch": RuntimeError("PytorchStreamWriter failed writing file data/3"),
        "from the system": OSError(28, "No space left on device"),
    }[kind]

    def full(value: Any, path: Any) -> None:
        if "checkpoint-8" in str(path):
            raise error
        save(value, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write checkpoint-8 in .*; those before it are intact"):
        toy.train(name)
    monkeypatch.undo()
    assert [path.name for path in checkpoints.whole(toy.folder / name / "checkpoints")] == ["checkpoint-4"]
    assert rows(toy.train(name)) == rows(toy.train("roomy"))
