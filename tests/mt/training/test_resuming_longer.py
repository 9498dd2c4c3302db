"""A finished training that goes on, through kills and damage, ends as one that was asked for more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from damage import damaged_copy, flip, interrupt
from toy_translation import Toy, same_bits

from nspec.mt.training import checkpoints, loop
from nspec.mt.training import train as training


def losses_by_step(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Makes a validation after an update give this loss; 9 after others."""
    measure, validate, now = training.Validator.measure, loop.Loop._validate, [0]

    def validating(self: Any, extra: bool) -> None:
        now[0] = self.progress.step
        validate(self, extra)

    monkeypatch.setattr(loop.Loop, "_validate", validating)
    monkeypatch.setattr(
        training.Validator, "measure", lambda self: {**measure(self), "valid_loss": losses.get(now[0], 9.0)}
    )


def summary_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "summary.json").read_text())
    return {
        key: value
        for key, value in found.items()
        if key not in ("train_seconds", "tokens_per_second", "peak_memory_bytes", "system")
    }


LOSSES = {4: 3.0, 8: 2.0, 12: 2.5, 14: 1.0, 16: 2.5, 18: 2.5}


def test_a_training_goes_on_again_and_again_from_ends_between_validations(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best weights on the grid are of long ago, and the model was that of an end which a longer training has not."""
    losses_by_step(monkeypatch, LOSSES)
    bests = []
    for updates in (12, 14, 17, 18):
        folder = toy.train("again and again", updates=updates)
        bests.append(summary_of(folder)["best_step"])
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        assert names == {"checkpoint-8", f"checkpoint-{bests[-1]}", f"checkpoint-{updates}"}
    assert bests == [8, 14, 8, 8]
    straight = toy.train("at once", updates=18)
    assert summary_of(folder) == summary_of(straight)
    assert same_bits(folder / "model", straight / "model")


def test_a_kill_between_a_longer_trainings_model_and_its_summary_mixes_no_two(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_by_step(monkeypatch, LOSSES)
    folder = toy.train("torn", updates=12)
    write_json = training.write_json
    monkeypatch.setattr(training, "write_json", lambda path, value: interrupt())
    with pytest.raises(KeyboardInterrupt):
        toy.train("torn", updates=14)
    monkeypatch.setattr(training, "write_json", write_json)
    assert summary_of(folder)["best_step"] == 8
    straight = toy.train("not torn", updates=16)
    assert not same_bits(folder / "model", straight / "model")
    toy.train("torn", updates=16)
    assert summary_of(folder) == summary_of(straight)
    assert same_bits(folder / "model", straight / "model")


def test_a_model_that_its_summary_is_not_of_is_written_anew_from_the_best_checkpoint(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_by_step(monkeypatch, LOSSES)
    folder = toy.train("flipped model", updates=12)
    right = (folder / "model" / "model.safetensors").read_bytes()
    for updates in (12, 13):
        flip(folder / "model" / "model.safetensors")
        toy.train("flipped model", updates=updates)
        assert (folder / "model" / "model.safetensors").read_bytes() == right
    shutil.rmtree(folder / "checkpoints")
    flip(folder / "model" / "model.safetensors")
    with pytest.raises(ValueError, match=r"the weights in .*model are not those that .*summary\.json is of"):
        toy.train("flipped model", updates=13)


@pytest.mark.parametrize("damaged", [False, True])
def test_best_weights_that_are_in_the_model_alone_are_taken_from_it_if_they_are_whole(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """Older versions kept the last checkpoint only."""
    losses_by_step(monkeypatch, LOSSES)
    folder = toy.train(f"older {damaged}", updates=12)
    shutil.rmtree(folder / "checkpoints" / "checkpoint-8")
    if damaged:
        flip(folder / "model" / "model.safetensors")
        before = sorted(folder.rglob("*"))
        with pytest.raises(ValueError, match="model has other weights than were written"):
            toy.train(folder.name, updates=16)
        assert sorted(folder.rglob("*")) == before
        return
    for updates in (14, 16):
        toy.train(folder.name, updates=updates)
    assert same_bits(folder / "model", toy.train("newer", updates=16) / "model")


def test_a_state_whose_best_value_was_changed_is_not_gone_on_from(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    folder = damaged_copy(toy, "believed")
    state = folder / "checkpoints" / "checkpoint-8" / "nspec_state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"best_value": 0.001}))
    toy.train(folder.name, mode="forward")
    assert "nspec_state.json has other contents than were written; training goes on from checkpoint-4" in caplog.text
    assert summary_of(folder)["best_value"] > 0.001


@pytest.mark.parametrize("lost", ["last", "all"])
def test_rows_that_the_log_lost_are_one_warning(toy: Toy, caplog: pytest.LogCaptureFixture, lost: str) -> None:
    folder = damaged_copy(toy, f"rows lost {lost}")
    log = folder / "log.jsonl"
    lines = [line for line in log.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= 8]
    log.write_text("".join(lines[:-1])) if lost == "last" else log.unlink()
    toy.train(folder.name, mode="forward")
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert f"lacks {1 if lost == 'last' else len(lines)} of the {len(lines)} rows that it had at update 8" in warning


def test_old_checkpoints_are_gone_after_a_kill_behind_the_summary(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_end = checkpoints.keep_end
    monkeypatch.setattr(checkpoints, "keep_end", lambda folder: interrupt())
    with pytest.raises(KeyboardInterrupt):
        toy.train("not tidied")
    monkeypatch.setattr(checkpoints, "keep_end", keep_end)
    folder = toy.train("not tidied")
    assert len(checkpoints.whole(folder / "checkpoints")) == 1


def test_the_model_that_a_kill_left_aside_is_put_back(toy: Toy) -> None:
    folder = toy.train("aside", updates=4)
    shutil.rmtree(folder / "checkpoints")  # so that nothing but it is left
    (folder / "model").rename(folder / ".model.old")
    (folder / ".model.part").mkdir()
    toy.train("aside", updates=4)
    assert (folder / "model" / "model.safetensors").is_file()
    assert not (folder / ".model.old").exists()
