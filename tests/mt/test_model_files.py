from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_translation import Toy
from transformers import AutoModelForSeq2SeqLM

from nspec.mt.config import ModelConfig
from nspec.mt.methods import Adapters, NeuronSpecialization
from nspec.mt.model import build_model, load_system, save_system
from nspec.mt.model_files import load_config, load_weights
from nspec.mt.text.vocabulary import load_tokenizer
from nspec.run.systems import SYSTEMS

pytestmark = pytest.mark.usefixtures("one_thread")

FC2 = "model.decoder.layers.0.fc2.weight"


@pytest.fixture
def folder(toy: Toy, tmp_path: Path) -> Path:
    """A whole model folder, which a test breaks."""
    save_system(toy.model(), toy.data.tokenizer, tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rename(weights: dict[str, torch.Tensor]) -> None:
    for name in [name for name in weights if "fc2" in name]:
        weights[name.replace("fc2", "fc3")] = weights.pop(name)


WRONG_WEIGHTS: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (rename, r"lacks model.decoder.layers.0.fc2.bias, .* and 1 more; it has, with no place for it .*fc3"),
    (lambda w: w.pop(FC2), rf"the file lacks {FC2}$"),
    (lambda w: w.pop("model.encoder.layer_norm.bias"), r"lacks model.encoder.layer_norm.bias"),
    (lambda w: w.pop("model.shared.weight"), r"lacks lm_head.weight, .* and 1 more"),
    (lambda w: w.update(more=torch.ones(2)), r"has, with no place for it in the model, more"),
    (lambda w: w.update({FC2: torch.ones(32, 65)}), rf"in another shape {FC2} \[32, 65\] for \[32, 64\]"),
    (lambda w: w[FC2].fill_(float("nan")), rf"not finite .*: {FC2};"),
    (lambda w: w[FC2].view(-1)[3:4].fill_(float("-inf")), rf"not finite .*: {FC2};"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_WEIGHTS, ids=[message for _, message in WRONG_WEIGHTS])
def test_weights_that_are_not_the_models_are_an_error_with_their_names(
    toy: Toy, folder: Path, change: Any, message: str
) -> None:
    change_weights(folder, change)
    for load in (load_system, lambda place: build_model(ModelConfig(pretrained=str(place)), toy.data.tokenizer, 1)):
        with pytest.raises(ValueError, match=message) as caught:
            load(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="lacks|has, with no|another shape|not finite"):
        load_weights(toy.model(), folder)


@pytest.mark.parametrize("kind", [torch.int32, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_of_another_type_are_an_error_with_their_names(folder: Path, kind: Any) -> None:
    change_weights(folder, lambda w: w.update({FC2: w[FC2].to(kind)}))
    with pytest.raises(
        ValueError, match=rf"weights of a type that is not computed with: {FC2} is [A-Z0-9_]+; expected F64"
    ):
        load_system(folder)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_another_precision_are_taken(folder: Path, kind: Any) -> None:
    change_weights(folder, lambda w: w.update({name: value.to(kind) for name, value in w.items()}))
    assert load_system(folder)[0].dtype == torch.float32


@pytest.mark.parametrize("place", ["/tmp/nowhere/x", "./x", "no where", "a/b/c", Path("x")])
def test_a_folder_that_is_not_there_is_said_to_be_that(place: Any) -> None:
    for load in (load_config, load_tokenizer):
        with pytest.raises(ValueError, match=r"no .* can be loaded from .*: there is no such folder$"):
            load(place)


def test_an_unknown_activation_function_is_named(folder: Path) -> None:
    change_json(folder / "config.json", activation_function="rellu")
    with pytest.raises(ValueError, match="activation_function in config.json is 'rellu', .* relu") as caught:
        load_system(folder)
    assert str(folder) in str(caught.value)


def test_a_configuration_with_one_more_layer_is_an_error(folder: Path) -> None:
    change_json(folder / "config.json", encoder_layers=2)
    with pytest.raises(ValueError, match=r"lacks model.encoder.layers.1\..* and 13 more"):
        load_system(folder)


def test_tied_and_computed_weights_may_be_there_or_not(toy: Toy, folder: Path) -> None:
    expected = load_system(folder)[0].state_dict()

    def more(weights: dict[str, torch.Tensor]) -> None:
        for name in ("lm_head", "model.encoder.embed_tokens", "model.decoder.embed_tokens"):
            weights[f"{name}.weight"] = weights["model.shared.weight"].clone()
        weights["model.encoder.embed_positions.weights"] = torch.ones(3, 32)  # files of old versions hold it

    change_weights(folder, more)
    found = load_system(folder)[0].state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"", "model.safetensors cannot be read as safetensors"),
        ("model.safetensors", None, "model.safetensors cannot be read as safetensors"),
        ("config.json", b"{", "config.json is not valid JSON"),
        ("config.json", b"[]", "config.json holds a list, expected a JSON object"),
        ("config.json", b"{}", "no model configuration can be loaded from"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds a list"),
        ("tokenizer.json", b"{", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", b"{}", "no tokenizer can be loaded from .*; it needs tokenizer.json"),
        ("generation_config.json", b"null", "generation_config.json holds null"),
        ("nspec.json", b"[]", r"nspec.json is \[\]; expected"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(folder: Path, name: str, content: bytes | None, message: str) -> None:
    whole = (folder / name).read_bytes() if content is None else content
    (folder / name).write_bytes(whole[: len(whole) // 2])
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_system(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_merges_that_do_not_fit_the_vocabulary_are_an_error(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [["nowhere", "to be found"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="no tokenizer can be loaded from"):
        load_system(folder)


@pytest.mark.parametrize("auto", ["AutoConfig", "AutoModelForSeq2SeqLM", "AutoTokenizer"])
def test_code_of_a_model_is_neither_run_nor_asked_about(
    toy: Toy, folder: Path, auto: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = folder.parent / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass C: pass\n"
    (folder / "evil.py").write_text(code)
    names = {"tokenizer_config.json": {"auto_map": {auto: ["evil.C", None]}, "tokenizer_class": "Evil"}}
    names |= {"config.json": {"auto_map": {auto: "evil.C"}, "model_type": "evil"}}
    file = "tokenizer_config.json" if auto == "AutoTokenizer" else "config.json"
    change_json(folder / file, **names[file])
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="model type `evil`" if "Seq2Seq" in auto else "code of its own"):
        load_system(folder)
    assert not ran.exists()


# What makes a system


def saved(toy: Toy, folder: Path, method: Any) -> Path:
    model = toy.model()
    method.attach(model)
    save_system(model, toy.data.tokenizer, folder, method)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(next(n for n in w if "adapters" in n and n.endswith("up.bias"))), "lacks .*adapters.*up.bias"),
        (lambda w: w.update(more=torch.ones(1)), "no place for it in the model, more"),
        (lambda w: [w.pop(n) for n in list(w) if "adapters" in n], "adapters of width none"),
        (lambda w: w[FC2].fill_(float("nan")), "not finite"),
    ],
)
def test_weights_of_adapters_are_checked_too(toy: Toy, tmp_path: Path, change: Any, message: str) -> None:
    folder = saved(toy, tmp_path / "model", Adapters({"en-de": "a", "de-en": "b"}, 4))
    load_system(folder, made_by=SYSTEMS["adapters"].made_by)
    change_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        load_system(folder)


@pytest.mark.parametrize(
    "wrong", [{"bottleneck": True}, {"bottleneck": 10**11}, {"bottleneck": 5}, {"groups": {"en-de": 3}}, {"groups": {}}]
)
def test_adapters_described_otherwise_than_they_are_stored_are_an_error(
    toy: Toy, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    folder = saved(toy, tmp_path / "model", Adapters({"en-de": "a", "de-en": "b"}, 4))
    change_json(folder / "nspec.json", **wrong)
    with pytest.raises(ValueError, match=r"nspec.json (is|says bottleneck)"):
        load_system(folder)


def test_a_system_without_its_nspec_file_is_not_taken_for_a_dense_one(toy: Toy, tmp_path: Path) -> None:
    masked = saved(toy, tmp_path / "masked", NeuronSpecialization(toy.masks(), "forward"))
    adapted = saved(toy, tmp_path / "adapted", Adapters({"en-de": "a"}, 4))
    for folder, message in ((masked, "nspec.json is not there, but masks/ is"), (adapted, "no place for it.*adapters")):
        (folder / "nspec.json").unlink()
        with pytest.raises(ValueError, match=message):
            load_system(folder)
    shutil.rmtree(masked / "masks")
    load_system(masked, made_by=SYSTEMS["dense"].made_by)
    with pytest.raises(ValueError, match=r"is a dense model \(nspec.json is not there\), but .* masks in mode forward"):
        load_system(masked, made_by=SYSTEMS["forward"].made_by)


@pytest.mark.parametrize(("mode", "kind"), [("forward", "update"), ("forward", "dense"), ("update", "lass")])
def test_a_folder_of_another_kind_of_system_is_an_error(toy: Toy, tmp_path: Path, mode: Any, kind: str) -> None:
    folder = saved(toy, tmp_path / "model", NeuronSpecialization(toy.masks(), mode))
    load_system(folder, made_by=SYSTEMS[mode].made_by)
    with pytest.raises(
        ValueError, match=rf"is masks in mode {mode} \(nspec.json says so\), but config.yaml of the run"
    ):
        load_system(folder, made_by=SYSTEMS[kind].made_by)


def test_a_specialised_system_is_no_pretrained_model(toy: Toy, tmp_path: Path) -> None:
    for mode in ("forward", "update"):
        folder = saved(toy, tmp_path / mode, NeuronSpecialization(toy.masks(), mode))  # type: ignore[arg-type]
        if mode == "update":
            build_model(ModelConfig(pretrained=str(folder)), toy.data.tokenizer, 1)
            continue
        with pytest.raises(ValueError, match="is a system with masks, which would be left out"):
            build_model(ModelConfig(pretrained=str(folder)), toy.data.tokenizer, 1)


def test_plain_transformers_still_loads_what_is_written(folder: Path) -> None:
    assert AutoModelForSeq2SeqLM.from_pretrained(folder) is not None
