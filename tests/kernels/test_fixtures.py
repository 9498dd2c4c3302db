"""What the tests of the operators rely on: poisoned memory, layouts that keep the values, comparisons that can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

OPERATOR = "row_sparse_wgrad"


def test_memory_taken_under_poison_is_nan_and_ordinary_again_afterwards(poison: Any) -> None:
    like = torch.zeros(3, 4)
    with poison((3, 4)):
        made = [torch.empty(3, 4), torch.empty_like(like), like.new_empty(3, 4), torch.empty_strided((3, 4), (1, 3))]
        made.append(torch.ops.aten.new_empty(like, [3, 4]))
        counts = torch.empty(5, dtype=torch.int64)
    assert all(t.isnan().all() for t in made)
    assert (counts > 2**60).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_layout_keeps_the_values_and_has_nothing_usable_around_them(draw: Any, layout: Any) -> None:
    t = draw.normal(5, 7)
    other = layout(t)
    assert torch.equal(other, t)
    assert (other.stride(), other.storage_offset()) != (t.stride(), t.storage_offset())
    storage = torch.empty(0, device=t.device).set_(other.untyped_storage())
    assert int((~storage.isnan()).sum()) == t.numel()


@pytest.mark.parametrize("kind", ["random", "block", "second", "ends"])
def test_sets_have_the_size_that_is_asked_for(draw: Any, kind: str) -> None:
    for n in (0, 1, 30, 69, 70):
        assert int(draw.active(70, n, kind).sum()) == n


def test_comparisons_notice_a_bit_and_an_error(compare: Any) -> None:
    zeros, nan = torch.zeros(3), torch.full((3,), float("nan"))
    assert compare.same_bits(nan, nan.clone())
    assert not compare.same_bits(zeros, -zeros)
    exact = torch.ones(3)
    compare.no_worse_than_twice("x", exact + 2e-3, exact + 1e-3, exact)
    with pytest.raises(AssertionError, match="x: error"):
        compare.no_worse_than_twice("x", exact + 3e-3, exact + 1e-3, exact)
    compare.within("x", exact + 1e-3, exact, 2e-3 * exact)
    with pytest.raises(AssertionError, match="x: beyond the bound"):
        compare.within("x", exact + 3e-3, exact, 2e-3 * exact)
    with pytest.raises(AssertionError, match="x is not finite"):
        compare.within("x", nan, exact, exact)
