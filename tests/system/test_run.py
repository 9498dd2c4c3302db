"""The whole chain through the command line on a tiny corpus: what it ends with, and what a second command does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nspec import NeuronMasks, cli
from nspec.files import read_json
from nspec.report.run_data import load_run
from nspec.run.checks import load
from nspec.run.yaml import parse

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = ["dense", "continued", "forward", "update", "random"]
TASKS = ["de-en", "en-de"]

Tiny = Any  # tests/system/conftest.py


def rows(run: Tiny, system: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / f"systems/{system}/log.jsonl").read_text().splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("nspec: error: ")
    return line.removeprefix("nspec: error: ")


@pytest.fixture
def copy(tiny: Tiny, tmp_path: Path) -> Tiny:
    """A finished run that a test may change."""
    shutil.copytree(tiny.folder, tmp_path / "run")
    text = tiny.config.read_text().replace(str(tiny.folder), str(tmp_path / "run"))
    (tmp_path / "tiny.yaml").write_text(text)
    return type(tiny)(tmp_path / "tiny.yaml", tmp_path / "run")


def test_a_run_ends_with_the_table_and_the_page(tiny: Tiny) -> None:
    for system in SYSTEMS:
        assert f"\n {system} " in tiny.output
    assert tiny.output.splitlines()[-1] == f"report: {tiny.folder / 'report/index.html'}"
    page = (tiny.folder / "report/index.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "error" not in tiny.errors.lower()
    assert "warning" not in tiny.errors.lower()


def test_every_stage_leaves_its_results_and_a_record(tiny: Tiny) -> None:
    folders = ["prepared", "profile", "masks", "random_masks", "report"]
    folders += [f"{part}/{system}" for part in ("systems", "scores") for system in SYSTEMS]
    for folder in folders:
        record = read_json(tiny.folder / folder / "stage.json")
        assert set(record) == {"stage", "options", "inputs", "outputs", "seconds", "versions"}, folder
        assert record["inputs"] or folder == "prepared", folder
        assert all(len(digest) == 64 for digest in record["inputs"].values()), folder
        assert record["outputs"], folder
        assert all((tiny.folder / folder / name).is_file() for name in record["outputs"]), folder
    config = load(tiny.config)
    assert parse((tiny.folder / "config.yaml").read_text()) == config
    assert not list(tiny.folder.glob("**/started*")) + list(tiny.folder.glob("**/*.part"))


def test_systems_start_from_the_dense_one_and_train_equally_long_on_the_same_data(tiny: Tiny) -> None:
    tokens = set()
    for system in SYSTEMS[1:]:
        summary = read_json(tiny.folder / f"systems/{system}/summary.json")
        assert summary["updates"] == 4
        tokens.add(summary["tokens"])
        assert summary["mode"] == {"continued": None, "update": "update"}.get(system, "forward")
        first = rows(tiny, system)[0]
        assert first["lr"] == pytest.approx(1e-3), "a warm-up of its own"
    assert len(tokens) == 1
    # With the dense forward pass, the first loss is that of the continued dense model; dropout is the same too.
    assert rows(tiny, "update")[0]["loss"] == pytest.approx(rows(tiny, "continued")[0]["loss"], rel=1e-5)
    assert rows(tiny, "forward")[0]["loss"] != pytest.approx(rows(tiny, "continued")[0]["loss"], rel=1e-7)


def test_random_masks_have_the_sizes_of_the_selected_ones(tiny: Tiny) -> None:
    masks, random = NeuronMasks.load(tiny.folder / "masks"), NeuronMasks.load(tiny.folder / "random_masks")
    assert sorted(masks.tasks) == TASKS
    assert masks.density() == random.density()
    assert any(not masks[task][layer].equal(random[task][layer]) for task in TASKS for layer in masks.layers)
    for system, expected in [("forward", masks), ("update", masks), ("random", random)]:
        used = NeuronMasks.load(tiny.folder / f"systems/{system}/model/masks")
        assert all(used[task][layer].equal(expected[task][layer]) for task in TASKS for layer in masks.layers)


def test_scores_are_of_all_directions_against_the_baseline(tiny: Tiny) -> None:
    for system in SYSTEMS:
        scores = read_json(tiny.folder / f"scores/{system}/scores.json")
        assert scores["system"] == system
        assert scores["decode"]["beam"] == 2
        engine = scores["decode"]["engine"]
        assert f"translations are made by {engine} (" in tiny.errors
        records = [read_json(tiny.folder / f"scores/{system}/{task}.decode.json") for task in TASKS]
        assert {record["engine"] for record in records} == {engine}
        assert scores["seconds"] > 0
        assert sorted(scores["tasks"]) == TASKS
        for task in TASKS:
            assert scores["tasks"][task]["sentences"] == 12
            baseline = scores["tasks"][task]["baseline"]
            assert (baseline and baseline["system"]) == (None if system == "continued" else "continued")
            hypotheses = (tiny.folder / f"scores/{system}/{task}.hyp.txt").read_text().split("\n")
            assert len(hypotheses) == 13
            assert hypotheses[-1] == ""


def test_a_second_run_skips_everything_in_seconds_and_shows_the_table(tiny: Tiny) -> None:
    paths = [path for path in tiny.folder.glob("**/*") if path.name not in ("config.yaml", ".lock")]
    before = {path: path.stat().st_mtime_ns for path in paths if path.is_file()}
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "nspec.cli", "run", str(tiny.config)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert time.monotonic() - begun < 15
    assert done.returncode == 0, done.stderr
    assert done.stdout == tiny.output
    assert len(done.stderr.splitlines()) == 20
    assert all(line.endswith(": done, skipped") for line in done.stderr.splitlines())
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_other_options_are_refused_before_anything_is_written(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    before = (tiny.folder / "config.yaml").read_text()
    message = refused(capsys, "run", tiny.config, "--set", "train.lr=1e-3", "--set", "train.warmup=9")
    assert message.startswith(
        f"{tiny.folder / 'systems/dense'} was made with other settings: train.lr was 0.003, is 0.001; "
        "train.warmup was 3, is 9. A finished training goes on where train.updates or train.patience alone is raised. Give "
        "another folder"
    )
    assert "--redo train" in message
    message = refused(capsys, "report", tiny.config, "--set", "decode.beam=3")
    assert "scores/dense was made with other settings: decode.beam was 2, is 3" in message
    assert (tiny.folder / "config.yaml").read_text() == before


def test_redo_makes_what_follows_anew_and_keeps_the_old(copy: Tiny) -> None:
    before = (copy.folder / "systems/dense/model/model.safetensors").read_bytes()
    arguments = ["--set", "select.k=0.5", "--set", "run.systems=[dense, continued, forward]"]
    assert cli.main(["run", str(copy.config), *arguments, "--redo", "select"]) == 0
    density = [read_json(copy.folder / f"{name}/masks.json")["density"] for name in ("masks", "masks.old-1")]
    assert density[0] != density[1]
    assert (copy.folder / "systems/forward.old-1/model/model.safetensors").is_file()
    assert (copy.folder / "scores/forward.old-1/scores.json").is_file()
    assert not (copy.folder / "systems/continued.old-1").exists(), "it does not follow from the masks"
    assert (copy.folder / "systems/dense/model/model.safetensors").read_bytes() == before


def test_other_bootstrap_samples_need_no_new_translation(copy: Tiny) -> None:
    hypotheses = copy.folder / "scores/dense/de-en.hyp.txt"
    written = hypotheses.stat().st_mtime_ns
    assert cli.main(["run", str(copy.config), "--set", "score.bootstrap=50", "--set", "score.baseline=dense"]) == 0
    assert hypotheses.stat().st_mtime_ns == written
    scores = read_json(copy.folder / "scores/forward/scores.json")
    assert "bs:50" in scores["signatures"]["chrf"]
    assert scores["tasks"]["de-en"]["baseline"]["system"] == "dense"


@pytest.mark.parametrize("content", [None, "null", "changed"])
def test_scores_that_are_not_as_they_were_are_made_anew(
    content: str | None, copy: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command that reads them, and refused where nothing can make them."""
    path = copy.folder / "scores/forward/scores.json"
    right = path.read_bytes()
    for command in ("evaluate", "report"):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(right.replace(b"1", b"2", 1) if content == "changed" else content.encode())
        with pytest.raises(ValueError, match=r"forward/scores.json .*`nspec evaluate` makes it anew"):
            load_run(copy.folder)
        assert cli.main([command, str(copy.config)]) == 0
        said = capsys.readouterr().err
        assert f"score:forward: {path} " in said
        assert "it is made anew" in said
        assert read_json(path) | {"seconds": 0} == json.loads(right) | {"seconds": 0}
    (path.parent / "stage-score.json").write_text("[]")
    assert cli.main(["evaluate", str(copy.config)]) == 0
    assert "stage-score.json holds [], expected an object" in capsys.readouterr().err


def test_what_a_training_or_a_translation_wrote_is_missed(copy: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    for name, redo in [
        ("systems/forward/summary.json", "specialize:forward"),
        ("systems/dense/log.jsonl", "train"),
        ("systems/dense/model/tokenizer.json", "train"),
        ("systems/dense/model/model.safetensors", "train"),
        ("scores/update/de-en.decode.json", "evaluate:update"),
        ("scores/update/de-en.hyp.txt", "evaluate:update"),
        ("masks/masks.json", "select"),
        ("profile/counts.safetensors", "profile"),
        ("prepared/meta.json", "prepare"),
    ]:
        path = copy.folder / name
        whole = path.read_bytes()
        for content in (None, b"", b"{}", whole[:-1]):
            path.unlink() if content is None else path.write_bytes(content)
            message = refused(capsys, "run", copy.config)
            assert f"{path} " in message
            assert f"--redo {redo} to make it" in message
            path.write_bytes(whole)
    assert cli.main(["report", str(copy.config)]) == 0, "nothing was changed by the refusals"


@pytest.mark.parametrize("content", ["null", "{", "", '{"options": [], "inputs": {}}', "[" * 10**5])
def test_records_that_are_none_are_refused(content: str, copy: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy.folder / "systems/forward/stage.json"
    whole = path.read_bytes()
    for name in ("stage.json", "started.json"):
        path.unlink(missing_ok=True)
        path.with_name(name).write_text(content)
        message = refused(capsys, "report", copy.config)
        assert str(path.with_name(name)) in message
        assert "--redo specialize:forward to make it" in message
    path.with_name("started.json").unlink()
    path.write_bytes(whole)
    assert cli.main(["report", str(copy.config)]) == 0


@pytest.mark.parametrize("content", ['{"sentences": true, "seconds": 1}', "{"])
def test_a_direction_whose_translation_is_broken_is_translated_again(
    content: str, copy: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy.folder / "scores/forward"
    right = (folder / "de-en.hyp.txt").read_bytes()
    (folder / "de-en.decode.json").write_text(content)
    record = read_json(folder / "stage.json")
    del record["outputs"]  # as an older version wrote it
    (folder / "stage.json").write_text(json.dumps(record))
    (folder / "stage-score.json").unlink()
    message = refused(capsys, "evaluate", copy.config)
    assert str(folder / "de-en.decode.json") in message
    (folder / "stage.json").rename(folder / "started.json")  # as a kill leaves it
    assert cli.main(["evaluate", str(copy.config)]) == 0
    assert "de-en is translated again: " in capsys.readouterr().err
    assert (folder / "de-en.hyp.txt").read_bytes() == right


def test_the_stages_one_by_one_are_the_whole_run(tiny: Tiny, fresh: Tiny) -> None:
    for command in ["prepare", "train", "profile", "select"]:
        assert cli.main([command, str(fresh.config)]) == 0
    for system in ["forward", "continued"]:  # the first is scored without its baseline, and again when that is there
        assert cli.main(["specialize", str(fresh.config), "--system", system]) == 0
        assert cli.main(["evaluate", str(fresh.config), "--system", system]) == 0
    assert cli.main(["report", str(fresh.config)]) == 0
    ours, theirs = (read_json(run.folder / "scores/forward/scores.json") for run in (fresh, tiny))
    assert ours["tasks"] == theirs["tasks"]
    assert not (fresh.folder / "systems/update").exists()


def test_stages_that_the_run_has_not_are_refused(fresh: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--set", "run.systems=[dense, continued]"]
    assert "no system of this run needs neuron masks" in refused(capsys, "profile", fresh.config, *few)
    assert "the run has dense, continued" in refused(capsys, "evaluate", fresh.config, "--system", "forward", *few)
    assert "--system dense" in refused(capsys, "specialize", fresh.config, "--system", "dense", *few)
    assert "--redo tarin: there is no such stage" in refused(capsys, "train", fresh.config, "--redo", "tarin", *few)


def test_several_seeds_end_with_their_comparison(fresh: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("run.systems=[dense, continued, forward]", "train.updates=4", "specialize.updates=2")
    few = [word for option in options for word in ("--set", option)]
    assert cli.main(["run", str(fresh.config), "--seeds", "1,2", *few]) == 0
    printed = capsys.readouterr().out
    assert "2 seeds" in printed or "2 runs" in printed
    assert printed.splitlines()[-1] == f"comparison: {fresh.folder / 'seeds/seeds.md'}"
    assert (fresh.folder / "seeds" / "seeds.tsv").is_file()
    summaries = [read_json(fresh.folder / f"seed-{n}" / "systems" / "dense" / "summary.json") for n in (1, 2)]
    assert summaries[0]["best_value"] != summaries[1]["best_value"]
    for wrong in ("1", "1,1", "1,x"):
        assert f"--seeds {wrong}: expected" in refused(capsys, "run", fresh.config, "--seeds", wrong)


@pytest.mark.slow
def test_two_processes_share_a_run(tiny: Tiny, fresh: Tiny) -> None:
    """Each takes half of the micro-batches, of the batches to profile and of the directions to translate."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "nspec.cli"]
    arguments = ["--set", "run.systems=[dense, forward]"]
    arguments += ["--set", "model.dropout=0", "--set", "model.attention_dropout=0"]
    done = subprocess.run(
        [*launch, "run", str(fresh.config), *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: ") == 1
    alone = fresh.folder.with_name("alone")
    text = fresh.config.read_text().replace(str(fresh.folder), str(alone))
    fresh.config.write_text(text)
    assert cli.main(["run", str(fresh.config), *arguments]) == 0
    for system in ["dense", "forward"]:
        two, one = (rows(type(tiny)(fresh.config, folder), system) for folder in (fresh.folder, alone))
        assert [row["step"] for row in two] == [row["step"] for row in one]
        key = ["loss" if "loss" in row else "valid_loss" for row in one]
        assert [row[k] for row, k in zip(two, key)] == pytest.approx([row[k] for row, k in zip(one, key)], rel=1e-4)
    for name in ["de-en.hyp.txt", "en-de.hyp.txt"]:
        assert (fresh.folder / "scores/dense" / name).is_file()
