"""Systems that start from the dense model: which masks and adapters each gets."""

from __future__ import annotations

import pytest
import torch

import nspec
from nspec.run.train_systems import family_group, on_side


def masks() -> nspec.NeuronMasks:
    layers = ["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1", "model.decoder.layers.1.fc1"]
    return nspec.NeuronMasks({"en-de": {layer: torch.tensor([True, False, True]) for layer in layers}})


@pytest.mark.parametrize(("side", "count"), [("encoder", 1), ("decoder", 2), ("", 3)])
def test_one_half_of_the_model_keeps_its_masks(side: str, count: int) -> None:
    kept = on_side(masks(), side)
    assert len(kept.layers) == count
    assert all(side in layer for layer in kept.layers)
    assert kept["en-de"][kept.layers[0]].tolist() == [True, False, True]


def test_a_half_without_masks_is_an_error() -> None:
    decoder = on_side(masks(), "decoder")
    with pytest.raises(ValueError, match="no layer of the masks is in the encoder"):
        on_side(decoder, "encoder")


def test_a_half_of_some_layers_is_what_both_leave() -> None:
    assert on_side(masks().only(["layers.0"]), "decoder").layers == ["model.decoder.layers.0.fc1"]
    with pytest.raises(ValueError, match="no layer of the masks is in the encoder; there are model.decoder.layers.1"):
        on_side(masks().only(["decoder.layers.1"]), "encoder")


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        ("en-de", "en-nl", True),
        ("en-de", "de-en", False),
        ("en-de", "en-fr", False),
        ("fr-en", "it-en", True),
        ("de-fr", "nl-it", True),
        ("de-fr", "fr-de", False),
    ],
)
def test_directions_of_one_family_share_adapters(one: str, other: str, shared: bool) -> None:
    assert (family_group(one, "en") == family_group(other, "en")) is shared


@pytest.mark.parametrize(
    ("task", "families", "group"),
    [
        ("en-he", "branch", "en-Semitic"),
        ("en-he", "family", "en-Afro-Asiatic"),
        ("kn-en", "family", "Dravidian-en"),
        ("kn-en", "ec30", "Indo-Aryan-en"),
    ],
)
def test_what_a_family_is_can_be_chosen(task: str, families: str, group: str) -> None:
    assert family_group(task, "en", families) == group


def test_a_language_of_unknown_family_is_an_error() -> None:
    with pytest.raises(ValueError, match="xx"):
        family_group("en-xx", "en")
