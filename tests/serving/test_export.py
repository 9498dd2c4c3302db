"""An exported folder is whole, loads without nspec, and translates as the system does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import readme, without_nspec
from toy_translation import Toy

import nspec
from nspec import cli
from nspec.files import read_json, write_json, write_text
from nspec.mt.methods import Adapters, Lass, Method, NeuronSpecialization
from nspec.mt.model import load_system, save_system
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.translate import Translator
from nspec.mt.text.config import TokenizerConfig
from nspec.mt.text.vocabulary import train_sentencepiece
from nspec.run.yaml import render_complete

pytest.importorskip("ctranslate2")
pytestmark = pytest.mark.usefixtures("one_thread")

DECODE = DecodeConfig(beam=1, max_length_ratio=50)  # the limit is that of the model, as in the README's lines


class Run:
    """A run folder without its trainings: the text of a toy translation, and random models that do not end at once."""

    def __init__(self, folder: Path) -> None:
        self.toy, self.folder = Toy(folder), folder
        self.tokenizer, self.tasks = self.toy.data.tokenizer, self.toy.data.tasks
        config = self.toy.config()
        config.decode, config.run.folder, config.corpus.max_tokens = DECODE, str(folder), 64
        config.run.systems = ["dense", "forward", "update", "lass", "adapters", "finetuned", "neurons"]
        write_text(folder / "config.yaml", render_complete(config))

    def model(self, method: Method | None = None, seed: int = 2) -> Any:
        model = self.toy.model(seed=seed).eval()
        for parameter in model.parameters():
            parameter.data *= 2.5
        rare = [*self.tokenizer.all_special_ids, *range(len(self.tokenizer), model.config.vocab_size)]
        rare.remove(self.tokenizer.eos_token_id)
        model.get_input_embeddings().weight.data[rare] *= 0.05  # trained models do not choose them
        if method is not None:
            method.attach(model)
        return model

    def add(self, system: str, method: Method | None = None, seed: int = 2) -> None:
        folder = self.folder / "systems" / system
        save_system(self.model(method, seed), self.tokenizer, folder / "model", method)
        write_json(self.folder / "systems" / system.split("/")[0] / "stage.json", {"outputs": {}})

    def lines(self, task: str) -> list[str]:
        return self.toy.data.text("test", task)[0][:12]

    def expected(self, system: str, task: str) -> list[str]:
        model, tokenizer = load_system(self.folder / "systems" / system / "model")
        return list(Translator(model, tokenizer, DECODE).translate(self.lines(task), task))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    found = Run(tmp_path_factory.mktemp("run"))
    found.add("dense")
    found.add("forward", NeuronSpecialization(found.toy.masks(), "forward"))
    found.add("update", NeuronSpecialization(found.toy.masks(), "update"))
    found.add("adapters", Adapters(dict.fromkeys(found.tasks, "all"), 4))
    for seed, task in enumerate(found.tasks, start=2):
        found.add(f"finetuned/{task}", seed=seed)
    return found


def exported(run: Run, out: Path, *options: str) -> Path:
    assert cli.main(["export", str(run.folder), "--out", str(out), *options]) == 0
    return out


def test_a_direction_translates_with_ctranslate2_and_sentencepiece_alone(run: Run, tmp_path: Path) -> None:
    task = "en-de"
    folder = exported(run, tmp_path / "out", "--system", "forward", "--task", task, "--format", "ctranslate2")
    lines = [*run.lines(task), "a  b\u00a0x c", " "]  # spaces, a letter that the vocabulary has not, a blank line
    model, tokenizer = load_system(run.folder / "systems/forward/model")
    expected = list(Translator(model, tokenizer, DECODE).translate(lines, task))
    assert without_nspec(readme(folder, lines)) == expected
    assert len(set(expected)) > 6
    names = {path.name for path in folder.iterdir()}
    assert {"model.bin", "config.json", "shared_vocabulary.json", "spm.model", "README.md"} <= names
    assert "density" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("system", ["dense", "forward", "update", "finetuned"])
def test_a_folder_of_transformers_translates_alike(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], system: str
) -> None:
    task = "fr-en"
    folder = exported(run, tmp_path / "out", "--system", system, "--task", task)
    capsys.readouterr()
    exec(readme(folder, [*run.lines(task), ""]), {})
    found = capsys.readouterr().out.split("\n")[:-1]
    assert found == [*run.expected(f"{system}/{task}" if system == "finetuned" else system, task), ""]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {folder.stat().st_mode & 0o666}
    width = read_json(folder / "config.json")["encoder_ffn_dim"]
    kept = int(run.toy.masks()[task]["model.encoder.layers.0.fc1"].sum())
    assert width == (kept if system == "forward" else 64)


def test_all_directions_share_what_is_the_same(run: Run, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "forward", "--system", "forward", "--all", "--format", "ctranslate2")
    assert sorted(path.name for path in folder.iterdir()) == sorted(run.tasks)
    of = {name: {(folder / task / name).stat().st_ino for task in run.tasks} for name in ("spm.model", "model.bin")}
    assert len(of["spm.model"]) == 1
    assert len(of["model.bin"]) == len(run.tasks)
    for task in run.tasks[:2]:
        assert without_nspec(readme(folder / task, run.lines(task))) == run.expected("forward", task)
    one = exported(run, tmp_path / "update", "--system", "update", "--all", "--format", "ctranslate2")
    assert (one / "model.bin").is_file()
    assert "density" not in (one / "README.md").read_text(encoding="utf-8"), "of one direction"
    assert all(
        f"| {task} | `__{task[:2]}__` | `__{task[3:]}__` |" in (one / "README.md").read_text() for task in run.tasks
    )


def test_int8_is_smaller_and_dense_width_keeps_the_width(run: Run, tmp_path: Path) -> None:
    options = ["--system", "forward", "--task", "en-de", "--format", "ctranslate2"]
    whole = exported(run, tmp_path / "whole", *options)
    small = exported(run, tmp_path / "small", *options, "--quantization", "int8")
    wide = exported(run, tmp_path / "wide", *options, "--dense-width")
    sizes = [(folder / "model.bin").stat().st_size for folder in (small, whole, wide)]
    assert sizes[0] < 0.6 * sizes[1] < sizes[1] < sizes[2]


def test_weight_masks_are_exported_by_direction(run: Run, tmp_path: Path) -> None:
    layer = "model.decoder.layers.0.fc1"
    generator = torch.Generator().manual_seed(1)
    masks = {task: {layer: torch.rand(64, 32, generator=generator) < 0.5} for task in run.tasks}
    from nspec.baselines.lass import WeightMasks

    run.add("lass", Lass(WeightMasks(masks)))
    folder = exported(run, tmp_path / "out", "--system", "lass", "--task", "en-de", "--format", "ctranslate2")
    assert without_nspec(readme(folder, run.lines("en-de"))) == run.expected("lass", "en-de")
    assert run.expected("lass", "en-de") != run.expected("dense", "en-de")


def test_what_is_wrong_is_one_line_and_leaves_nothing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (tmp_path / "there").mkdir()
    (tmp_path / "empty").mkdir()
    begun = run.folder / "systems" / "continued"
    save_system(run.model(), run.tokenizer, begun / "model")
    good = [str(run.folder), "--system", "dense", "--task", "en-de"]
    wrong = {
        "give --task (a direction such as en-de; ": [str(run.folder), "--system", "dense"],
        "--task en-de and --all: give one of them": [*good, "--all"],
        f"RUN {tmp_path / 'none'}: there is no such folder": [str(tmp_path / "none"), *good[1:]],
        f"RUN {tmp_path / 'empty'}: there is no run in that folder": [str(tmp_path / "empty"), *good[1:]],
        f"the one that it is a part of is {run.folder}": [str(run.folder / "systems"), *good[1:]],
        "give --system: ": [str(run.folder), "--task", "en-de"],
        "--system bilingual: ": [str(run.folder), "--system", "bilingual", "--task", "en-de"],
        "leave --base out": [*good, "--base", str(begun / "model")],
        "has the directions en-de": [*good[:-1], "en-xx"],
        "is there already": [*good, "--out", str(tmp_path / "there")],
        "the format is 'onnx'; expected transformers or ctranslate2": [*good, "--format", "onnx"],
        "quantization int8 goes with the format ctranslate2": [*good, "--quantization", "int8"],
        "quantization is 'int5'": [*good, "--format", "ctranslate2", "--quantization", "int5"],
        "adapters are layers of their own": [str(run.folder), "--system", "adapters", "--task", "en-de"],
        "is not trained to its end": [str(run.folder), "--system", "continued", "--task", "en-de"],
    }
    for message, options in wrong.items():
        given = options if "--out" in options else [*options, "--out", str(out)]
        assert cli.main(["export", *given]) == 2, message
        said = capsys.readouterr().err
        assert message in said.splitlines()[-1], said
        assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "there"]


def test_damage_is_one_line_without_options_that_the_command_has_not(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    record, pieces = folder / "systems" / "dense" / "stage.json", folder / "prepared" / "tokenizer" / "spm.model"
    good = ["export", str(folder), "--system", "dense", "--task", "en-de", "--out", str(tmp_path / "out")]

    def said(options: list[str] = good) -> str:
        assert cli.main(options) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err.splitlines()[-1]

    changed = record.parent / "model" / "config.json"
    write_json(record, {"outputs": {"model/config.json": "0" * 64}})
    assert said().endswith(f"{changed} has changed since it was written: put it back as it was, or make it anew with "
                           "`nspec run` and --redo train")  # fmt: skip
    write_json(record, {"outputs": {}})
    (record.parents[1] / "dense").rename(record.parents[1] / "mine")
    assert said([*good[:3], "mine", *good[4:]]).endswith("does not say what it is; `nspec translate --model` takes it")
    (record.parents[1] / "mine").rename(record.parents[1] / "dense")
    pieces.write_bytes(train_sentencepiece(["zz yy xx"] * 9, TokenizerConfig(vocab_size=8)))
    assert ", and the tokenizer of the model has not: put it back" in said()
    pieces.write_bytes(b"no model")
    assert "spm.model cannot be read as a SentencePiece model: put it back" in said()
    pieces.unlink()  # the tokenizer serves in its place
    assert cli.main([*good, "--format", "ctranslate2"]) == 0
    lines = run.lines("en-de")
    assert without_nspec(readme(tmp_path / "out", lines)) == run.expected("dense", "en-de")


@pytest.mark.parametrize("format", ["transformers", "ctranslate2"])
def test_a_full_disk_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path, format: str) -> None:
    """No file may grow over 20 kB: writing fails as on a full disk (EFBIG for ENOSPC)."""
    options = ["export", str(run.folder), "--system", "dense", "--task", "en-de", "--format", format]
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
    code += "from nspec import cli; sys.exit(cli.main(sys.argv[1:]))"
    given = [sys.executable, "-c", code, *options, "--out", str(tmp_path / "out")]
    done = subprocess.run(given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"cannot write {tmp_path / 'out'}: " in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_a_path_is_told_by_its_end(run: Run, tmp_path: Path) -> None:
    model = run.model(NeuronSpecialization(run.toy.masks(), "forward"))
    for number, (base, told) in enumerate(
        {
            "facebook/some_model": "facebook/some_model",
            str(run.folder / "systems" / "dense" / "model"): f"{run.folder.name}/systems/dense/model",
            str(tmp_path / "gone"): "gone",
        }.items()
    ):
        folder = nspec.export(model, "de-en", tmp_path / str(number), tokenizer=run.tokenizer, base=base)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert f"of `{told}`" in card
        assert ("base_model:" in card) == (base == told)
        assert str(tmp_path) not in card


def test_the_call_of_a_live_model_writes_the_same_weights(run: Run, tmp_path: Path) -> None:
    model = run.model(NeuronSpecialization(run.toy.masks(), "forward"))
    folder = nspec.export(model, "de-en", tmp_path / "out", tokenizer=run.tokenizer, base="some/base")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "some/base" in text
    assert "__de__" in text
    with pytest.raises(ValueError, match="CTranslate2 needs the vocabulary: give tokenizer="):
        nspec.export(model, "de-en", tmp_path / "other", "ctranslate2")
    with pytest.raises(ValueError, match="is there already"):
        nspec.export(model, "de-en", folder)
    assert not (tmp_path / "other").exists()


def test_a_task_or_a_model_that_there_is_not_is_refused_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    update, _ = load_system(run.folder / "systems/update/model")
    masks = nspec.NeuronMasks({"en-de": {"0": torch.arange(8) < 2}})
    other = nspec.specialize(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)), masks)
    for model, task, said in (
        (update, "zz-qq", "there are no masks of task 'zz-qq'"),
        (other, "en-de", "Sequential is no model of transformers"),
    ):
        with pytest.raises(ValueError, match=said):
            nspec.export(model, task, tmp_path / "out")
    with pytest.raises(TypeError, match="task is None, expected the name"):
        nspec.export(update, None, tmp_path / "out")  # type: ignore[arg-type]
    update.resize_token_embeddings(len(run.tokenizer) - 3)
    with pytest.raises(ValueError, match="the tokenizer has 3 tokens, .* beyond the"):
        nspec.export(update, "en-de", tmp_path / "out", tokenizer=run.tokenizer)
    assert not any(tmp_path.iterdir())


def test_the_lines_of_a_run_say_what_of_its_search_they_leave_out(run: Run, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run.folder, copied)
    path = copied / "config.yaml"
    text = path.read_text(encoding="utf-8")
    write_text(path, text.replace("no_repeat_ngram_size: 0", "no_repeat_ngram_size: 2"))
    assert cli.main(["export", str(copied), "--out", str(tmp_path / "out"), "--system", "dense", "--all"]) == 0
    said = "The run's own search has `no_repeat_ngram_size=2` too; these lines search without."
    assert said in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    out = exported(run, tmp_path / "plain", "--system", "dense", "--all")
    assert "own search has" not in (out / "README.md").read_text(encoding="utf-8")
