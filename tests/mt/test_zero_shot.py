"""Directions that were not trained: encoder of one, decoder of another, exactly."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nspec
from nspec import cli
from nspec.baselines.adapters import TaskAdapters, add_adapters
from nspec.baselines.lass import WeightMasks, apply_weight_masks, prunable_layers
from nspec.mt.methods import NeuronSpecialization
from nspec.mt.zero_shot import combined, description, parts_of, sides_of
from nspec.specialization.layers import find_blocks
from nspec.specialization.tasks import specialized_layers

TASKS = ["en-de", "de-en", "en-fr", "fr-en"]


def m2m100() -> Any:
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    torch.manual_seed(0)
    config = M2M100Config(
        vocab_size=40, d_model=12, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=20, decoder_ffn_dim=20,
        encoder_attention_heads=2, decoder_attention_heads=2, activation_dropout=0.0, max_position_embeddings=32,
        init_std=0.3,
    )  # fmt: skip
    model = M2M100ForConditionalGeneration(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.2, std=0.5)
    return model


def logits(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    ids, labels = (torch.randint(4, 40, (3, length), generator=generator) for length in (7, 5))
    found: Tensor = model(input_ids=ids, labels=labels).logits.detach()
    return found


def by_hand(drawn: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """With de-fr: what is in the encoder as in de-en, the rest as in en-fr."""
    whole = {name: drawn["de-en" if "encoder" in name.split(".") else "en-fr"][name] for name in drawn["en-de"]}
    return drawn | {"de-fr": whole}


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(5)
    return {task: {name: torch.rand(shape, generator=g) < 0.5 for name, shape in shapes.items()} for task in TASKS}


def neuron_masks() -> tuple[Any, Any]:
    model, other = m2m100(), m2m100()
    drawn = draw({pair.name: (pair.d_ff,) for pair in find_blocks(model)})
    nspec.specialize(model, nspec.NeuronMasks(drawn))
    nspec.specialize(other, nspec.NeuronMasks(by_hand(drawn)))
    return model, other


def weight_masks() -> tuple[Any, Any]:
    model, other = m2m100(), m2m100()
    drawn = draw({name: tuple(model.get_submodule(name).weight.shape) for name in prunable_layers(model)})
    assert "model.decoder.layers.0.encoder_attn.k_proj" in drawn["en-de"], "cross-attention is the decoder's"
    apply_weight_masks(model, WeightMasks(drawn))
    apply_weight_masks(other, WeightMasks(by_hand(drawn)))
    return model, other


def adapters() -> tuple[Any, Any]:
    model: Any = m2m100()
    other: Any = m2m100()
    add_adapters(model, {task: task for task in TASKS}, 4)
    for parameter in (p for m in model.modules() if isinstance(m, TaskAdapters) for p in m.parameters()):
        nn.init.normal_(parameter, std=0.5)
    add_adapters(other, {task: task for task in [*TASKS, "de-fr"]}, 4)
    for name, module in model.named_modules():
        if isinstance(module, TaskAdapters):
            part, mine = "de-en" if ".encoder." in name else "en-fr", other.get_submodule(name)
            mine.groups["de-fr"].load_state_dict(module.groups[part].state_dict())
    return model, other


@pytest.mark.parametrize("pair", [neuron_masks, weight_masks, adapters])
def test_it_is_the_model_whose_direction_was_put_together_by_hand(pair: Any) -> None:
    model, other = pair()
    with nspec.task(other, "de-fr"):
        expected = logits(other)
    with combined(model, "de-en", "en-fr"):
        assert torch.equal(logits(model), expected)
    for task in ("de-en", "en-fr", None):
        with nspec.task(model, task):
            assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("pair", [neuron_masks, weight_masks, adapters])
def test_what_was_before_comes_back_also_after_an_error(pair: Any) -> None:
    model, _ = pair()
    dense = logits(model)
    with combined(model, "de-en", "en-fr"):
        pass
    assert torch.equal(logits(model), dense)
    nspec.set_task(model, "fr-en")
    before = logits(model)
    with pytest.raises(KeyError), combined(model, "de-en", "en-fr"):
        raise KeyError
    assert {layer.task for layer in specialized_layers(model)} == {"fr-en"}
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="no masks of task 'en-it'"), combined(model, "de-en", "en-it"):
        pass
    assert torch.equal(logits(model), before)


def test_the_description_names_what_is_combined() -> None:
    model, _ = neuron_masks()
    said = "de-fr is translated with masks of de-en in the encoder and masks of en-fr in the decoder"
    assert description(model, "de-fr", "de-en", "en-fr") == said
    half, drawn = m2m100(), draw({"model.decoder.layers.1.fc1": (20,)})
    nspec.specialize(half, nspec.NeuronMasks(drawn))
    assert description(half, "de-fr", "de-en", "en-fr") == "de-fr is translated with masks of en-fr in the decoder"
    assert "adapters of de-en in the encoder" in description(adapters()[0], "de-fr", "de-en", "en-fr")


def test_a_layer_in_neither_half_cannot_be_combined() -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))})
    model["middle"] = copy.deepcopy(model["encoder"])
    nspec.specialize(model, nspec.NeuronMasks(draw({"encoder.0": (4,), "middle.0": (4,)})))
    with pytest.raises(ValueError, match="'middle.0' is not said to be in the encoder or in the decoder"):
        sides_of(model)
    with pytest.raises(ValueError, match="'middle.0'"), combined(model, "de-en", "en-fr"):
        pass
    assert {layer.task for layer in specialized_layers(model)} == {None}


def test_two_directions_meet_in_the_one_language_that_both_have() -> None:
    assert parts_of("de-fr", TASKS) == ("de-en", "en-fr")
    assert parts_of("fr-de", TASKS) == ("fr-en", "en-de")
    assert parts_of("de-fr", [*TASKS, "de-it", "es-fr", "it-en"]) == ("de-en", "en-fr")


def test_of_several_languages_one_must_be_chosen() -> None:
    known = [*TASKS, "de-es", "es-fr", "de-it", "it-fr", "de-nl"]
    with pytest.raises(ValueError, match="can meet in several languages: give --pivot en, es or it"):
        parts_of("de-fr", known)
    assert parts_of("de-fr", known, "es") == ("de-es", "es-fr")
    with pytest.raises(ValueError, match="de-fr through nl needs nl-fr, which .* not trained on; en, es or it would"):
        parts_of("de-fr", known, "nl")
    with pytest.raises(ValueError, match="de-fr through xx needs de-xx and xx-fr"):
        parts_of("de-fr", known, "xx")


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("de-it", "would do, de-X and X-it, but there is only de-en and none to it"),
        ("it-de", "would do, it-X and X-de, but there is none from it and only en-de"),
        ("nl-it", "none from nl and none to it"),
    ],
)
def test_where_nothing_fits_the_error_says_what_would(task: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"^there are no masks of task '{task}'; known: .*{says}"):
        parts_of(task, TASKS)


@pytest.mark.usefixtures("one_thread")
def test_the_command_translates_such_a_direction_and_says_so_once(
    copier: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text, out = tmp_path / "model", tmp_path / "in.txt", tmp_path / "out.txt"
    shutil.copytree(copier[1] / "model", model)
    layers = {f"model.{side}.layers.0.fc1": (64,) for side in ("encoder", "decoder")}
    drawn = draw(layers)
    known = dict(zip(("de-xx", "xx-de", "de-en", "en-de"), drawn.values()))
    NeuronSpecialization(nspec.NeuronMasks(known), "forward").save(model)
    text.write_text("k l m\n" * 3, encoding="utf-8")
    arguments = ["translate", "--model", str(model), "--input", str(text), "--output", str(out), "--threads", "1"]
    assert cli.main([*arguments, "--task", "de-de", "--pivot", "en"]) == 0
    assert len(out.read_text().splitlines()) == 3
    assert [record.getMessage() for record in caplog.records if record.name.startswith("nspec")] == [
        "de-de is translated with masks of de-en in the encoder and masks of en-de in the decoder, as it was not trained"
    ]
    out.unlink()
    capsys.readouterr()
    assert cli.main([*arguments, "--task", "de-de"]) == 2
    assert "give --pivot xx or en" in capsys.readouterr().err
    assert not out.exists()
