from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nspec.mt import checkpoints
from nspec.mt.checkpoints import Progress, TrainingLog, read_log


def checkpoint(folder: Path, step: int, *, whole: bool = True, **progress: object) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("weights")
    if whole:
        checkpoints.finish(path, Progress(step=step, **progress))  # type: ignore[arg-type]
    return path


def test_a_checkpoint_whose_marker_is_missing_is_not_resumed_from(tmp_path: Path) -> None:
    older = checkpoint(tmp_path, 90)
    newer = checkpoint(tmp_path, 100)
    checkpoint(tmp_path, 110, whole=False)
    (tmp_path / "checkpoint-x").mkdir()
    assert checkpoints.whole(tmp_path) == [older, newer]  # by number, not by name
    assert checkpoints.whole(tmp_path / "nothing") == []


def test_all_but_the_kept_checkpoints_are_deleted(tmp_path: Path) -> None:
    kept = [checkpoint(tmp_path, 1), checkpoint(tmp_path, 3)]
    checkpoint(tmp_path, 2)
    checkpoint(tmp_path, 4, whole=False)
    checkpoints.keep_only(tmp_path, kept)
    assert sorted(tmp_path.iterdir()) == kept


def test_a_kill_while_a_checkpoint_is_deleted_leaves_a_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path, 5)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.remove(path)
    assert path.is_dir()
    assert checkpoints.whole(tmp_path) == []


def test_progress_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 7, window_loss=math.pi * 1e5, best_value=0.1 + 0.2, seconds=1 / 3, options={"lr": 5e-4})
    read = Progress.read(path)
    assert read.window_loss == math.pi * 1e5
    assert read.best_value == 0.1 + 0.2
    assert read == Progress(7, 0, 1 / 3, math.pi * 1e5, best_value=0.1 + 0.2, options={"lr": 5e-4})


def test_opening_the_log_cuts_off_what_follows_the_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    for step in (5, 10, 15):
        log.write({"step": step, "loss": step / 7})
    log.write({"step": 10, "valid_loss": 1.5, "valid_bleu": None, "tasks": {"en-de": {"loss": 1.5, "bleu": None}}})
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 20, "lo')
    TrainingLog(tmp_path, 10).close()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 10, 10]
    assert rows[0] == {"step": 5, "loss": 5 / 7}


def test_a_broken_line_inside_the_log_is_an_error_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl line 2 is not JSON"):
        read_log(tmp_path / "log.jsonl")


def test_the_tensorboard_log_has_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TrainingLog(tmp_path, 0)
    log.write({"step": 5, "updates": 5, "loss": 2.5, "lr": 1e-3})
    log.write({"step": 5, "valid_loss": 2.25, "valid_bleu": 7.5, "tasks": {"en-de": {"loss": 2.25, "bleu": 7.5}}})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert found == pytest.approx(
        {
            "train/loss": 2.5,
            "train/lr": 1e-3,
            "valid/loss": 2.25,
            "valid/bleu": 7.5,
            "valid_loss/en-de": 2.25,
            "valid_bleu/en-de": 7.5,
        }
    )
