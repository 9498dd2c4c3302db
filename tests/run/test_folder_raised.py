"""A finished training that is given a later end: it goes on, and what was made from its model follows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stage_chain import STAGES, Chain, config_of

from nspec.files import read_json, write_text
from nspec.run.config import Config
from nspec.run.folder import Run

RAISABLE = ("train.updates", "train.patience")


class Trained(Chain):
    """A chain whose training can go on; its result is told."""

    def __init__(self, config: Config, result: str = "x", *, checkpoint: bool = True) -> None:
        super().__init__(config)
        stages = [dataclasses.replace(s, raisable=RAISABLE) if s.name == "train" else s for s in STAGES]
        self.run, self.result, self.checkpoint = Run(config, stages), result, checkpoint

    def work(self, name: str, text: str = "x") -> Callable[[Path], None]:
        write = super().work(name, self.result if name == "train" else text)

        def train(folder: Path) -> None:
            if self.checkpoint:
                write_text(folder / "checkpoints" / "checkpoint-5" / "nspec_state.json", "{}")
            write(folder)

        return train if name == "train" else write


def test_a_finished_training_goes_on_where_its_end_is_raised(tmp_path: Path) -> None:
    Trained(config_of(tmp_path, train_updates=5))()
    chain = Trained(config_of(tmp_path, train_updates=9), result="better")
    assert chain() == ["train", "test:a", "test:b", "score", "page"]
    assert chain.told[1].startswith("train: goes on to train.updates = 9, train.patience = 10")
    assert f"  made from the model before: the old results are kept in {tmp_path / 'three/a.old-1'}" in chain.told
    assert (tmp_path / "three/b.old-1/out").read_text() == "x"
    record = read_json(tmp_path / "two/stage.json")
    assert record["options"]["train.updates"] == 9
    assert Trained(config_of(tmp_path, train_updates=9))() == []


def test_what_follows_is_kept_where_the_longer_training_changed_nothing(tmp_path: Path) -> None:
    Trained(config_of(tmp_path, train_updates=5))()
    assert Trained(config_of(tmp_path, train_updates=9))() == ["train"]
    assert not list(tmp_path.glob("**/*.old-*"))


@pytest.mark.parametrize(
    ("before", "after", "goes_on"), [(3, 5, True), (3, 0, True), (0, 5, False), (5, 3, False), (0, 0, True)]
)
def test_patience_may_be_raised_and_none_is_the_highest(tmp_path: Path, before: int, after: int, goes_on: bool) -> None:
    Trained(config_of(tmp_path, train_patience=before))()
    again = Trained(config_of(tmp_path, train_patience=after))
    if goes_on:
        assert again() == ([] if before == after else ["train"])
    else:
        with pytest.raises(ValueError, match=f"train.patience was {before}, is {after}"):
            again()


@pytest.mark.parametrize(
    "others", [{"train_updates": 4}, {"train_updates": 9, "train_lr": 0.5}, {"train_updates": 9, "train_patience": 1}]
)
def test_a_lower_end_or_another_option_is_refused_and_what_may_change_is_said(
    tmp_path: Path, others: dict[str, Any]
) -> None:
    Trained(config_of(tmp_path, train_updates=5))()
    with pytest.raises(
        ValueError, match=r"goes on where train.updates or train.patience alone is raised\. Give"
    ) as error:
        Trained(config_of(tmp_path, **others))()
    assert "\n" not in str(error.value)


def test_a_training_whose_checkpoint_is_gone_is_refused_before_anything_is_moved(tmp_path: Path) -> None:
    Trained(config_of(tmp_path, train_updates=5), checkpoint=False)()
    with pytest.raises(ValueError, match="from its last checkpoint, which is not there"):
        Trained(config_of(tmp_path, train_updates=9))()
    assert Trained(config_of(tmp_path, train_updates=5))() == []


def test_a_changed_input_is_not_a_raised_end(tmp_path: Path) -> None:
    Trained(config_of(tmp_path, train_updates=5))()
    (tmp_path / "one/text.txt").write_text("other")
    with pytest.raises(ValueError, match="its input one/text.txt has changed"):
        Trained(config_of(tmp_path, train_updates=9))()


def test_what_reads_a_training_that_is_to_go_on_waits_for_it(tmp_path: Path) -> None:
    Trained(config_of(tmp_path, train_updates=5))("train")
    longer = Trained(config_of(tmp_path, train_updates=9))
    with longer.run, pytest.raises(ValueError, match="test:a reads the result of train, which is to go on to .* = 9"):
        longer.run.do("test:a", longer.work("test:a"))


@pytest.mark.parametrize("moment", ["in training", "before its record"])
def test_a_longer_training_that_was_killed_goes_on_and_leaves_nothing_outdated(tmp_path: Path, moment: str) -> None:
    Trained(config_of(tmp_path, train_updates=5))()
    longer = Trained(config_of(tmp_path, train_updates=9), result="better")
    with longer.run, pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        longer.run.check()

        def killed(*_: Any, **__: Any) -> None:
            longer.run.starting()
            raise KeyboardInterrupt

        if moment == "before its record":
            patch.setattr(longer.run, "set_aside", killed)
        longer.run.do("train", longer.work("train") if moment == "before its record" else killed)
    with pytest.raises(ValueError, match="train.updates was 9, is 5"):
        Trained(config_of(tmp_path, train_updates=5))()
    again = Trained(config_of(tmp_path, train_updates=9), result="better")
    assert again() == ["train", "test:a", "test:b", "score", "page"]


def test_a_training_that_has_begun_may_be_given_a_later_end(tmp_path: Path) -> None:
    chain = Trained(config_of(tmp_path, train_updates=5))
    chain("first")

    def killed(folder: Path) -> None:
        raise KeyboardInterrupt

    with chain.run, pytest.raises(KeyboardInterrupt):
        chain.run.do("train", killed)
    assert Trained(config_of(tmp_path, train_updates=9))()[0] == "train"
    assert read_json(tmp_path / "two/stage.json")["options"]["train.updates"] == 9


def test_what_is_damaged_is_not_gone_on_from(tmp_path: Path) -> None:
    def with_outputs(config: Config) -> Trained:
        chain = Trained(config, result="better" if config.train.updates > 5 else "x")
        stages = [
            dataclasses.replace(s, outputs=("model", "log.jsonl")) if s.name == "train" else s
            for s in chain.run.stages.values()
        ]
        chain.run = Run(config, stages)
        return chain

    with_outputs(config_of(tmp_path, train_updates=5))()
    (tmp_path / "two/model").write_text("y")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"two/model has changed since it was written\. Put it back"):
        with_outputs(config_of(tmp_path, train_updates=9))()
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "two/model").write_text("x")
    assert with_outputs(config_of(tmp_path, train_updates=9))()[0] == "train"


def test_a_longer_training_that_is_refused_leaves_the_finished_one(tmp_path: Path) -> None:
    Trained(config_of(tmp_path, train_updates=5))()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    longer = Trained(config_of(tmp_path, train_updates=9))

    def refused(folder: Path) -> None:
        raise ValueError("checkpoint-5 is of another training")

    with longer.run, pytest.raises(ValueError, match="checkpoint-5 is of another"):
        longer.run.do("train", refused)
    assert before == {path: path.read_bytes() for path in before}
    assert Trained(config_of(tmp_path, train_updates=5))() == []


@pytest.mark.parametrize(("stopped", "goes_on"), [([False, False], True), ([False, True], False)])
def test_trainings_without_checkpoints_get_more_patience_where_none_stopped_early(
    tmp_path: Path, stopped: list[bool], goes_on: bool
) -> None:
    def each(patience: int) -> Trained:
        chain = Trained(config_of(tmp_path, train_patience=patience), checkpoint=False)
        stages = [
            dataclasses.replace(s, summaries="*/summary.json", raisable=("train.patience",)) if s.name == "train" else s
            for s in chain.run.stages.values()
        ]
        chain.run = Run(chain.run.config, stages)
        return chain

    each(1)()
    for number, early in enumerate(stopped):
        write_text(tmp_path / f"two/{number}/summary.json", json.dumps({"stopped_early": early}))
    if goes_on:
        assert each(3)() == ["train"]
        assert each(3)() == []
    else:
        with pytest.raises(
            ValueError, match=r"patience was 1, is 3\. Its trainings keep no checkpoints: .*--redo train"
        ):
            each(3)()
