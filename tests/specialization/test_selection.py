"""Selection to the letter: the smallest prefix of sorted counts that reaches k of the total, and the other rules."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nspec import ActivationCounts, NeuronMasks, NeuronScores, random_masks, select


def kept(counts: list[int], k: float) -> list[int]:
    masks = select(ActivationCounts({"t": {"fc1": torch.tensor(counts)}}), k)
    return masks["t"]["fc1"].nonzero().squeeze(1).tolist()


def by_definition(counts: list[int], k: str) -> list[int]:
    order = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    total, line, chosen = 0, Fraction(k) * sum(counts), []
    for i in order:
        chosen.append(i)
        total += counts[i]
        if total >= line:
            break
    return sorted(chosen)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any), st.integers(1, 1000))
def test_it_is_the_definition_in_exact_arithmetic(counts: list[int], thousandths: int) -> None:
    k = f"{thousandths / 1000}"
    assert kept(counts, float(k)) == by_definition(counts, k)


def test_a_total_reached_exactly_adds_nobody() -> None:
    assert kept([5, 3, 2], 0.5) == [0]
    assert kept([95, 3, 2], 0.95) == [0]
    assert kept([1] * 10, 0.1) == [0]  # 0.1 in binary is a little more than a tenth
    assert kept([7] * 10, 0.7) == list(range(7))


def test_ties_go_to_the_lower_index() -> None:
    assert kept([2, 4, 4, 4], 0.5) == [1, 2]


def test_k_of_one_keeps_every_neuron_that_fired() -> None:
    assert kept([0, 3, 0, 1], 1.0) == [1, 3]


@given(st.lists(st.integers(2**62 - 9, 2**63 - 1), min_size=2, max_size=9), st.integers(1, 1000))
def test_totals_beyond_64_bits_are_exact(counts: list[int], thousandths: int) -> None:
    k = f"{thousandths / 1000}"
    assert kept(counts, float(k)) == by_definition(counts, k)


@pytest.mark.parametrize("k", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_k_outside_its_range_is_an_error(k: float) -> None:
    with pytest.raises(ValueError, match=r"expected a number in \(0, 1\]"):
        kept([1, 2], k)


@pytest.mark.parametrize("k", [True, "0.5", None, torch.tensor(0.5)])
def test_what_is_no_number_is_no_k(k: object) -> None:
    with pytest.raises(TypeError, match=r"expected a number in \(0, 1\]"):
        kept([1, 2], k)


def test_a_layer_in_which_nothing_fired_is_named() -> None:
    counts = ActivationCounts({"en-de": {"a.fc1": torch.tensor([1]), "b.fc1": torch.tensor([0])}})
    with pytest.raises(ValueError, match=r"nothing fired in layer b.fc1 for task en-de"):
        select(counts)


def test_random_masks_have_the_same_sizes_and_are_reproducible() -> None:
    masks = NeuronMasks({t: {layer: torch.arange(100) < n for layer, n in (("a", 30), ("b", 70))} for t in ("x", "y")})
    one, same, other = random_masks(masks, 1), random_masks(masks, 1), random_masks(masks, 2)
    assert one.density() == masks.density()
    assert all(torch.equal(one[t][layer], same[t][layer]) for t in masks for layer in masks.layers)
    assert any(not torch.equal(one[t][layer], other[t][layer]) for t in masks for layer in masks.layers)
    assert not torch.equal(one["x"]["a"], one["y"]["a"])


def kept_of(masks: NeuronMasks) -> dict[str, dict[str, list[int]]]:
    return {t: {layer: mask.nonzero().flatten().tolist() for layer, mask in masks[t].items()} for t in masks}


TWO = {
    "a": {"x": torch.tensor([5, 9, 9, 0, 1, 0]), "y": torch.tensor([2, 0, 0, 0])},
    "b": {"x": torch.tensor([5, 1, 9, 4, 0, 0]), "y": torch.tensor([0, 3, 0, 0])},
}
TOKENS = {"a": {"x": 10, "y": 2}, "b": {"x": 20, "y": 40}}


def test_top_keeps_the_most_active_of_each_layer_or_of_the_model_by_frequency() -> None:
    counts = ActivationCounts(TWO, TOKENS)
    assert kept_of(select(counts, rule="top", share=0.33)) == {
        "a": {"x": [1, 2], "y": [0]},
        "b": {"x": [0, 2], "y": [1]},
    }
    assert kept_of(select(ActivationCounts(TWO), rule="top", share=1.0)) == {  # what never fired is not kept
        "a": {"x": [0, 1, 2, 4], "y": [0]},
        "b": {"x": [0, 1, 2, 3], "y": [1]},
    }
    assert kept_of(select(counts, rule="top", share=0.2, by_layer=False)) == {  # y of a fires for all of its tokens
        "a": {"x": [1], "y": [0]},
        "b": {"x": [0, 2], "y": []},
    }
    with pytest.raises(ValueError, match="how many tokens of a were counted is not known"):
        select(ActivationCounts(TWO), rule="top", by_layer=False)


def test_a_share_is_rounded_and_at_least_one_neuron() -> None:
    counts = ActivationCounts({"a": {"x": torch.arange(1, 11)}})
    sizes = {
        share: int(select(counts, rule="top", share=share)["a"]["x"].sum()) for share in (0.01, 0.14, 0.15, 0.25, 0.9)
    }
    assert sizes == {0.01: 1, 0.14: 1, 0.15: 2, 0.25: 3, 0.9: 9}


@pytest.mark.parametrize("score", ["gradient", "magnitude"])
def test_top_takes_scores(score: Any) -> None:
    scores = NeuronScores(
        {"a": {"x": torch.tensor([0.0, 3.0, 2.0]), "y": torch.tensor([8.0, 0.0])}}, {"a": {"x": 2, "y": 8}}, score
    )
    assert kept_of(select(scores, rule="top", share=0.5)) == {"a": {"x": [1, 2], "y": [0]}}
    assert kept_of(select(scores, rule="top", share=0.4, by_layer=False)) == {"a": {"x": [1, 2], "y": []}}
    with pytest.raises(TypeError, match=rf"rule 'share' is one of activation counts, and was given scores \({score}\)"):
        select(scores)


def test_specific_keeps_the_highest_ratios_to_the_mean_of_the_others() -> None:
    fired = {"a": [50, 40, 2, 0, 9], "b": [50, 10, 0, 30, 30], "c": [50, 0, 0, 30, 3]}
    counts = ActivationCounts({t: {"x": torch.tensor(c)} for t, c in fired.items()}, {"a": 100, "b": 100, "c": 50})
    frequency = {t: [(n + 0.5) / (int(counts.tokens[t]) + 1) for n in c] for t, c in fired.items()}
    for task, share in itertools.product(fired, (0.2, 0.4, 0.6)):
        others = [t for t in fired if t != task]
        ratio = [
            frequency[task][i] / (sum(frequency[t][i] for t in others) / 2) if fired[task][i] else 0.0 for i in range(5)
        ]
        order = sorted(range(5), key=lambda i: (-ratio[i], i))[: round(5 * share)]
        assert kept_of(select(counts, rule="specific", share=share))[task]["x"] == sorted(i for i in order if ratio[i])
    assert kept_of(select(counts, rule="specific", share=1.0))["a"]["x"] == [0, 1, 2, 4]  # 3 never fires for it


def test_specific_leaves_out_tasks_of_which_a_layer_got_no_token() -> None:
    none = torch.zeros(3).long()
    fired = {"a": torch.tensor([4, 1, 0]), "b": torch.tensor([0, 4, 4]), "c": none}
    counts = {t: {"x": c, "y": c + 1} for t, c in fired.items()}
    without = ActivationCounts(counts, {"a": 9, "b": 9, "c": {"x": 0, "y": 9}})
    two = ActivationCounts({t: counts[t] for t in "ab"}, dict.fromkeys("ab", 9)).only(["x"])
    found = kept_of(select(without, rule="specific", share=0.34))
    expected = kept_of(select(two, rule="specific", share=0.34))
    assert {t: found[t]["x"] for t in "abc"} == {t: expected[t]["x"] for t in "ab"} | {"c": []}
    alone = ActivationCounts({"a": {"x": fired["a"]}, "c": {"x": none}}, {"a": 8, "c": 0})
    with pytest.raises(ValueError, match="layer x got tokens of task a alone"):
        select(alone, rule="specific")
    with pytest.raises(ValueError, match="compares tasks, and the counts have one"):
        select(ActivationCounts({"a": {"x": fired["a"]}}, {"a": 8}), rule="specific")


def test_random_draws_a_share_or_as_many_as_other_masks_by_layer_or_in_all() -> None:
    widths = {"x": 300, "y": 100}
    counts = ActivationCounts({t: {layer: torch.ones(n).long() for layer, n in widths.items()} for t in ("a", "b")})
    like = NeuronMasks({t: {layer: torch.arange(n) < 40 for layer, n in widths.items()} for t in ("a", "b")})

    def sizes(**options: Any) -> set[tuple[int, int]]:
        masks = select(counts, rule="random", **options)
        assert not torch.equal(masks["a"]["x"], masks["b"]["x"])
        return {(int(of["x"].sum()), int(of["y"].sum())) for of in masks.values()}

    assert sizes(share=0.1) == {(30, 10)}
    assert sizes(like=like) == {(40, 40)}
    assert {sum(pair) for pair in sizes(share=0.1, by_layer=False)} == {40}
    anywhere = sizes(like=like, by_layer=False)
    assert {sum(pair) for pair in anywhere} == {80}
    assert all(50 < x < 70 for x, _ in anywhere)  # 60 expected, standard deviation 3.5
    one, same, other = (kept_of(select(counts, rule="random", share=0.1, seed=s)) for s in (1, 1, 2))
    assert one == same != other
    assert kept_of(select(counts, rule="random", like=like, seed=3)) == kept_of(random_masks(like, 3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "best"}, ValueError, "rule is 'best', expected one of 'share', 'lape', 'top', 'specific', 'random'"),
        ({"rule": None}, ValueError, "rule is None, expected one of"),
        ({"rule": "lape", "share": 0.1}, ValueError, "share is no option of rule 'lape', which takes rate"),
        ({"rule": "top", "k": 0.5}, ValueError, "k is no option of rule 'top', which takes share, by_layer"),
        ({"rate": 0.5}, ValueError, "rate is no option of rule 'share', which takes k"),
        ({"rule": "top", "seed": 1}, ValueError, "seed is no option of rule 'top'"),
        ({"rule": "top", "share": 0}, ValueError, r"share is 0, expected a number in \(0, 1\]"),
        ({"rule": "top", "share": True}, TypeError, r"share is True, expected a number in \(0, 1\]"),
        ({"rule": "top", "by_layer": "no"}, TypeError, "by_layer is 'no', expected True or False"),
        ({"rule": "random", "seed": 1.5}, TypeError, "seed is 1.5, expected a whole number"),
        ({"rule": "random", "like": {}}, TypeError, "like is a dict, expected nspec.NeuronMasks"),
        (
            {"rule": "random", "like": NeuronMasks({"a": {"x": torch.ones(6).bool()}})},
            ValueError,
            "like has 1 tasks and 1 layers that are not those of the counts",
        ),
        (
            {"rule": "random", "share": 0.1, "like": NeuronMasks({"a": {"x": torch.ones(6).bool()}})},
            ValueError,
            "share and like are both given",
        ),
    ],
)
def test_options_that_are_not_of_the_rule_are_one_clear_error(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        select(ActivationCounts(TWO, TOKENS), **options)


def test_a_task_for_which_nothing_fired_is_named() -> None:
    none = {"x": torch.zeros(6).long(), "y": torch.zeros(4).long()}
    counts = ActivationCounts({"a": TWO["a"], "b": none}, {"a": 9, "b": 9})
    for rule in ("top", "specific"):
        with pytest.raises(ValueError, match="nothing fired in any layer for task b"):
            select(counts, rule=rule)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"counts is a dict, expected nspec.ActivationCounts"):
        select(TWO)  # type: ignore[arg-type]
