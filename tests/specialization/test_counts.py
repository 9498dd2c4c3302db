"""Counts know of how many tokens they are: of each task, and of each layer where layers differ."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, m2m100
from safetensors import safe_open
from safetensors.torch import save_file

import nspec
from nspec import ActivationCounts

LAYERS = {"x": torch.tensor([1, 6, 3]), "y": torch.tensor([0, 2])}


def test_tokens_are_one_number_or_one_for_each_layer() -> None:
    counts = ActivationCounts({"a": LAYERS, "b": LAYERS, "c": LAYERS}, tokens={"a": 8, "b": {"y": 2, "x": 8}})
    assert counts.tokens == {"a": 8, "b": {"x": 8, "y": 2}, "c": None}
    assert ActivationCounts({"a": LAYERS}, {"a": {"x": 8, "y": 8}}).tokens == {"a": 8}
    with pytest.raises(ValueError, match=r"how many tokens of c were counted is not known.*tokens=\{...\}"):
        counts.rates()
    rates = ActivationCounts({"b": LAYERS}, {"b": {"x": 8, "y": 2}}).rates()["b"]
    assert rates["x"].tolist() == [1 / 8, 6 / 8, 3 / 8]
    assert rates["y"].tolist() == [0.0, 1.0]
    assert rates["x"].dtype == torch.float64


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ({"z": 8}, ValueError, "tokens has task 'z', expected those of the counts: a"),
        ({"a": 5}, ValueError, "tokens of a, x is 5, expected 6 or more"),
        ({"a": 2**63}, ValueError, "expected 6 or more"),
        ({"a": {"x": 8}}, ValueError, "other layers than the counts: 'y'"),
        ({"a": {"x": 8, "y": 8, "z": 8}}, ValueError, "other layers than the counts: 'z'"),
        ({"a": 8.0}, TypeError, "tokens of a, x is 8.0, expected a whole number"),
        ({"a": True}, TypeError, "expected a whole number"),
        (8, TypeError, "tokens is a int, expected a mapping"),
    ],
)
def test_wrong_tokens_are_one_clear_error(tokens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ActivationCounts({"a": LAYERS}, tokens)


def test_tokens_add_up_as_counts_do_and_are_unknown_where_one_part_is() -> None:
    one = ActivationCounts({"a": LAYERS, "b": LAYERS}, {"a": 8, "b": 8})
    two = ActivationCounts({"a": LAYERS, "c": LAYERS}, {"a": {"x": 10, "y": 7}, "c": 9})
    assert (one + two).tokens == {"a": {"x": 18, "y": 15}, "b": 8, "c": 9}
    assert (one + ActivationCounts({"a": LAYERS})).tokens == {"a": None, "b": 8}
    assert (ActivationCounts({"a": LAYERS}) + one).tokens == {"a": None, "b": 8}


def test_tokens_follow_layers_that_are_chosen_and_renamed() -> None:
    counts = ActivationCounts({"a": LAYERS}, {"a": {"x": 8, "y": 3}})
    assert counts.only(["y"]).tokens == {"a": 3}
    assert counts.renamed({"x": "z"}).tokens == {"a": {"z": 8, "y": 3}}
    assert counts.renamed("", "model.").tokens == {"a": {"model.x": 8, "model.y": 3}}


def test_tokens_are_saved_and_older_files_load_without(tmp_path: Path) -> None:
    counts = ActivationCounts({"a": LAYERS, "b": LAYERS, "c": LAYERS}, {"a": 8, "b": {"x": 8, "y": 2}})
    counts.save(tmp_path)
    assert ActivationCounts.load(tmp_path).tokens == counts.tokens
    assert json.loads((tmp_path / "counts.json").read_text())["tokens"] == {"a": 8, "b": {"x": 8, "y": 2}}
    ActivationCounts({"a": LAYERS}).save(tmp_path)
    assert "tokens" not in json.loads((tmp_path / "counts.json").read_text())
    assert ActivationCounts.load(tmp_path).tokens == {"a": None}


@pytest.mark.parametrize("tokens", [{"a": 2}, {"a": 8.5}, {"b": 8}, [8], {"a": {"x": 8}}])
def test_wrong_tokens_in_a_file_are_one_clear_error(tmp_path: Path, tokens: Any) -> None:
    ActivationCounts({"a": LAYERS}, {"a": 8}).save(tmp_path)
    path = tmp_path / "counts.safetensors"
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["nspec"]) | {"tokens": tokens}
        tensors = {layer: file.get_tensor(layer) for layer in LAYERS}
    about.pop("sha256")
    digest = hashlib.sha256(json.dumps(about).encode())
    for layer, tensor in tensors.items():
        digest.update(json.dumps([layer, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    save_file(tensors, path, {"nspec": json.dumps(about | {"sha256": digest.hexdigest()})})
    with pytest.raises(ValueError, match=r"counts.safetensors is broken: tokens .*; write it again$"):
        ActivationCounts.load(tmp_path)


def test_profiling_counts_the_tokens_of_each_side() -> None:
    model, batches = m2m100(), [batch(seed) for seed in range(1, 3)]
    counts = nspec.profile(model, {"t": batches})
    tokens = counts.tokens["t"]
    assert isinstance(tokens, dict)
    for layer, number in tokens.items():
        real = [b["labels"] != -100 if "decoder" in layer else b["attention_mask"].bool() for b in batches]
        assert number == sum(int(mask.sum()) for mask in real)
    everything = nspec.profile(model, {"t": batches}, padding="include").tokens["t"]
    assert everything == {layer: 2 * 3 * (7 if "decoder" in layer else 9) for layer in counts.layers}
