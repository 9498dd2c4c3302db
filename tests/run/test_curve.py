"""A direction with fewer and fewer neurons: what is measured is what is written."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from toy_translation import Toy
from transformers import AutoModelForSeq2SeqLM

import nspec
from nspec import cli
from nspec.files import read_json, write_json, write_text
from nspec.mt.methods import NeuronSpecialization
from nspec.mt.model import load_system, save_system
from nspec.mt.scoring.config import DecodeConfig
from nspec.mt.scoring.translate import Translator
from nspec.run import curve
from nspec.run.curve import shares_of
from nspec.run.yaml import render_complete

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = [f"model.{side}.layers.0.fc1" for side in ("encoder", "decoder")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with counts, in which a dense and a specialised model are taken to be trained."""
    import torch

    toy = Toy(tmp_path)
    config = toy.config()
    config.decode, config.run.folder = DecodeConfig(beam=2), str(tmp_path)
    config.corpus.max_tokens = 64
    config.run.systems = ["dense", "forward", "bilingual"]
    write_text(tmp_path / "config.yaml", render_complete(config))
    model: Any = toy.model().eval()
    for parameter in model.parameters():
        parameter.data *= 2.5
    masks = toy.masks()
    for system, method in (("dense", None), ("forward", NeuronSpecialization(masks, "forward"))):
        if method is not None:
            method.attach(model)
        save_system(model, toy.data.tokenizer, tmp_path / "systems" / system / "model", method)
        write_json(tmp_path / "systems" / system / "stage.json", {"outputs": {}})
    order = torch.arange(1, 65) ** 2
    counts = {task: {layer: order * masks[task][layer] for layer in LAYERS} for task in masks.tasks}
    nspec.ActivationCounts(counts).save(tmp_path / "profile")
    return tmp_path


@pytest.mark.parametrize("format", ["transformers", "ctranslate2"])
def test_each_point_is_a_model_whose_translations_are_scored(
    run: Path, format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if format == "ctranslate2":
        pytest.importorskip("ctranslate2")
    given = ["export", str(run), "--system", "forward", "--task", "en-de", "--format", format]
    assert cli.main([*given, "--k", "0.95,0.3"]) == 0
    folder = run / "export" / f"forward-{format}" / "en-de-curve"
    assert {path.name for path in folder.iterdir()} == {
        "dense",
        "k-0.3",
        "k-0.95",
        "curve.json",
        "curve.tsv",
        "curve.svg",
    }
    facts = read_json(folder / "curve.json")
    dense, few, most = facts["points"]
    assert (dense["k"], few["k"], most["k"]) == (None, 0.3, 0.95)
    assert few["density"] < most["density"] < dense["density"] == 1
    assert few["bytes"] < most["bytes"] < dense["bytes"]
    assert dense["speedup"] == 1
    assert "chrF2++" in facts["signatures"]["chrf"] or "nw:2" in facts["signatures"]["chrf"]
    assert "bleu: " in capsys.readouterr().out

    model, tokenizer = load_system(run / "systems/forward/model")
    toy = Toy(run)
    sources, references = toy.data.text("valid", "en-de")
    counts = nspec.ActivationCounts.load(run / "profile")
    decode = DecodeConfig(beam=2, engine=format)
    head, *told = [line.split("\t") for line in (folder / "curve.tsv").read_text().splitlines()]
    assert len(told) == 3
    engine = f"{format} {metadata.version(format)}"
    for point, cells in zip(facts["points"], told):
        row = dict(zip(head, cells))
        assert (row["engine"], row["threads"]) == (engine, "1")
        speeds = [float(row[f"sentences_per_second{end}"]) for end in ("_low", "", "_high")]
        assert speeds[1] == point["sentences_per_second"]
        assert sorted(speeds) == speeds
    assert f"sentences/s ({engine}, beam 2, 1 thread)" in (folder / "curve.svg").read_text()
    for point in (dense, few):
        if point["k"] is not None:
            masks = nspec.select(nspec.ActivationCounts({"en-de": counts["en-de"]}), point["k"])
            nspec.specialize(nspec.despecialize(model), masks)
        lines = list(Translator(model, tokenizer, decode, engine=format).translate(sources, "en-de"))
        import sacrebleu

        assert point["chrf"] == pytest.approx(sacrebleu.corpus_chrf(lines, [references], word_order=2).score)
    if format == "transformers":
        width = AutoModelForSeq2SeqLM.from_pretrained(folder / "k-0.3").config.encoder_ffn_dim
        assert width == int(masks["en-de"][LAYERS[0]].sum())


def test_models_take_turns_and_speed_is_that_of_the_median_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, turns = [0.0], []
    costs = {
        "dense": iter((0.5, 4.0, 2.0, 3.0)),
        "k-0.3": iter((0.5, 1.0, 8.0, 2.0)),
        "k-0.9": iter((9.0, 2.0, 2.0, 1.0)),
    }

    class Timed:
        def __init__(self, name: str) -> None:
            self.name = name

        def translate(self, lines: list[str], task: str) -> Iterator[str]:
            turns.append((self.name, len(lines)))
            clock[0] += next(costs[self.name])
            return iter(lines)

    monkeypatch.setattr(curve.time, "perf_counter", lambda: clock[0])
    _, seconds = curve._translate({name: Timed(name) for name in costs}, ["a", "b"], "en-de", lambda *_: None)
    assert turns[:3] == [(name, 1) for name in costs], "what is done once is no part of the speed"
    assert [[name for name, _ in turns[first : first + 3]] for first in (3, 6, 9)] == [
        ["dense", "k-0.3", "k-0.9"],
        ["k-0.3", "k-0.9", "dense"],
        ["k-0.9", "dense", "k-0.3"],
    ]
    assert seconds["dense"] == [4.0, 2.0, 3.0]
    assert curve._speed(12, seconds["k-0.3"], seconds["dense"]) == {
        "sentences_per_second": 6.0,
        "sentences_per_second_low": 1.5,
        "sentences_per_second_high": 12.0,
        "speedup": 1.5,  # of 4, 1/4 and 3/2
    }


def test_what_cannot_be_measured_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = ["export", str(run), "--system", "forward", "--task", "en-de"]
    wrong = {
        "'' is no share in (0, 1]": [*good, "--k", ""],
        "'x' is no share in (0, 1]": [*good, "--k", "0.5,x"],
        "'1.5' is no share in (0, 1]": [*good, "--k", "1.5"],
        "0.5 is there twice": [*good, "--k", "0.5,0.50"],
        "not with --all": ["export", str(run), "--system", "forward", "--all", "--k", "0.5"],
        "has the directions": [*good[:-1], "en-xx", "--k", "0.5"],
    }
    for said, given in wrong.items():
        assert cli.main(given) == 2, said
        assert said in capsys.readouterr().err.splitlines()[-1]
    (run / "profile" / "counts.safetensors").unlink()
    assert cli.main([*good, "--k", "0.5"]) == 2
    assert "--system forward has no counts of activations" in capsys.readouterr().err.splitlines()[-1]
    assert not list(run.glob("export/*/*"))


def test_shares_are_rising() -> None:
    assert shares_of("0.9, 0.5,1") == [0.5, 0.9, 1.0]
