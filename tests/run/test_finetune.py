"""`nspec finetune` from text to page, with a model of a few thousand parameters."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import nspec
from nspec.cli import main
from nspec.files import read_json
from nspec.lm.model import load_pretrained
from nspec.lm.perplexity import perplexity
from nspec.lm.sequences import sequences

WORDS = {"aa": ["sun", "moon", "star", "sky", "rain"], "bb": ["eins", "zwei", "drei", "vier", "acht"]}
METHODS = ["lape", "random", "full"]


def text(folder: Path) -> Path:
    for code, words in WORDS.items():
        lines = [" ".join(words[(n // 5**place) % 5] for place in range(4)) for n in range(80)]
        (folder / f"{code}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return folder


def arguments(folder: Path, run: str, methods: list[str], *more: str) -> list[str]:
    (folder / "own.yaml").write_text(
        f"""run: {{folder: {folder / run}, device: cpu}}
text: {{type: files, languages: [aa, bb], path: {folder}, held_out: 0.2, length: 16}}
model: {{vocab_size: 300, d_model: 16, d_ff: 40, layers: 2, heads: 2, updates: 6, sequences: 4}}
neurons: {{rate: 0.3}}
tune: {{methods: [{", ".join(methods)}], updates: 3, sequences: 4, lr_neurons: 0.05, lr_full: 0.01}}
""",
        encoding="utf-8",
    )
    return ["finetune", str(folder / "own.yaml"), *more]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = text(tmp_path_factory.mktemp("finetune"))
    assert main(arguments(folder, "run", METHODS)) == 0
    return folder


def held_out(run: Path, code: str, tokenizer: object) -> list[torch.Tensor]:
    return sequences(tokenizer, (run / "text" / f"{code}.test.txt").read_text().split("\n")[:-1], 16)


def test_each_method_gains_and_the_matrix_is_whole(done: Path) -> None:
    run = done / "run"
    before = read_json(run / "base_perplexity" / "result.json")["perplexity"]
    for method in METHODS:
        for code in WORDS:
            result = read_json(run / "tuned" / method / code / "result.json")
            assert set(result["perplexity"]) == set(WORDS)
            assert result["tokens"] == 3 * 4 * 16
            assert result["perplexity"][code]["loss"] < before[code]["loss"], (method, code)
    table = [line.split("\t") for line in (run / "report" / "perplexity.tsv").read_text().splitlines()]
    assert len(table) == 1 + len(METHODS) * 2 * 2
    page = (run / "report" / "index.html").read_text()
    assert "<svg" in page
    assert "Neurons, LAPE" in page
    assert len(json.loads((run / "report" / "perplexity.json").read_text())["fine-tuned"]) == 6


def test_saved_neurons_beside_the_base_give_the_perplexity_that_is_reported(done: Path) -> None:
    run = done / "run"
    model, tokenizer = load_pretrained(str(run / "base" / "model"), "auto", torch.device("cpu"))
    base = read_json(run / "base_perplexity" / "result.json")["perplexity"]["bb"]
    found = perplexity(model, held_out(run, "bb", tokenizer), 4)
    assert (found.loss, found.tokens) == (pytest.approx(base["loss"], rel=1e-5), base["tokens"])
    nspec.load_neurons(model, run / "tuned" / "lape" / "aa")
    result = read_json(run / "tuned" / "lape" / "aa" / "result.json")
    for code in WORDS:
        found = perplexity(model, held_out(run, code, tokenizer), 4)
        assert found.loss == pytest.approx(result["perplexity"][code]["loss"], rel=1e-5)
    merged = nspec.merge(model, "aa")
    assert perplexity(merged, held_out(run, "aa", tokenizer), 4).loss == pytest.approx(
        result["perplexity"]["aa"]["loss"], rel=1e-5
    )


def test_random_neurons_are_as_many_in_each_layer_as_those_of_the_rule(done: Path) -> None:
    lape, random = (nspec.NeuronMasks.load(done / "run" / "masks" / method) for method in ("lape", "random"))
    assert any(not torch.equal(lape[code][layer], mask) for code in WORDS for layer, mask in random[code].items())
    for code in WORDS:
        assert {k: int(m.sum()) for k, m in lape[code].items()} == {k: int(m.sum()) for k, m in random[code].items()}


def test_a_second_start_does_nothing_and_a_lost_stage_alone_is_made_anew(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = done / "run"
    result = run / "tuned" / "full" / "bb"
    wanted, page = (result / "result.json").read_text(), (run / "report" / "index.html").stat().st_mtime_ns
    capsys.readouterr()
    assert main(arguments(done, "run", METHODS)) == 0
    said = capsys.readouterr().err
    assert "starts" not in said
    assert (run / "report" / "index.html").stat().st_mtime_ns == page
    (result / "stage.json").rename(result / "started.json")  # as a kill leaves it
    (result / "result.json").unlink()
    assert main(arguments(done, "run", METHODS)) == 0
    again = [line for line in capsys.readouterr().err.splitlines() if line.endswith("starts")]
    assert again == ["tune:full:bb: starts", "report: starts"]
    assert read_json(result / "result.json")["perplexity"] == json.loads(wanted)["perplexity"]


def test_other_options_in_the_same_folder_are_refused_before_anything_changes(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(done, "run", METHODS, "--set", "tune.lr_full=0.5")) == 2
    said = capsys.readouterr().err
    assert "tune.lr_full was 0.01, is 0.5" in said
    assert (done / "run" / "config.yaml").read_text().count("lr_full: 0.01") == 1


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="lora needs peft")
def test_lora_and_a_model_of_ones_own(done: Path) -> None:
    given = ["--set", f"model.pretrained={done / 'run' / 'base' / 'model'}"]
    assert main(arguments(done, "own", ["lora"], *given, "--set", "tune.lora_rank=2")) == 0
    run = done / "own"
    same = [read_json(done / folder / "base_perplexity" / "result.json")["perplexity"] for folder in ("run", "own")]
    assert same[0] == same[1]
    result = read_json(run / "tuned" / "lora" / "aa" / "result.json")
    assert result["trained"] == 2 * 2 * (4 * (16 + 16) + 3 * (16 + 40))
    assert (run / "tuned" / "lora" / "aa" / "adapter_model.safetensors").stat().st_size == result["bytes"]
    assert result["perplexity"]["aa"]["loss"] != same[0]["aa"]["loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.pretrained=/no/such/folder", "model.pretrained: /no/such/folder is no folder of a model"),
        ("text.languages=[aa, cc]", "has no cc.txt"),
        ("text.path=/no/such", "text.path: /no/such is no folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str) -> None:
    assert main(arguments(text(tmp_path), "run", ["full"], "--set", change)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nspec: error")]
    assert message in line


def test_an_encoder_decoder_and_a_text_longer_than_the_model_takes_are_refused(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    assert main(arguments(done, "t5", ["full"], "--set", f"model.pretrained={tmp_path}")) == 2
    assert "is an encoder-decoder (t5); expected a causal language model" in capsys.readouterr().err
    given = ["--set", f"model.pretrained={done / 'run' / 'base' / 'model'}", "--set", "text.length=17"]
    assert main(arguments(done, "long", ["full"], *given)) == 2
    assert "text.length: expected at most 16, the longest sequence of" in capsys.readouterr().err
