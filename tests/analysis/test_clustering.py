from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nspec.analysis.clustering import average_linkage, leaf_order, newick

# Worked by hand: 0 and 1 join at 2; then 2 and 3 at 3; the clusters are (6 + 10 + 8 + 8) / 4 = 8 apart.
BY_HAND = np.array([[0, 2, 6, 10], [2, 0, 8, 8], [6, 8, 0, 3], [10, 8, 3, 0]], dtype=float)


def random_distances(objects: int, seed: int) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(objects, 3))
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def test_average_linkage_by_hand() -> None:
    linkage = average_linkage(BY_HAND)
    assert linkage.tolist() == [[0, 1, 2, 2], [2, 3, 3, 2], [4, 5, 8, 4]]
    assert leaf_order(linkage) == [0, 1, 2, 3]
    assert newick(linkage, ["de", "nl", "ru", "uk"]) == "((de:1,nl:1):3,(ru:1.5,uk:1.5):2.5);"
    assert BY_HAND[0, 0] == 0  # the matrix given is left alone


def test_a_cluster_counts_by_its_size() -> None:
    # 0, 1 and 2 join first (at 1, then 2); 3 is 4, 6 and 11 from them, so 7 from all three, not (5 + 11) / 2.
    far = np.array([[0, 1, 2, 4], [1, 0, 2, 6], [2, 2, 0, 11], [4, 6, 11, 0]], dtype=float)
    assert average_linkage(far)[:, 2] == pytest.approx([1, 2, 7])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10_000))
def test_joins_are_at_the_mean_distance_of_members_and_never_fall(objects: int, seed: int) -> None:
    far = random_distances(objects, seed)
    linkage = average_linkage(far)
    members = [[leaf] for leaf in range(objects)]
    for a, b, distance, size in linkage:
        one, other = members[int(a)], members[int(b)]
        assert distance == pytest.approx(np.mean([far[i, j] for i in one for j in other]))
        members.append(one + other)
        assert len(members[-1]) == size
    assert (np.diff(linkage[:, 2]) >= -1e-12).all()
    order = leaf_order(linkage)
    assert sorted(order) == list(range(objects))
    for cluster in members:
        places = sorted(order.index(leaf) for leaf in cluster)
        assert places == list(range(places[0], places[0] + len(cluster)))


def test_names_with_other_characters_are_quoted() -> None:
    assert newick(average_linkage(1 - np.eye(2)), ["it's (a)", "pt_BR"]) == "('it''s (a)':0.5,'pt_BR':0.5);"


def test_a_long_chain_needs_no_deep_recursion() -> None:
    far = np.abs(np.subtract.outer(2.0 ** np.arange(60), 2.0 ** np.arange(60)))
    linkage = average_linkage(far)
    assert leaf_order(linkage)[0] in (0, 59)
    assert newick(linkage, [f"l{i}" for i in range(60)]).count("(") == 59


def test_wrong_arguments_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 3\], expected \[n, n\]"):
        average_linkage(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"shape \[1, 1\], expected \[n, n\] with n of 2 or more"):
        average_linkage(np.zeros((1, 1)))
    with pytest.raises(ValueError, match=r"not symmetric or not finite"):
        average_linkage(np.array([[0, 1.0], [2.0, 0]]))
    with pytest.raises(ValueError, match=r"not symmetric or not finite"):
        average_linkage(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match=r"there are 1 names, expected one for each of 4 leaves"):
        newick(average_linkage(BY_HAND), ["de"])
