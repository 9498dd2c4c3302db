"""What of a model of one's own does not suit is said before anything is trained."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from nspec.cli import main
from nspec.lm.model import train_tokenizer
from nspec.run.finetune_config import TuningConfig
from nspec.run.tuning_checks import check_model

WORDS = {"aa": "sun moon star sky", "bb": "eins zwei drei vier"}


def gpt2(vocab_size: int = 400) -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=vocab_size, n_positions=16))


def config_of(methods: list[str], **options: Any) -> TuningConfig:
    config = TuningConfig()
    config.model.pretrained, config.tune.methods, config.text.length = "OWN", methods, 16
    for name, value in options.items():
        section, _, key = name.partition("_")
        setattr(getattr(config, section), key, value)
    return config


def start(folder: Path, model: Any, *change: str) -> int:
    tokenizer = train_tokenizer(WORDS.values(), 300, 16)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for code, words in WORDS.items():
        lines = [f"{words} {number}" for number in range(40)]
        (folder / f"{code}.txt").write_text("\n".join(lines), encoding="utf-8")
    given = [
        f"run.folder={folder / 'run'}",
        f"model.pretrained={folder / 'model'}",
        f"text.path={folder}",
        *("run.device=cpu", "text.type=files", "text.languages=[aa, bb]", "text.held_out=0.2", "text.length=16"),
        *("tune.updates=1", "neurons.share=0.05", *change),
    ]
    return main(["finetune", "finetune", *(part for one in given for part in ("--set", one))])


def test_parts_that_the_model_does_not_have_show_before_the_base_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, gpt2(), "tune.methods=[full, top]", "neurons.parts=[gate]") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nspec: error")]
    assert "neurons.parts: ('gate',), and transformer.h.0.mlp.c_fc is not gated: expected some of fc1, fc2" in line
    assert not (tmp_path / "run" / "base" / "stage.json").exists()
    assert not (tmp_path / "run" / "tuned").exists()


def test_methods_that_are_added_to_a_run_are_tried_before_they_are_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path, gpt2(), "tune.methods=[full]") == 0
    assert start(tmp_path, gpt2(), "tune.methods=[full, top]", "neurons.parts=[gate]") == 2
    assert "expected some of fc1, fc2" in capsys.readouterr().err
    assert not (tmp_path / "run" / "masks").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path, gpt2(vocab_size=99), "tune.methods=[full]") == 2
    assert "and the model has embeddings of 99: it is the tokenizer of another model" in capsys.readouterr().err


class NoLinear(nn.Module):
    supports_gradient_checkpointing = False
    config = GPT2Config(n_positions=0)


def test_what_does_not_suit_names_the_option() -> None:
    with pytest.raises(ValueError, match=r"text\.length: expected at most 16, .* of OWN, found 17"):
        check_model(config_of(["full"], text_length=17), gpt2())
    with pytest.raises(
        ValueError, match=r"tune\.methods: top trains neurons .* no feed-forward block found in NoLinear"
    ):
        check_model(config_of(["top"]), NoLinear())
    with pytest.raises(ValueError, match=r"tune\.checkpointing: NoLinear cannot"):
        check_model(config_of(["full"], tune_checkpointing=True), NoLinear())
    with pytest.raises(ValueError, match=r"neurons\.rate: 0\.001 of 128 neurons is less than one"):
        check_model(config_of(["lape"], neurons_rate=0.001), gpt2())


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="lora needs peft")
def test_lora_is_tried_and_taken_off_again() -> None:
    model = gpt2()
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    check_model(config_of(["lora", "top"], tune_checkpointing=True), model)
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == before
    with pytest.raises(ValueError, match=r"tune\.methods: lora does not suit the model: "):
        check_model(config_of(["lora"]), NoLinear())
