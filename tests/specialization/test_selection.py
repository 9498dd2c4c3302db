"""Selection to the letter: the smallest prefix of sorted counts that reaches k of the total, ties by lower index."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nspec import ActivationCounts, NeuronMasks, random_masks, select


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


def test_the_neuron_that_crosses_the_line_is_kept() -> None:
    assert kept([5, 3, 2], 0.51) == [0, 1]


def test_a_total_reached_exactly_adds_nobody() -> None:
    assert kept([5, 3, 2], 0.5) == [0]
    assert kept([95, 3, 2], 0.95) == [0]
    assert kept([1] * 10, 0.1) == [0]  # 0.1 in binary is a little more than a tenth
    assert kept([7] * 10, 0.7) == list(range(7))


def test_ties_go_to_the_lower_index() -> None:
    assert kept([2, 4, 4, 4], 0.5) == [1, 2]


def test_k_of_one_keeps_every_neuron_that_fired() -> None:
    assert kept([0, 3, 0, 1], 1.0) == [1, 3]


def test_large_counts_are_exact() -> None:
    big = 2**53
    assert kept([big, big, 1], 1.0) == [0, 1, 2]
    assert kept([big + 1, big - 1], 0.5) == [0]


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
