"""Training in fp16: which steps loss scaling skips, and what becomes of them.

The GPU's scaler is stood in for by that of the CPU, whose autocast knows fp16 too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.amp import GradScaler
from toy_translation import TASKS, Toy, last, rows, run_options, same_bits

from nspec.mt.text.batches import TaskBatchSampler
from nspec.mt.training import checkpoints, loop
from nspec.mt.training import train as training
from nspec.mt.training.config import TrainConfig
from nspec.mt.training.loop import TrainingDiverged, build_optimizer
from nspec.mt.training.precision import precision_note, resolve_precision

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS: dict[str, Any] = {"precision": "fp16", "log_every": 1}


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> list[GradScaler]:
    """Trainings on the CPU in fp16 with a loss scale of 1024; the scalers that were made."""
    return scale(monkeypatch)


def scale(monkeypatch: pytest.MonkeyPatch) -> list[GradScaler]:
    """What the fixture does, once more after its patches were undone."""
    made: list[GradScaler] = []

    def scaler(device: str, enabled: bool) -> GradScaler:
        made.append(GradScaler(device, init_scale=1024.0, growth_interval=4, enabled=enabled))
        return made[-1]

    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    monkeypatch.setattr(training, "resolve_precision", lambda precision, *_: precision)
    return made


def overflowing(monkeypatch: pytest.MonkeyPatch, *updates: int) -> None:
    """Makes the gradient of these updates infinite, the loss stays as it is."""
    smoothed, calls = loop.label_smoothed_loss, iter(range(1, 10**6))

    def spoiled(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
        if next(calls) in updates:
            logits.register_hook(lambda gradient: gradient * math.inf)
        return smoothed(logits, *rest)

    monkeypatch.setattr(loop, "label_smoothed_loss", spoiled)


def note_weights(monkeypatch: pytest.MonkeyPatch, after: dict[int, dict[str, torch.Tensor]]) -> None:
    """Copies the weights after each update."""
    update = loop.Loop._update

    def noting(self: Any) -> None:
        update(self)
        after[self.progress.step] = {name: value.clone() for name, value in self.model.state_dict().items()}

    monkeypatch.setattr(loop.Loop, "_update", noting)


def test_fp16_trains_as_fp32_does_to_rounding(toy: Toy, scaled: list[GradScaler]) -> None:
    folder = toy.train("fp16", **OPTIONS)
    (made,) = scaled
    assert made.get_scale() == 1024.0 * 2 ** (12 // 4)  # it grew, so it was in use
    half, whole = (rows(each)[-1]["valid_loss"] for each in (folder, toy.train("fp32 beside", log_every=1)))
    assert half != whole
    assert half == pytest.approx(whole, rel=0.02)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["precision"], summary["skipped_updates"]) == ("fp16", 0)


def test_gradients_are_clipped_after_they_are_unscaled(toy: Toy, scaled: list[GradScaler]) -> None:
    """Scaled ones would be 1024 times as long, and clipped to nothing."""
    half, whole = (
        rows(toy.train(f"clipped {precision}", updates=2, clip_norm=0.5, log_every=1, precision=precision))
        for precision in ("fp16", "fp32")
    )
    assert half[0]["grad_norm"] == pytest.approx(whole[0]["grad_norm"], rel=0.02)
    assert half[1]["loss"] == pytest.approx(whole[1]["loss"], rel=0.01)


@pytest.mark.parametrize("optimizer", ["adamw", "row_sparse_adamw"])
def test_an_overflow_is_skipped_counted_and_said_and_the_schedule_waits(
    toy: Toy, scaled: list[GradScaler], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    before: dict[int, dict[str, torch.Tensor]] = {}
    note_weights(monkeypatch, before)
    overflowing(monkeypatch, 2, 3)
    folder = toy.train(f"overflow {optimizer}", mode="update", optimizer=optimizer, updates=5, valid_every=5, **OPTIONS)
    for skipped in (2, 3):
        assert all(torch.equal(value, before[skipped - 1][name]) for name, value in before[skipped].items())
    assert any(not torch.equal(value, before[3][name]) for name, value in before[4].items())
    log = [row for row in rows(folder) if "loss" in row]
    assert [row["skipped"] for row in log] == [0, 1, 2, 2, 2]
    assert [row["loss_scale"] for row in log] == [1024.0, 512.0, 256.0, 256.0, 256.0]
    assert [row["grad_norm"] is None for row in log] == [False, True, True, False, False]
    rates = [row["lr"] / 6e-3 * 20 for row in log]
    assert rates == pytest.approx([1, 2, 2, 2, 3])  # the update after an overflow has the rate that it would have had
    assert json.loads((folder / "summary.json").read_text())["skipped_updates"] == 2


def test_skipped_updates_are_said_at_each_validation(
    toy: Toy, scaled: list[GradScaler], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    overflowing(monkeypatch, 3)
    config = toy.config(updates=4, **OPTIONS)
    training.train_system("dense", config.train, toy.data, toy.model(), toy.folder / "said", **run_options(config))
    assert "1 updates skipped by loss scaling" in capfd.readouterr().err


def test_the_rows_of_a_skipped_step_are_forgotten(
    toy: Toy, scaled: list[GradScaler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step moves the rows of its own direction alone."""
    after: dict[int, dict[str, torch.Tensor]] = {}
    note_weights(monkeypatch, after)
    train, masks = toy.config().train, toy.masks()
    plan = TaskBatchSampler(toy.data, "train", train.batch_tokens, train.temperature, 8, seed=1).plan.tolist()
    step = next(step for step in range(2, 8) if plan[step - 1] != plan[step])
    overflowing(monkeypatch, step)
    toy.train("forgotten", mode="update", optimizer="row_sparse_adamw", updates=step + 1, weight_decay=0.1, **OPTIONS)
    kept = masks[TASKS[plan[step]]]
    for layer in masks.layers:
        moved = (after[step + 1][f"{layer}.weight"] != after[step][f"{layer}.weight"]).any(1)
        assert torch.equal(moved, kept[layer])


@pytest.mark.parametrize("optimizer", ["adamw", "row_sparse_adamw"])
def test_an_interrupted_training_goes_on_bit_for_bit_with_its_scale(
    toy: Toy, scaled: list[GradScaler], monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    options: dict[str, Any] = {"mode": "forward", "optimizer": optimizer, "valid_every": 3, **OPTIONS}
    overflowing(monkeypatch, 2, 3)
    folder = toy.train(f"first half {optimizer}", updates=6, **options)
    state = torch.load(last(folder) / "scaler.pt", weights_only=True)
    assert (state["scale"], state["_growth_tracker"]) == (256.0, 3)
    assert checkpoints.TrainingState.read(last(folder)).skipped == 2
    monkeypatch.undo()
    scale(monkeypatch)
    toy.train(folder.name, updates=9, **options)
    overflowing(monkeypatch, 2, 3)
    straight = toy.train(f"in one {optimizer}", updates=9, **options)
    assert rows(folder) == rows(straight)
    assert same_bits(last(folder), last(straight))


def test_overflows_without_end_are_an_error(
    toy: Toy, scaled: list[GradScaler], monkeypatch: pytest.MonkeyPatch
) -> None:
    overflowing(monkeypatch, *range(3, 100))
    with pytest.raises(
        TrainingDiverged, match="overflows in fp16 for 31 updates in a row, now at a loss scale of .*bf16"
    ):
        toy.train("no end", updates=60, valid_every=60, **OPTIONS)


def test_a_loss_that_is_not_finite_is_an_error_at_once(
    toy: Toy, scaled: list[GradScaler], monkeypatch: pytest.MonkeyPatch
) -> None:
    smoothed = loop.label_smoothed_loss
    monkeypatch.setattr(loop, "label_smoothed_loss", lambda *rest: smoothed(*rest) * math.nan)
    with pytest.raises(
        TrainingDiverged, match="update 1: the loss of a batch of ..-.. is nan.* or precision bf16 or fp32"
    ):
        toy.train("nan", **OPTIONS)


def test_fp16_on_a_cpu_is_an_error_before_anything_is_written(toy: Toy) -> None:
    toy.data  # noqa: B018
    with pytest.raises(ValueError, match="precision is fp16 and the device is the CPU"):
        toy.train("on a cpu", precision="fp16")
    assert not (toy.folder / "on a cpu").exists()


@pytest.mark.parametrize(("major", "auto"), [(7, "fp32"), (8, "bf16"), (9, "bf16")])
def test_emulated_bfloat16_is_not_chosen_and_said(monkeypatch: pytest.MonkeyPatch, major: int, auto: str) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or major >= 8
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    gpu = torch.device("cuda")
    assert resolve_precision("auto", gpu, 512) == auto
    for chosen in ("bf16", "fp16", "fp32"):
        assert resolve_precision(chosen, gpu, 512) == chosen
    notes = {precision: precision_note(precision, gpu) for precision in ("auto", "bf16", "fp16", "fp32")}
    assert all(notes[precision] is None for precision in ("fp16", "fp32"))
    if auto == "bf16":
        assert notes["auto"] is notes["bf16"] is None
    else:
        assert "Tesla T4" in str(notes["auto"])
        assert "auto is fp32 there" in str(notes["auto"])
        assert "emulation, which is slow" in str(notes["bf16"])
    assert precision_note("auto", torch.device("cpu")) is None


def test_with_loss_scaling_a_step_is_skipped_where_it_is_seen(tmp_path: Path) -> None:
    """PyTorch's fused AdamW takes every step and skips within, so that the schedule would go on."""
    model = torch.nn.Linear(3, 3)
    fused, plain = (build_optimizer(model, TrainConfig(precision=precision)) for precision in ("fp32", "fp16"))
    assert getattr(fused, "_step_supports_amp_scaling", False)
    assert not getattr(plain, "_step_supports_amp_scaling", False)
