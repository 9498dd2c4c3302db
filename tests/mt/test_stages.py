"""Stages: skipping what is done, refusing what was done otherwise, going on after a kill, one process at a time."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nspec.files import read_json, write_text
from nspec.mt.config import Config
from nspec.mt.stages import Run, Stage

STAGES = [
    Stage("first", "one", options=("corpus", "run.seed")),
    Stage("train", "two", options=("train",), inputs=("one/*.txt",), after=("first",), resumable=True),
    Stage("test:a", "three/a", options=("decode",), inputs=("two/model",), after=("train",), resumable=True),
    Stage("test:b", "three/b", options=("decode",), inputs=("two/model",), after=("train",)),
    Stage("score", "three/a", ("score",), ("three/a/out",), ("test:a",), derived=True, record="stage-score.json"),
    Stage("page", "page", inputs=("three/a/out", "config"), after=("test:a",), derived=True),
]


def config_of(folder: Path, **values: object) -> Config:
    config = Config()
    config.run.folder = str(folder)
    for name, value in values.items():
        section, _, key = name.partition("_")
        setattr(getattr(config, section), key, value)
    return config


class Chain:
    """Runs all stages and remembers which worked; each writes its name and the time it was called."""

    def __init__(self, config: Config) -> None:
        self.run, self.worked, self.told = Run(config, STAGES), [], []
        self.made = {"first": "one/text.txt", "train": "two/model", "test:a": "three/a/out", "test:b": "three/b/out"}

    def work(self, name: str, text: str = "x") -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            self.worked.append(name)
            write_text(self.run.folder / self.made.get(name, f"{name}.txt"), text)

        return write

    def __call__(self, until: str = "page") -> list[str]:
        with self.run:
            self.run.check()
            for name in self.run.stages:
                self.run.do(name, self.work(name), tell=self.told.append)
                if name == until:
                    break
        return self.worked


def all_of_it(folder: Path, **values: object) -> list[str]:
    return Chain(config_of(folder, **values))()


def refusal(folder: Path, **values: object) -> str:
    with pytest.raises(ValueError) as caught:
        all_of_it(folder, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ALL = [stage.name for stage in STAGES]


def test_a_finished_stage_is_recorded_with_options_inputs_and_versions(tmp_path: Path) -> None:
    assert all_of_it(tmp_path) == ALL
    record = read_json(tmp_path / "two/stage.json")
    assert record["stage"] == "train"
    assert record["options"]["train.lr"] == Config().train.lr
    assert not any(name.startswith(("corpus.", "specialize.")) for name in record["options"])
    # sha256 of "x"
    assert record["inputs"] == {"one/text.txt": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    assert record["seconds"] >= 0
    assert {"python", "torch"} <= set(record["versions"])
    assert not list(tmp_path.glob("**/started*.json"))


def test_run_again_everything_is_skipped(tmp_path: Path) -> None:
    all_of_it(tmp_path)
    chain = Chain(config_of(tmp_path))
    assert chain() == []
    assert chain.told == [f"{name}: done, skipped" for name in ALL]


def test_other_options_are_refused_with_both_values_and_what_to_do(tmp_path: Path) -> None:
    all_of_it(tmp_path)
    message = refusal(tmp_path, train_lr=0.25, train_updates=7, corpus_pivot="de")
    assert message.startswith(f"{tmp_path / 'one'} was made with other settings: corpus.pivot was 'en', is 'de'.")
    assert "--set run.folder=" in message
    assert "--redo first" in message
    message = refusal(tmp_path, train_lr=0.25, train_updates=7)
    assert "train.updates was 10000, is 7; train.lr was 0.0005, is 0.25." in message
    assert "--redo train" in message
    assert all_of_it(tmp_path) == [], "nothing was changed by the refusals"


def test_options_of_other_stages_and_neutral_options_do_not_matter(tmp_path: Path) -> None:
    all_of_it(tmp_path)
    neutral = {"run_threads": 3, "run_device": "cpu", "train_log_every": 1, "train_compile": True}
    assert all_of_it(tmp_path, **neutral, decode_batch_tokens=9, specialize_lr=3.0) == []


def test_an_option_that_the_record_does_not_know_had_its_default(tmp_path: Path) -> None:
    all_of_it(tmp_path)
    record = read_json(tmp_path / "two/stage.json")
    del record["options"]["train.clip_norm"]
    write_text(tmp_path / "two/stage.json", json.dumps(record))
    assert all_of_it(tmp_path) == []
    assert "train.clip_norm was 1.0, is 2.0" in refusal(tmp_path, train_clip_norm=2.0)


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    all_of_it(tmp_path)
    (tmp_path / "one/text.txt").write_text("other")
    assert "its input one/text.txt has changed" in refusal(tmp_path)
    (tmp_path / "one/text.txt").unlink()
    assert "its input one/text.txt is gone" in refusal(tmp_path)


def test_derived_stages_are_made_anew_instead(tmp_path: Path) -> None:
    all_of_it(tmp_path)
    assert all_of_it(tmp_path, score_bootstrap=50) == ["score"]
    assert all_of_it(tmp_path, score_bootstrap=50) == []
    (tmp_path / "config").write_text("new")
    assert all_of_it(tmp_path, score_bootstrap=50) == ["page"]


def test_an_unfinished_resumable_stage_finds_what_it_had(tmp_path: Path) -> None:
    chain = Chain(config_of(tmp_path))
    chain("first")

    def killed(folder: Path) -> None:
        (folder / "half").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub/.model.123.part").write_text("cut off")
        (folder / ".model.part").mkdir()
        raise KeyboardInterrupt

    with chain.run, pytest.raises(KeyboardInterrupt):
        chain.run.do("train", killed)
    assert "train.lr was 0.0005, is 0.25" in refusal(tmp_path, train_lr=0.25), "half of one and half of another"
    again = Chain(config_of(tmp_path))
    assert again() == ALL[1:]
    assert again.told[1] == "train: goes on"
    assert (tmp_path / "two/half").exists()
    assert not list(tmp_path.glob("**/.*.part"))


def test_an_unfinished_other_stage_starts_over_even_with_other_options(tmp_path: Path) -> None:
    chain = Chain(config_of(tmp_path))

    def killed(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise KeyboardInterrupt

    with chain.run, pytest.raises(KeyboardInterrupt):
        chain.run.do("first", killed)
    assert all_of_it(tmp_path, corpus_pivot="de") == ALL
    assert not (tmp_path / "one/half").exists()


def test_a_folder_of_unknown_origin_is_moved_and_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "two/precious").write_text("1")
    assert all_of_it(tmp_path) == ALL
    assert (tmp_path / "two.old-1/precious").exists()
    assert not (tmp_path / "two/precious").exists()


def test_redo_moves_the_stage_and_what_follows_and_deletes_nothing(tmp_path: Path) -> None:
    all_of_it(tmp_path)
    for number in (1, 2):
        chain = Chain(config_of(tmp_path, train_lr=number / 10))
        with chain.run:
            again = chain.run.following(["train"])
            chain.run.check(again)
            chain.run.set_aside(again)
        assert chain() == ["train", "test:a", "test:b", "score", "page"]
        assert (tmp_path / f"two.old-{number}/model").is_file()
        assert (tmp_path / f"three/a.old-{number}/out").is_file()
    assert read_json(tmp_path / "two.old-1/stage.json")["options"]["train.lr"] == Config().train.lr


def test_redo_of_a_group_takes_all_of_it_and_leaves_the_rest(tmp_path: Path) -> None:
    all_of_it(tmp_path)
    chain = Chain(config_of(tmp_path, decode_beam=1))
    with chain.run:
        again = chain.run.following(["test"])
        assert again == ["test:a", "test:b", "score", "page"]
        assert chain.run.set_aside(again) == [tmp_path / "three/a.old-1", tmp_path / "three/b.old-1"]
    assert chain() == ["test:a", "test:b", "score", "page"]
    with pytest.raises(ValueError, match="--redo tset: there is no such stage; there are first, train, test:a"):
        chain.run.following(["tset"])


def test_redo_of_a_derived_stage_keeps_what_it_derives_from(tmp_path: Path) -> None:
    all_of_it(tmp_path)
    chain = Chain(config_of(tmp_path))
    with chain.run:
        assert chain.run.set_aside(chain.run.following(["score"])) == []
    assert chain() == ["score"]


def test_redo_does_not_excuse_what_differs_before_it(tmp_path: Path) -> None:
    all_of_it(tmp_path)
    run = Run(config_of(tmp_path, train_lr=0.5, decode_beam=1), STAGES)
    with pytest.raises(ValueError, match=r"train\.lr was 0.0005, is 0.5"):
        run.check(run.following(["test"]))


def test_a_stage_needs_those_before_it(tmp_path: Path) -> None:
    chain = Chain(config_of(tmp_path))
    with chain.run, pytest.raises(ValueError, match="train needs first, which is not finished in"):
        chain.run.do("train", chain.work("train"))
    assert not (tmp_path / "two").exists()


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from typing import Any
from nspec.mt.config import Config
from nspec.mt.stages import Run
config = Config()
config.run.folder = {str(tmp_path)!r}
with Run(config, []):
    print("locked", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match=rf"in use by another process \(process {other.pid} on "):
            all_of_it(tmp_path)
    finally:
        other.kill()
        other.wait()
    assert all_of_it(tmp_path) == ALL, "the lock ends with the process"


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


def test_what_dead_processes_left_half_written_is_removed_and_of_no_unknown_origin(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = tmp_path / f".config.yaml.{dead.pid}.part"
    living = tmp_path / ".config.yaml.1.part"
    (tmp_path / "one").mkdir()
    for part in (stale, living, tmp_path / "one" / f".started.json.{dead.pid}.part"):
        part.write_text("half")
    chain = Chain(config_of(tmp_path))
    assert chain() == ALL
    assert not stale.exists()
    assert living.exists()
    assert not [line for line in chain.told if "unknown origin" in line]
    assert not list(tmp_path.glob("*.old-*"))
