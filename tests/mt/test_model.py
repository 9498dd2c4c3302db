from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_translation import Toy, weights
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, M2M100Config, M2M100ForConditionalGeneration

import nspec
from nspec.mt import model as model_module
from nspec.mt.config import ModelConfig
from nspec.mt.methods import NeuronSpecialization, load_method
from nspec.mt.model import build_model, load_system, save_system

pytestmark = pytest.mark.usefixtures("one_thread")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_new_model_is_what_the_options_say(toy: Toy) -> None:
    sizes = ModelConfig(d_model=16, d_ff=48, heads=2, encoder_layers=2, decoder_layers=3, dropout=0.2, max_positions=50)
    tokenizer = toy.data.tokenizer
    model = build_model(sizes, tokenizer, seed=1)
    config = model.config
    assert (config.d_model, config.encoder_ffn_dim, config.decoder_ffn_dim) == (16, 48, 48)
    assert (config.encoder_layers, config.decoder_layers, config.num_attention_heads) == (2, 3, 2)
    assert (config.dropout, config.attention_dropout, config.max_position_embeddings) == (0.2, 0.1, 50)
    assert (config.activation_dropout, config.encoder_layerdrop, config.decoder_layerdrop) == (0, 0, 0)
    assert config.activation_function == "relu"
    assert config.decoder_start_token_id == config.eos_token_id == tokenizer.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id
    assert model.lm_head.weight is model.model.shared.weight
    rows = model.model.shared.num_embeddings
    assert rows % 8 == 0
    assert 0 <= rows - len(tokenizer) < 8


def test_a_seed_gives_the_same_model_and_leaves_the_random_state_alone(toy: Toy) -> None:
    before = torch.get_rng_state()
    first, again, other = (toy.model(seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("sizes", [{"d_model": 30, "heads": 4}, {"d_model": 2, "heads": 1}])
def test_heads_that_do_not_divide_the_width_are_an_error(toy: Toy, sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"model.d_model is {sizes['d_model']} and model.heads is {sizes['heads']}"):
        build_model(ModelConfig(**sizes), toy.data.tokenizer, 1)


def pretrained(toy: Toy, folder: Path, rows: int) -> str:
    config = M2M100Config(
        vocab_size=rows, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, activation_dropout=0.3,
    )  # fmt: skip
    save_system(M2M100ForConditionalGeneration(config).half(), toy.data.tokenizer, folder)
    return str(folder)


def test_a_pretrained_model_comes_in_float32_without_what_hinders_specialisation(
    toy: Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = toy.data.tokenizer
    place = pretrained(toy, tmp_path / "big", len(tokenizer) + 40)
    with caplog.at_level("INFO", logger="nspec"):
        model = build_model(ModelConfig(pretrained=place, dropout=0.25), tokenizer, 1)
    assert model.dtype == torch.float32
    assert model.config.dropout == 0.25
    assert model.model.encoder.layers[0].activation_dropout == 0
    assert model.model.encoder.layerdrop == 0
    assert "activation_dropout is set from 0.3 to 0" in caplog.text
    stored = {name: value.float() for name, value in weights(tmp_path / "big").items()}
    assert torch.equal(model.model.shared.weight, stored["model.shared.weight"])


@pytest.mark.parametrize("more", [-1, 500])
def test_a_pretrained_model_with_another_vocabulary_is_an_error_with_both_sizes(
    toy: Toy, tmp_path: Path, more: int
) -> None:
    tokenizer = toy.data.tokenizer
    place = pretrained(toy, tmp_path / "other", len(tokenizer) + more)
    with pytest.raises(
        ValueError, match=rf"vocabulary of {len(tokenizer) + more} and the tokenizer .*{len(tokenizer)}"
    ):
        build_model(ModelConfig(pretrained=place), tokenizer, 1)


@pytest.mark.parametrize("mode", ["forward", "update"])
def test_a_specialised_system_comes_back_as_it_was(toy: Toy, tmp_path: Path, mode: Any) -> None:
    model, masks = toy.model().eval(), toy.masks()
    nspec.specialize(model, masks, mode=mode)
    model.config.use_cache = False
    save_system(model, toy.data.tokenizer, tmp_path / "model", NeuronSpecialization(masks, mode))
    assert not model.config.use_cache
    assert load_method(tmp_path / "model").mode == mode
    loaded, tokenizer = load_system(tmp_path / "model")
    assert not loaded.training
    assert loaded.config.use_cache
    assert tokenizer("a b").input_ids == toy.data.tokenizer("a b").input_ids
    assert same(loaded.state_dict(), model.state_dict())
    ids = torch.tensor([[5, 9, 7, 2]])
    for task in masks.tasks:
        with nspec.task(model, task), nspec.task(loaded, task), torch.no_grad():
            expected = model(input_ids=ids, decoder_input_ids=ids).logits
            assert torch.equal(loaded(input_ids=ids, decoder_input_ids=ids).logits, expected)


def test_a_specialised_system_loads_in_plain_transformers_as_its_dense_model(toy: Toy, tmp_path: Path) -> None:
    model = toy.model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nspec.specialize(model, toy.masks(), mode="forward")
    save_system(model, toy.data.tokenizer, tmp_path / "model", NeuronSpecialization(toy.masks(), "forward"))
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    assert same(plain.state_dict(), before)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == len(toy.data.tokenizer)


def test_a_kill_while_saving_leaves_the_old_system(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_system(toy.model(seed=1), toy.data.tokenizer, tmp_path / "model")
    before = load_system(tmp_path / "model")[0].state_dict()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(toy.data.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="cannot write .*model: No space left on device"):
        save_system(toy.model(seed=2), toy.data.tokenizer, tmp_path / "model")
    monkeypatch.undo()
    assert same(load_system(tmp_path / "model")[0].state_dict(), before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    save_system(toy.model(seed=2), toy.data.tokenizer, tmp_path / "model")
    assert not same(load_system(tmp_path / "model")[0].state_dict(), before)


def test_the_folder_appears_only_when_it_is_whole(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    rename = os.rename

    def watched(source: Any, target: Any) -> None:
        seen.append(sorted(path.name for path in Path(source).iterdir()))
        rename(source, target)

    monkeypatch.setattr(model_module.os, "rename", watched)
    save_system(toy.model(), toy.data.tokenizer, tmp_path / "model", NeuronSpecialization(toy.masks(), "update"))
    (names,) = seen
    assert {"config.json", "model.safetensors", "tokenizer.json", "masks", "nspec.json"} <= set(names)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no model: config.json is not there"):
        load_system(tmp_path)


def test_an_unknown_mode_in_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "nspec.json").write_text('{"mode": "sideways"}')
    with pytest.raises(ValueError, match="sideways"):
        load_method(tmp_path)


def test_a_kill_between_the_two_renames_loses_no_system(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_system(toy.model(seed=1), toy.data.tokenizer, tmp_path / "model")
    before = load_system(tmp_path / "model")[0].state_dict()
    rename = os.rename

    def killed(source: Any, target: Any) -> None:
        if Path(target).name == "model":
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(model_module.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        save_system(toy.model(seed=2), toy.data.tokenizer, tmp_path / "model")
    monkeypatch.undo()
    assert not (tmp_path / "model").exists()
    model_module.put_back(tmp_path / "model")
    assert same(load_system(tmp_path / "model")[0].state_dict(), before)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
