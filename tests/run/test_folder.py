"""Stages: skipping what is done, refusing what was done otherwise, going on after a kill, one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from stage_chain import ALL, STAGES, Chain, all_of_it, config_of, refusal

from nspec.files import read_json, write_text
from nspec.run.config import Config
from nspec.run.folder import Run


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
    with pytest.raises(ValueError, match=r"--redo tset: there is no such stage; did you mean test\? There are first"):
        chain.run.following(["tset"])
    with pytest.raises(ValueError, match=r"; there are first, train, test \(2: test:a, \.\.\.\), score, page$"):
        chain.run.following(["xyz"])


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
from nspec.run.config import Config
from nspec.run.folder import Run
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
