"""LAPE to the letter: a quantile of all probabilities, entropies of the whole model, neurons of several languages."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FAMILIES, make
from torch import Tensor

import nspec
from nspec import ActivationCounts, load_lape, select
from nspec.specialization.lape import _entropy
from nspec.specialization.layers import find_blocks

ROWS = {  # neuron -> how often it fires for a, b, c, of 100, 200 and 50 tokens
    "x": [[90, 0, 0], [90, 180, 45], [0, 0, 0], [80, 160, 1]],
    "y": [[1, 1, 1], [0, 190, 0], [2, 0, 0]],
}
TOKENS = {"a": 100, "b": 200, "c": 50}


def counts_of(rows: dict[str, list[list[int]]], tokens: dict[str, int] = TOKENS) -> ActivationCounts:
    tasks = list(tokens)
    layers = {
        t: {layer: torch.tensor([row[i] for row in of]) for layer, of in rows.items()} for i, t in enumerate(tasks)
    }
    return ActivationCounts(layers, tokens)


def kept(masks: nspec.NeuronMasks) -> dict[str, list[tuple[str, int]]]:
    return {
        t: [(layer, i) for layer in masks.layers for i in masks[t][layer].nonzero().flatten().tolist()] for t in masks
    }


def by_definition(counts: ActivationCounts, rate: float) -> dict[str, list[tuple[str, int]]]:
    """The rule in plain Python."""
    tasks = counts.tasks
    p: dict[tuple[str, int], list[float]] = {}
    for layer in counts.layers:
        for i in range(len(counts[tasks[0]][layer])):
            p[layer, i] = [int(counts[t][layer][i]) / counts.tokens[t] for t in tasks]
    every = sorted(value for values in p.values() for value in values)
    tau = every[round(0.95 * len(every)) - 1]
    entropies = []
    for place, (neuron, values) in enumerate(p.items()):
        total = sum(sorted(values))
        shares = [v / total for v in sorted(values)] if total else []
        entropy = -math.fsum(q * math.log(q) for q in shares if q)
        if any(v > tau for v in values):
            entropies.append((round(entropy, 12), place, neuron))
    chosen = {neuron for _, _, neuron in sorted(entropies)[: round(rate * len(p))]}
    return {t: [n for n, values in p.items() if n in chosen and values[i] > tau] for i, t in enumerate(tasks)}


def test_a_table_by_hand_whose_last_language_gets_none() -> None:
    # 21 probabilities; the round(19.95) = 20th is 0.9, so that 0.95 alone is above it.
    with pytest.warns(UserWarning, match="rule 'lape' keeps|no neuron is of") as said:
        found = select(counts_of(ROWS), rule="lape", rate=1.0)
    assert kept(found) == {"a": [], "b": [("y", 1)], "c": []} == by_definition(counts_of(ROWS), 1.0)
    assert [str(w.message).partition(":")[0] for w in said] == [
        "rule 'lape' keeps 1 neurons, expected 7 (rate 1.0 of 7)",
        "no neuron is of a, c",
    ]
    assert said[0].filename == said[1].filename == __file__
    assert not any(found["c"][layer].any() for layer in found.layers)


@pytest.mark.filterwarnings("ignore:no neuron is of")
def test_a_neuron_is_of_every_language_above_the_threshold_and_the_lowest_entropies_win() -> None:
    # 240 probabilities, of which 12 are above the 228th: 0.5.
    tokens = {"a": 10, "b": 20, "c": 10, "d": 10}
    rows = {"x": [[5, 10, 5, 5]] * 56, "y": [[9, 18, 0, 0], [9, 0, 0, 0], [0, 18, 9, 9], [9, 18, 9, 9]]}
    counts = counts_of(rows, tokens)
    rows["y"][3] = [8, 16, 0, 0]
    counts = counts_of(rows, tokens)
    assert sum(v / t > 0.5 for row in rows["y"] for v, t in zip(row, tokens.values())) == 8
    found = select(counts, rule="lape", rate=0.05)  # 3 neurons of 60
    assert kept(found) == {"a": [("y", 0), ("y", 1), ("y", 3)], "b": [("y", 0), ("y", 3)], "c": [], "d": []}


def test_never_firing_neurons_have_the_lowest_entropy_and_are_never_kept() -> None:
    rows = {"x": [[0, 0]] * 40 + [[7, 1]], "y": [[0, 0]] * 3 + [[1, 6]]}
    counts = counts_of(rows, {"a": 10, "b": 10})
    assert kept(select(counts, rule="lape", rate=0.03)) == {"a": [("x", 40)], "b": [("x", 40)]}  # 1 of 45: tau is 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = kept(select(counts, rule="lape", rate=1.0))
    assert found == {"a": [("x", 40), ("y", 3)], "b": [("x", 40), ("y", 3)]}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_it_is_the_definition_on_any_table(data: st.DataObject) -> None:
    tasks = data.draw(st.integers(2, 4))
    tokens = {f"t{i}": data.draw(st.sampled_from([7, 40, 64])) for i in range(tasks)}
    firing = st.tuples(*[st.one_of(st.just(0), st.integers(0, n)) for n in tokens.values()]).map(list)
    rows = {layer: data.draw(st.lists(firing, min_size=1, max_size=25)) for layer in ("x", "y")}
    counts = counts_of(rows, tokens)
    rate = data.draw(st.sampled_from([0.05, 0.3, 1.0]))
    expected = by_definition(counts, rate)
    if not any(expected.values()):
        few = round(rate * sum(map(len, rows.values()))) == 0
        with pytest.raises(ValueError, match="is less than one" if few else "no neuron fires for a task more often"):
            select(counts, rule="lape", rate=rate)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert kept(select(counts, rule="lape", rate=rate)) == expected


@pytest.mark.filterwarnings("ignore:no neuron is of")
def test_ties_go_to_the_earlier_layer_and_index_and_the_order_of_tasks_does_not_matter() -> None:
    rows = {"x": [[0, 1, 2, 3]] * 30 + [[9, 3, 1, 0]], "y": [[0, 1, 3, 9], [3, 9, 0, 1], [1, 0, 9, 3]]}
    tokens = dict.fromkeys("abcd", 10)
    found = kept(select(counts_of(rows, tokens), rule="lape", rate=0.06))  # two of four with the same entropy
    assert found == {"a": [("x", 30)], "b": [], "c": [], "d": [("y", 0)]}
    turned = {layer: [row[::-1] for row in of] for layer, of in rows.items()}
    assert kept(select(counts_of(turned, dict.fromkeys("dcba", 10)), rule="lape", rate=0.06)) == found


def test_the_entropy_is_of_shares_bitwise_the_same_in_any_order_and_0_of_what_never_fires() -> None:
    p = torch.rand(100_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p[0] = 0
    entropy = _entropy(p)
    assert torch.equal(entropy, _entropy(p[:, [2, 0, 1]]))
    q = p[1:] / p[1:].sum(1, keepdim=True)
    torch.testing.assert_close(entropy[1:], torch.distributions.Categorical(q).entropy(), rtol=0, atol=1e-11)
    assert entropy[0] == 0


@pytest.mark.parametrize(
    ("counts", "rate", "message"),
    [
        (
            ActivationCounts({"a": {"x": torch.ones(9).long()}}, {"a": 9}),
            0.5,
            "compares tasks, and the counts have one",
        ),
        (
            ActivationCounts({t: {"x": torch.ones(9).long()} for t in "ab"}),
            0.5,
            "how many tokens of a were counted is not",
        ),
        (counts_of({"x": [[1, 0]]}, {"a": 9, "b": 0}), 1.0, "no token of task b was counted"),
        (counts_of({"x": [[1, 1]] * 9}, {"a": 9, "b": 9}), 0.01, "rate 0.01 of 9 neurons is less than one"),
        (
            counts_of({"x": [[1, 1]] * 9}, {"a": 9, "b": 9}),
            0.5,
            "no neuron fires for a task more often than 0.111 of its",
        ),
        (counts_of({"x": [[1, 1]] * 9}, {"a": 9, "b": 9}), 1.5, r"rate is 1.5, expected a number in \(0, 1\]"),
    ],
)
def test_what_lape_cannot_select_from_is_one_clear_error(counts: ActivationCounts, rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(counts, rule="lape", rate=rate)


def released(*languages: list[list[int]]) -> list[list[Tensor]]:
    return [[torch.tensor(index).long() for index in layers] for layers in languages]


@pytest.fixture(scope="module")
def llama() -> Any:
    return make(FAMILIES["Llama"]._replace(options=FAMILIES["Llama"].options | {"num_hidden_layers": 2}))


def test_released_lists_are_read_where_the_last_languages_got_none(tmp_path: Path, llama: Any) -> None:
    torch.save(released([[0, 5, 71], []], [[], [3]]), tmp_path / "masks.pth")
    with pytest.warns(UserWarning, match="no neuron is of is, mt") as said:
        masks = load_lape(tmp_path / "masks.pth", ["cy", "ga", "is", "mt"], llama)
    assert said[0].filename == __file__
    first, second = (block.name for block in find_blocks(llama))
    assert kept(masks) == {"cy": [(first, 0), (first, 5), (first, 71)], "ga": [(second, 3)], "is": [], "mt": []}
    assert masks.layers == [first, second]


def test_what_is_selected_and_written_as_the_release_does_is_read_back(tmp_path: Path, llama: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [(block.name, block.d_ff) for block in find_blocks(llama)]
    draw = lambda: {name: torch.randint(0, 100, (d_ff,), generator=generator) for name, d_ff in layers}
    masks = select(ActivationCounts({t: draw() for t in "abc"}, dict.fromkeys("abc", 100)), rule="lape", rate=0.05)
    lists = [[mask.nonzero().flatten() for mask in masks[t].values()] for t in masks]
    torch.save(lists, tmp_path / "masks.pth")
    assert kept(load_lape(tmp_path / "masks.pth", ["a", "b", "c"], llama)) == kept(masks)


@pytest.mark.parametrize(
    ("written", "tasks", "message"),
    [
        (released([[0], [1]], [[0], [1]]), ["cy"], "neurons of 2 languages, but 1 are named: cy"),
        (released([[0], [1], [2]]), ["cy"], "3 layers for cy, but the model 2 feed-forward blocks"),
        (released([[0, 72], []]), ["cy"], "cy, model.layers.0.mlp.gate_proj: found neurons 0 to 72, expected 0 to 71"),
        (released([[], [-1]]), ["cy"], "found neurons -1 to -1"),
        (released([[3, 3], []]), ["cy"], "not ascending, or one stands there twice"),
        ([[torch.tensor([1.0]), torch.tensor([])]], ["cy"], r"found torch.float32 \[1\], expected an int64 tensor"),
        ({"cy": []}, ["cy"], r"holds a dict, expected a torch.save of list\[language\]\[layer\]"),
        ([torch.tensor([1])], ["cy"], "something else than a list of tensors at place 0"),
        (Path("x"), ["cy"], "cannot be read .*expected a torch.save of"),
        (released([[0], [1]]), ["cy", "cy"], "expected one or more different names"),
        (released([[0], [1]]), "cy", "expected a list of the names of the languages"),
    ],
)
def test_files_that_are_not_such_lists_are_one_clear_error(
    tmp_path: Path, llama: Any, written: Any, tasks: Any, message: str
) -> None:
    torch.save(written, tmp_path / "masks.pth")
    with pytest.raises((ValueError, TypeError), match=message):
        load_lape(tmp_path / "masks.pth", tasks, llama)


def test_a_file_that_is_no_archive_or_not_there_is_named(tmp_path: Path, llama: Any) -> None:
    (tmp_path / "masks.pth").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"masks.pth cannot be read"):
        load_lape(tmp_path / "masks.pth", ["cy"], llama)
    with pytest.raises(FileNotFoundError, match=r"none.pth"):
        load_lape(tmp_path / "none.pth", ["cy"], llama)
