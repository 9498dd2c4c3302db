from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_translation import Toy, text_options

from nspec.mt.model import save_system
from nspec.mt.text.prepare import prepare
from nspec.run.config import Config
from nspec.run.readiness import check_model, check_precision, check_pretrained
from nspec.run.yaml import set_option

pytestmark = pytest.mark.usefixtures("one_thread")


def config(*systems: str) -> Config:
    made = Config()
    made.run.systems = ["dense", *systems]
    made.model.pretrained = "FOLDER"
    return made


@pytest.mark.parametrize("systems", [("forward", "random"), ("update",), ("adapters",), ("lass",)])
def test_a_model_that_suits_is_left_as_it_was(toy: Toy, systems: tuple[str, ...]) -> None:
    model = toy.model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random, parameters = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    check_model(config(*systems), model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(type(module).__module__.split(".")[0] != "nspec" for module in model.modules())
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == parameters


@pytest.mark.parametrize("section", ["train", "specialize"])
def test_fp16_on_a_cpu_is_refused_before_anything_is_trained(section: str) -> None:
    made = config("forward")
    made.run.device = "cpu"
    check_precision(made)
    getattr(made, section).precision = "fp16"
    with pytest.raises(ValueError, match="precision is fp16 and the device is the CPU"):
        check_precision(made)


def gelu(model: Any) -> None:
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        layer.activation_fn = torch.nn.GELU()


def mixing(model: Any) -> None:
    """A function of all neurons of a token, from which counts could still be made."""
    layer = model.model.decoder.layers[0]
    del layer.activation_fn
    layer.__dict__["activation_fn"] = lambda x: torch.relu(x) / (1 + torch.relu(x).amax(-1, keepdim=True))


def dropout(model: Any) -> None:
    model.model.encoder.layers[0].activation_dropout = 0.3


def renamed(model: Any) -> None:
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        layer.first = layer.__dict__["_modules"].pop("fc1")


@pytest.mark.parametrize(
    ("change", "systems", "message"),
    [
        (mixing, ("random",), "is not elementwise: it calls Tensor.amax"),
        (dropout, ("forward",), "activation_dropout is 0.3, expected 0"),
        (renamed, ("forward",), "no feed-forward block found"),
        (renamed, ("adapters",), "no feed-forward block found"),
        (renamed, ("lass",), "no feed-forward block found"),
    ],
)
def test_a_model_that_does_not_suit_is_an_error(toy: Toy, change: Any, systems: tuple[str, ...], message: str) -> None:
    model = copy.deepcopy(toy.model())
    change(model)
    with pytest.raises(ValueError, match=rf"model.pretrained FOLDER does not suit run.systems: .*{message}"):
        check_model(config(*systems), model)


def test_both_modes_suit_any_activation(toy: Toy) -> None:
    model = copy.deepcopy(toy.model())
    gelu(model)
    check_model(config("update", "forward"), model)


def test_layers_that_are_chosen_must_be_there(toy: Toy) -> None:
    chosen = config("forward")
    chosen.select.layers = ["decoder.layers.7"]
    with pytest.raises(ValueError, match="select.layers of forward: .*decoder.layers.7"):
        check_model(chosen, toy.model())


def test_a_run_prepares_for_a_gelu_model(toy: Toy, tmp_path: Path) -> None:
    save_system(toy.model(), toy.data.tokenizer, tmp_path / "model")
    change(tmp_path / "model/config.json", activation_function="gelu")
    run = toy.config()
    set_option(run, f"model.pretrained={tmp_path / 'model'}")
    run.run.systems = ["dense", "forward"]
    check_pretrained(run)
    prepare(text_options(run), tmp_path / "prepared")
    assert (tmp_path / "prepared").exists()


def no_layers(folder: Path) -> None:
    change(folder / "config.json", encoder_layers=2)


def more(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors") | {"more": torch.ones(2)}, folder / "model.safetensors")


def other_tokenizer(folder: Path) -> None:
    change(folder / "tokenizer_config.json", unk_token="<pad>")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (no_layers, "lacks model.encoder.layers.1"),
        (more, "no place for it in the model, more"),
        (other_tokenizer, "saved"),
    ],
)
def test_a_broken_pretrained_model_is_seen_before_text_is_read(
    toy: Toy, tmp_path: Path, breaks: Any, message: str
) -> None:
    save_system(toy.model(), toy.data.tokenizer, tmp_path / "model")
    breaks(tmp_path / "model")
    run = toy.config()
    run.model.pretrained, run.corpus.path = str(tmp_path / "model"), "/nowhere"
    with pytest.raises(ValueError, match=message):
        check_pretrained(run)


def test_layers_that_a_pretrained_model_has_not_are_seen_before_text_is_read(toy: Toy, tmp_path: Path) -> None:
    save_system(toy.model(), toy.data.tokenizer, tmp_path / "model")
    run = toy.config()
    run.model.pretrained, run.corpus.path = str(tmp_path / "model"), "/nowhere"
    run.run.systems, run.select.layers = ["dense", "forward"], ["decoder.layers.7"]
    with pytest.raises(ValueError, match="select.layers of forward: .*decoder.layers.7"):
        check_pretrained(run)
