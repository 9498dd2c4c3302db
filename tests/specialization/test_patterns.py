"""Masks and counts of some layers: which patterns match which names."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from nspec import ActivationCounts, NeuronMasks
from nspec.specialization.patterns import alike

LAYERS = [f"model.{side}.layers.{number}.fc1" for side in ("encoder", "decoder") for number in range(13)]


def masks() -> NeuronMasks:
    return NeuronMasks({t: {layer: torch.arange(3) <= n for n, layer in enumerate(LAYERS)} for t in ("en-de", "de-en")})


def matched(*patterns: str) -> list[str]:
    """The layers that are kept, as ``e0`` or ``d12``."""
    return [layer.split(".")[1][0] + layer.split(".")[3] for layer in masks().only(patterns).layers]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.encoder.layers.1.fc1", ["e1"]),
        ("encoder.layers.1", ["e1"]),
        ("layers.1", ["e1", "d1"]),
        ("decoder.layers.[12]", ["d1", "d2"]),
        ("decoder.layers.1?", ["d10", "d11", "d12"]),
        ("encoder.layers.[!0-9]*", []),
        ("encoder.layers.1*", ["e1", "e10", "e11", "e12"]),
        ("*coder.layers.12", ["e12", "d12"]),
        ("model.enc*fc1", [f"e{n}" for n in range(13)]),
        ("decoder", [f"d{n}" for n in range(13)]),
        ("Decoder", []),
        ("code", []),
        ("ncoder.layers.1", []),
        ("layers.1.fc", []),
        ("encoder.1", []),
        ("encoder.", []),
        ("", []),
    ],
)
def test_a_pattern_is_of_a_name_or_of_whole_parts_of_it(pattern: str, expected: list[str]) -> None:
    if expected:
        assert matched(pattern) == expected
    else:
        with pytest.raises(ValueError, match=r"^no layer matches .*; there are model\.encoder\.layers\.0\.fc1, "):
            matched(pattern)


def test_the_order_is_that_of_the_model_and_the_values_stay() -> None:
    assert matched("decoder.layers.2", "encoder.layers.3", "layers.3") == ["e3", "d2", "d3"]
    kept = masks().only(["encoder.layers.1"])
    assert kept.tasks == ["en-de", "de-en"]
    assert kept["de-en"][LAYERS[1]].tolist() == [True, True, False]
    counts = ActivationCounts({"t": {layer: torch.arange(4) for layer in LAYERS}}).only(["encoder"])
    assert isinstance(counts, ActivationCounts)
    assert counts.layers == LAYERS[:13]


def test_each_pattern_must_match() -> None:
    with pytest.raises(ValueError, match="no layer matches 'encoder.layers.13'"):
        matched("encoder", "encoder.layers.13")
    with pytest.raises(ValueError, match="patterns is empty"):
        masks().only([])
    with pytest.raises(TypeError, match="expected a list of texts"):
        masks().only("encoder")


def test_matching_names_does_not_load_torch() -> None:
    """Configurations are checked with it, also by ``nspec --help``."""
    code = (
        "import sys; from nspec.specialization.patterns import matching;"
        "assert matching(['a.b', 'c'], ['c', 'b']) == ['a.b', 'c']; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_layers_are_renamed_by_a_mapping_a_function_or_their_beginning() -> None:
    some = masks().only(["layers.[01]"])
    assert some.renamed({"model.encoder.layers.0.fc1": "x"}).layers == ["x", *some.layers[1:]]
    assert some.renamed(lambda name: name.replace("fc1", "wi")).layers == [n.replace("fc1", "wi") for n in some.layers]
    inside = some.renamed("model.encoder.", "enc.")
    assert inside.layers == [name.replace("model.encoder.", "enc.") for name in some.layers]
    assert torch.equal(inside["de-en"]["enc.layers.1.fc1"], some["de-en"]["model.encoder.layers.1.fc1"])
    assert some.renamed("", "a.").renamed("a.", "").layers == some.layers


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (
            (lambda name: "x",),
            ValueError,
            r"layers.0.fc1 and model.encoder.layers.1.fc1 would both be called x",
        ),
        ((lambda name: "",), ValueError, "is no name"),
        ((lambda name: 3,), TypeError, "layer 3 is int"),
        (({"y": "x"},), ValueError, "there is no layer 'y'"),
        (("encoder.", "x."), ValueError, "no layer begins with 'encoder.'"),
        (("model.",), TypeError, "expected|two texts"),
        (({}, "x"), TypeError, "replacement is 'x', expected None beside a dict"),
        ((3,), TypeError, "names is a int, expected a mapping, a function or a text"),
    ],
)
def test_wrong_new_names_are_one_clear_error(names: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        masks().renamed(*names)


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("encoder.layers.0.fc1", ["model.encoder.layers.0.fc1", "model.encoder.layers.1.fc1"], 0),
        ("model.encoder.layers.0.fc1", ["encoder.layers.0.fc1"], 0),
        ("a.fc1", ["module.base_model.model.a.fc1"], 0),
        ("a.0.fc1", ["a.0._orig_mod.fc1"], 0),
        ("a.fc1", ["model.a.fc1", "a.fc1"], 1),
        ("a.fc1", ["b.a.fc1"], None),
        ("a.model.fc1", ["a.fc1"], None),
    ],
)
def test_names_are_alike_but_for_wrappers(name: str, known: list[str], found: int | None) -> None:
    assert alike([name], known) == ({} if found is None else {name: known[found]})


def test_names_that_are_alike_in_two_ways_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^a.fc1 may be module.a.fc1 or model.a.fc1 of the model.*masks.renamed"):
        alike(["a.fc1"], ["module.a.fc1", "model.a.fc1"])
    with pytest.raises(ValueError, match=r"^model.a.fc1 and module.a.fc1 may both be a.fc1"):
        alike(["model.a.fc1", "module.a.fc1"], ["a.fc1"])
