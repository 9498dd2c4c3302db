from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nspec.analysis import mantel as module
from nspec.analysis.mantel import condensed, holm, mantel


def distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - points[None], axis=2)


def noise(objects: int, seed: int) -> np.ndarray:
    return distances(np.random.default_rng(seed).normal(size=(objects, 3)))


def planted(objects: int, seed: int, share: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Two matrices over points that are the same up to noise."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(objects, 3))
    return distances(points), distances(share * points + (1 - share) * rng.normal(size=points.shape))


def square(values: list[float]) -> np.ndarray:
    n = round((1 + math.sqrt(1 + 8 * len(values))) / 2)
    matrix = np.zeros((n, n))
    matrix[np.triu_indices(n, 1)] = values
    return matrix + matrix.T


def most_false_alarms(runs: int, level: float) -> int:
    """The count that a binomial variable exceeds with a probability under 1e-4: the bound of an exact test."""
    tail, count = 1.0, 0
    while tail > 1e-4:
        tail -= math.comb(runs, count) * level**count * (1 - level) ** (runs - count)
        count += 1
    return count - 1


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_a_planted_correlation_is_found(method: module.Correlation) -> None:
    for seed in range(5):
        found = mantel(*planted(12, seed), method=method, permutations=999, seed=seed)
        assert found.p == 0.001  # (0 + 1) / (999 + 1)
        assert not found.exact
        assert found.low < found.r < found.high
        assert found.low > 0.3
        assert mantel(*planted(12, seed), method=method, alternative="less", permutations=99).p > 0.9


@pytest.mark.parametrize("objects", [6, 14])  # exact and random relabellings
@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_noise_raises_false_alarms_at_the_level(objects: int, alternative: module.Alternative) -> None:
    runs = 300
    p = [
        mantel(
            noise(objects, seed),
            noise(objects, 10_000 + seed),
            alternative=alternative,
            permutations=799 if objects == 6 else 199,
            seed=seed,
        ).p
        for seed in range(runs)
    ]
    alarms = sum(value <= 0.05 for value in p)
    assert alarms <= most_false_alarms(runs, 0.05)
    # A test that never rejects keeps its level too: p values of noise are spread evenly.
    assert alarms >= 3
    assert 0.4 < np.mean(p) < 0.6


def test_the_correlation_is_that_of_the_distances_above_the_diagonal() -> None:
    x, y = noise(9, 1), noise(9, 2)
    assert mantel(x, y, permutations=9).r == pytest.approx(np.corrcoef(condensed(x), condensed(y))[0, 1])
    tied = np.round(y, 1)
    by_rank = stats.spearmanr(condensed(x), condensed(tied)).statistic
    assert mantel(x, tied, method="spearman", permutations=9).r == pytest.approx(by_rank)


def test_exact_p_of_three_objects_by_hand() -> None:
    # The six relabellings of three objects are the six orders of their distances 1, 2, 3. Against 1, 2, 3 the
    # correlations are 1, 1/2, 1/2, -1/2, -1/2, -1.
    y = square([1, 2, 3])
    for values, r, greater, less, both in (
        ([1, 2, 3], 1, 1, 6, 2),
        ([1, 3, 2], 0.5, 3, 5, 6),
        ([3, 1, 2], -0.5, 5, 3, 6),
        ([3, 2, 1], -1, 6, 1, 2),
    ):
        for alternative, count in (("greater", greater), ("less", less), ("two-sided", both)):
            found = mantel(square(values), y, alternative=alternative)  # type: ignore[arg-type]
            assert found.r == pytest.approx(r)
            assert found.p == pytest.approx(count / 6)
            assert (found.exact, found.permutations) == (True, 6)


def test_exact_p_where_a_tree_makes_many_relabellings_equal() -> None:
    # Two pairs of two: of the 24 relabellings 8 keep the pairs together, and those have the correlation found. Rounding
    # must not tell them apart.
    tree = square([0.1, 0.7, 0.7, 0.7, 0.7, 0.1])
    found = mantel(tree, tree / 3 + 0.1 - 0.1 * np.eye(4) - tree * np.eye(4) / 3)
    assert found.r == pytest.approx(1)
    assert found.p == pytest.approx(8 / 24)


def test_exact_p_is_the_share_of_all_relabellings() -> None:
    x, y = noise(5, 3), noise(5, 4)
    r = mantel(x, y).r
    drawn = [
        np.corrcoef(condensed(x[np.ix_(order, order)]), condensed(y))[0, 1]
        for order in itertools.permutations(range(5))
    ]
    assert mantel(x, y).p == pytest.approx(np.mean([value >= r - 1e-9 for value in drawn]))
    assert mantel(x, y, alternative="two-sided").p == pytest.approx(np.mean([abs(v) >= abs(r) - 1e-9 for v in drawn]))
    # Random relabellings estimate the same.
    assert mantel(x, y, permutations=119).exact is False
    many = [mantel(x, y, permutations=119, seed=seed).p for seed in range(200)]
    assert np.mean(many) == pytest.approx(mantel(x, y).p, abs=0.02)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.permutations(range(6)), st.sampled_from(["pearson", "spearman"]))
def test_the_order_of_objects_does_not_matter(seed: int, order: list[int], method: module.Correlation) -> None:
    x, y = planted(6, seed, 0.5)
    one = mantel(x, y, method=method)
    other = mantel(x[np.ix_(order, order)], y[np.ix_(order, order)], method=method)
    assert (other.r, other.p, other.low, other.high) == pytest.approx((one.r, one.p, one.low, one.high))


def test_a_seed_gives_the_same_answer_whatever_the_size_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = planted(10, 7, 0.4)
    whole = mantel(x, y, permutations=500, seed=3)
    assert mantel(x, y, permutations=500, seed=3) == whole
    assert mantel(x, y, permutations=500, seed=4) != whole
    monkeypatch.setattr(module, "_CHUNK", 45 * 7)
    assert mantel(x, y, permutations=500, seed=3) == whole


def test_partial_correlation_removes_what_the_control_explains() -> None:
    rng = np.random.default_rng(5)
    cause = rng.normal(size=(14, 2))
    x, y = (distances(cause + 0.5 * rng.normal(size=cause.shape)) for _ in range(2))
    plain = mantel(x, y, permutations=999)
    partial = mantel(x, y, control=distances(cause), permutations=999)
    assert plain.p < 0.01
    assert partial.r < plain.r - 0.2
    # The definition: correlation of what is left of x and y after a regression on the control.
    a, b, z = condensed(x), condensed(y), condensed(distances(cause))
    left = [v - np.polyval(np.polyfit(z, v, 1), z) for v in (a, b)]
    assert partial.r == pytest.approx(np.corrcoef(*left)[0, 1])
    third = mantel(*planted(14, 6), control=noise(14, 8), permutations=999)
    assert third.p == 0.001


def test_exact_partial_p_is_the_share_of_relabellings_of_x() -> None:
    x, y, z = noise(5, 1), noise(5, 2), noise(5, 3)
    found = mantel(x, y, control=z)

    def partial(order: tuple[int, ...]) -> float:
        a, b, c = condensed(x[np.ix_(order, order)]), condensed(y), condensed(z)
        left = [v - np.polyval(np.polyfit(c, v, 1), c) for v in (a, b)]
        return np.corrcoef(*left)[0, 1]

    drawn = np.array([partial(order) for order in itertools.permutations(range(5))])
    assert found.p == pytest.approx((drawn >= found.r - 1e-9).mean())


def test_the_interval_covers_the_correlation_of_many_objects() -> None:
    rng = np.random.default_rng(11)

    def draw(objects: int) -> tuple[np.ndarray, np.ndarray]:
        points = rng.normal(size=(objects, 3))
        return distances(points), distances(0.8 * points + 0.6 * rng.normal(size=points.shape))

    truth = np.corrcoef(*(condensed(matrix) for matrix in draw(800)))[0, 1]
    intervals = [mantel(*draw(25), permutations=1) for _ in range(200)]
    covered = np.mean([found.low <= truth <= found.high for found in intervals])
    assert covered > 0.88
    x, y = draw(25)
    narrow, wide = (mantel(x, y, permutations=1, level=level) for level in (0.95, 0.99))
    assert wide.low < narrow.low < narrow.r < narrow.high < wide.high


def test_the_interval_is_the_jackknife_of_atanh_r_with_students_t() -> None:
    x, y = planted(5, 2, 0.5)
    found = mantel(x, y)
    kept = [np.delete(np.arange(5), i) for i in range(5)]
    others = np.arctanh([mantel(x[np.ix_(k, k)], y[np.ix_(k, k)]).r for k in kept])
    error = math.sqrt(4 / 5 * ((others - others.mean()) ** 2).sum())
    reach = 2.776445 * error  # 4 degrees of freedom, from a printed table
    expected = np.tanh(np.arctanh(found.r) + np.array([-reach, reach]))
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-6)


def test_there_is_no_interval_where_one_object_makes_the_whole_difference() -> None:
    odd = square([1, 1, 2, 1, 2, 2])  # without the last object all are equally far apart
    found = mantel(odd, noise(4, 0))
    assert math.isfinite(found.p)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, which may not fall.
    assert holm([0.02, 0.01, 0.04, 0.03]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]).tolist() == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_adjusted_values_are_ordered_like_the_raw_ones_and_never_below_them(p: list[float]) -> None:
    adjusted = holm(p)
    assert (adjusted >= np.array(p)).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


GOOD = square([1, 2, 3])


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (np.ones((2, 3)), GOOD, {}, r"x has shape \[2, 3\], expected \[n, n\] with n of 3 or more"),
        (np.zeros((2, 2)), GOOD, {}, r"x has shape \[2, 2\]"),
        (GOOD, noise(4, 0), {}, r"y is of 4 objects and x of 3"),
        (GOOD, GOOD, {"control": noise(4, 0)}, r"control is of 4 objects and x of 3"),
        (GOOD * np.nan, GOOD, {}, r"x holds NaN or infinity"),
        (GOOD, GOOD + np.eye(3), {}, r"y is no matrix of distances"),
        (GOOD, np.triu(GOOD), {}, r"y is no matrix of distances"),
        (GOOD, square([2, 2, 2]), {}, r"all distances of y are 2: a correlation needs different ones"),
        (GOOD, square([1, 3, 2]), {"control": GOOD}, r"control explains x or y wholly"),
        (GOOD, GOOD, {"method": "kendall"}, r"method is 'kendall', expected one of pearson, spearman"),
        (GOOD, GOOD, {"alternative": "both"}, r"alternative is 'both', expected one of greater, less, two-sided"),
        (GOOD, GOOD, {"permutations": 0}, r"permutations is 0, expected 1 or more"),
        (GOOD, GOOD, {"level": 95}, r"level is 95, expected a share between 0 and 1"),
    ],
)
def test_wrong_arguments_are_one_line(x: np.ndarray, y: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mantel(x, y, **options)


def test_what_is_no_probability_is_an_error() -> None:
    for wrong in ([0.5, 1.5], [-0.1], [float("nan")]):
        with pytest.raises(ValueError, match=r"expected a list of numbers from 0 to 1"):
            holm(wrong)
