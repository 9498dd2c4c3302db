"""Blocks that the caller names: by fc1, by patterns, by their linear layers; and what is said of wrong names."""

from __future__ import annotations

from typing import Any

import pytest
from families import build
from torch import nn

from nspec.specialization.layers import find_blocks


def stack(*names: str, layers: int = 2) -> nn.Module:
    """``stack.N.mlp`` with linear layers of these names: all widen but the last."""
    model = nn.Module()
    model.stack = nn.ModuleList(nn.ModuleDict({"mlp": nn.ModuleDict(_linears(names))}) for _ in range(layers))
    return model


def _linears(names: tuple[str, ...]) -> dict[str, nn.Module]:
    return {name: nn.Linear(8, 4) if name == names[-1] else nn.Linear(4, 8) for name in names}


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (["model.encoder.layers.0.fc1"], ["model.encoder.layers.0.fc1"]),
        (["*.fc1"], ["model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1"]),
        (["decoder"], ["model.decoder.layers.0.fc1"]),
        (["decoder", "*.fc1"], ["model.decoder.layers.0.fc1", "model.encoder.layers.0.fc1"]),
        ([("model.decoder.layers.0.fc1", "model.decoder.layers.0.fc2")], ["model.decoder.layers.0.fc1"]),
    ],
)
def test_names_and_patterns_of_blocks(layers: Any, found: list[str]) -> None:
    assert [block.name for block in find_blocks(build("M2M100", meta=True), layers)] == found


def test_patterns_of_a_pair_stand_for_the_same_text_in_both() -> None:
    model = build("Bert", meta=True, num_hidden_layers=11)
    pairs = find_blocks(model, [("*.intermediate.dense", "*.output.dense")])
    assert [block.name for block in pairs] == [block.name for block in find_blocks(model)]
    assert all(block.fc2 is block.parent.output.dense for block in pairs)
    some = find_blocks(model, ["layer.1?"])
    assert [block.name for block in some] == ["encoder.layer.10.intermediate.dense"]
    one = find_blocks(model, [("encoder.layer.?.intermediate.dense", "encoder.layer.?.output.dense")])
    assert len(one) == 10


def test_pairs_and_triples_with_other_names() -> None:
    model = stack("a", "b")
    [first, second] = find_blocks(model, [("stack.*.a", "stack.*.b")])
    assert (first.name, second.name, first.d_ff) == ("stack.0.mlp.a", "stack.1.mlp.a", 8)
    assert first.parent is model.stack[0]["mlp"]
    gated = stack("x", "y", "z")
    [first, _] = find_blocks(gated, [("*.y", "*.x", "*.z")])
    assert (first.name, first.up) == ("stack.0.mlp.y", gated.stack[0]["mlp"]["x"])


def test_a_gated_block_that_is_known_must_be_named_by_its_gate() -> None:
    model = build("Llama", meta=True)
    mlp = "model.layers.0.mlp"
    for names in [("gate_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj")]:
        [block] = find_blocks(model, [tuple(f"{mlp}.{name}" for name in names)])
        assert block.up is model.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match=rf"expected \('{mlp}.gate_proj', '{mlp}.up_proj', '{mlp}.down_proj'\)"):
        find_blocks(model, [("*.up_proj", "*.down_proj")])
    # A model may use the names the other way round: profiling sees whether it does.
    [block, *_] = find_blocks(model, [("*.up_proj", "*.gate_proj", "*.down_proj")])
    assert (block.name, block.up) == (f"{mlp}.up_proj", model.model.layers[0].mlp.gate_proj)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (["stack.9.mlp.a"], ValueError, r"'stack.9.mlp.a' is not fc1 of a feed-forward block here.*there are none"),
        ([("stack.0.mlp.a", "stack.0.mlp.c")], ValueError, r"'stack.0.mlp.c' is not a linear layer.*stack.0.mlp.b"),
        ([("stack.0.mlp.b", "stack.0.mlp.b")], ValueError, r"mlp.b has 4 outputs, but stack.0.mlp.b has 8 inputs"),
        ([("*.a", "*.c")], ValueError, r"no block matches .*: 2 modules match '\*.a', none with linear layers of"),
        ([("*.c", "*.b")], ValueError, r"no block matches .*: no module matches '\*.c'; known: stack.0.mlp.a"),
        ([("*.a", "stack.?.mlp.b")], ValueError, "have different wildcards"),
        ("*.a", TypeError, r"layers is '\*.a', expected a list of names"),
        ([3], TypeError, r"layers has 3, expected a name, \(fc1, fc2\) or \(gate, up, down\)"),
        ([("a",)], TypeError, r"layers has \('a',\)"),
        ([], ValueError, "no feed-forward block"),
    ],
)
def test_wrong_names_are_one_clear_error(layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_blocks(stack("a", "b"), layers)


def test_projections_of_unequal_size_are_no_gated_block() -> None:
    model = stack("a", "b", "c")
    model.stack[0]["mlp"]["b"] = nn.Linear(5, 8)
    with pytest.raises(ValueError, match="stack.0.mlp.b one of 5 and 8: expected the two projections"):
        find_blocks(model, [("stack.0.mlp.a", "stack.0.mlp.b", "stack.0.mlp.c")])
