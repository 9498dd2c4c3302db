from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nspec.mt.training import checkpoints
from nspec.mt.training.checkpoints import TrainingLog, TrainingState, read_log


def checkpoint(folder: Path, step: int, *, whole: bool = True, **progress: object) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("weights")
    if whole:
        checkpoints.finish(path, TrainingState(step=step, **progress))  # type: ignore[arg-type]
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
    read = TrainingState.read(path)
    assert read.window_loss == math.pi * 1e5
    assert read.best_value == 0.1 + 0.2
    assert read == TrainingState(7, 0, 1 / 3, math.pi * 1e5, best_value=0.1 + 0.2, options={"lr": 5e-4})


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
    log.write(
        {
            "step": 5,
            "valid_loss": 2.25,
            "loss_of": "text",
            "valid_bleu": 7.5,
            "tasks": {"en-de": {"loss": 2.25, "bleu": 7.5}},
        }
    )
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


def test_a_state_that_was_changed_is_not_believed_and_one_without_checksum_is(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 7, best_value=2.5, best_step=4)
    file = path / checkpoints.STATE_FILE
    state = json.loads(file.read_text())
    for name, value in {"best_value": 2.25, "worse": 1, "without_end": {"best_step": 1}, "files": {}}.items():
        file.write_text(json.dumps(state | {name: value}))
        assert checkpoints.damage(path) == f"{file} has other contents than were written"
        with pytest.raises(ValueError, match="nspec_state.json has other contents than were written"):
            TrainingState.read(path)
    file.write_text(json.dumps(dict(reversed(state.items()))))  # in another order it says the same
    assert checkpoints.damage(path) is None
    del state["sha256"], state["log"]  # as older versions wrote it
    file.write_text(json.dumps(state))
    assert TrainingState.read(path).best_value == 2.5


def test_of_a_finished_training_the_last_checkpoint_and_the_weights_of_the_best_are_kept(tmp_path: Path) -> None:
    for step in (3, 6, 9, 11):
        checkpoint(tmp_path, step, whole=False)
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_text("twice as large")
        best = {"best_step": 9, "without_end": {"best_step": 6}} if step == 11 else {}
        checkpoints.finish(tmp_path / f"checkpoint-{step}", TrainingState(step=step, **best))  # type: ignore[arg-type]
    for _ in range(2):  # also after a kill
        checkpoints.keep_end(tmp_path)
        assert checkpoints.whole(tmp_path) == [tmp_path / "checkpoint-11"]
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-6", "checkpoint-9", "checkpoint-11"}
        assert {path.name for path in (tmp_path / "checkpoint-6").iterdir()} == {
            "model.safetensors",
            "nspec_state.json",
        }
    assert (tmp_path / "checkpoint-11" / "optimizer.pt").exists()
    assert checkpoints.damage(tmp_path / "checkpoint-6", weights=True) is None
    (tmp_path / "checkpoint-6" / "model.safetensors").write_text("Weights")
    assert "has other contents" in str(checkpoints.damage(tmp_path / "checkpoint-6", weights=True))


def test_rows_of_the_log_that_are_gone_or_others_are_told(tmp_path: Path) -> None:
    log = TrainingLog(tmp_path, 0)
    for step in (5, 10):
        log.write({"step": step, "loss": 1.0})
    log.write({"step": 10, "valid_loss": 1.5}, extra=True)
    progress = TrainingState(step=10)
    log.noted(progress)
    log.write({"step": 15, "loss": 1.0})
    log.close()
    path = tmp_path / "log.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    longer = progress.going_on()
    assert checkpoints.log_damage(tmp_path, progress) is None
    for kept in (4, 3, 2):  # the last ones are after the checkpoint, and of its end alone
        path.write_text("".join(lines[:kept]))
        assert checkpoints.log_damage(tmp_path, longer, ["valid_loss"]) is None
    path.write_text(lines[0])
    assert checkpoints.log_damage(tmp_path, longer, ["valid_loss"]) == (
        f"{path} lacks 1 of the 2 rows that it had at update 10"
    )
    path.write_text("".join([lines[0].replace("1.0", "2.0"), *lines[1:]]))
    assert checkpoints.log_damage(tmp_path, progress) == f"{path} has other rows up to update 10 than were written"
    path.unlink()
    assert checkpoints.log_damage(tmp_path, progress) == f"{path} lacks 3 of the 3 rows that it had at update 10"
    assert checkpoints.log_damage(tmp_path, TrainingState(step=10)) is None, "older versions noted nothing"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"[1]", r"'\[1\]', expected an object with a step"),
        (b"7", "expected an object with a step"),
        (b'{"loss": 1}', "expected an object with a step"),
        (b'{"step": "1"}', "expected an object with a step"),
        (b"", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_line_of_the_log_that_is_no_row_is_named(tmp_path: Path, line: bytes, what: str) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=rf"log\.jsonl line 2 .*{what}") as caught:
        read_log(tmp_path / "log.jsonl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["checkpoints", "checkpoints/checkpoint-99", "tensorboard", "model"])
def test_a_file_in_the_place_of_a_folder_is_one_clear_line(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("x")
    with pytest.raises(ValueError, match=f"{tmp_path / place} is a file, and a training has a folder there"):
        checkpoints.check_places(tmp_path)
