from __future__ import annotations

import math

import pytest

from nspec.analysis.student import t_quantile, t_tail


@pytest.mark.parametrize(
    ("level", "freedom", "expected"),
    [
        (0.95, 1, 12.7062), (0.95, 2, 4.3027), (0.95, 3, 3.1824), (0.95, 4, 2.7764), (0.95, 9, 2.2622),
        (0.95, 30, 2.0423), (0.99, 2, 9.9248), (0.99, 5, 4.0321), (0.999, 10, 4.5869), (0.9, 120, 1.6577),
    ],
)  # fmt: skip
def test_quantiles_are_those_of_printed_tables(level: float, freedom: int, expected: float) -> None:
    assert t_quantile(level, freedom) == pytest.approx(expected, abs=6e-5)
    assert t_tail(expected, freedom) == pytest.approx(1 - level, rel=1e-3)


@pytest.mark.parametrize("t", [1e-9, 0.3, 1.0, 2.5, 40.0, 1e6])
def test_tails_match_the_closed_forms_of_one_two_and_four_degrees(t: float) -> None:
    # In the tail itself: 1 - (the closed form of the middle) would have no digits left at 1e6.
    assert t_tail(t, 1) == pytest.approx(2 / math.pi * math.atan(1 / t), rel=1e-12)
    root = math.sqrt(2 + t * t)
    assert t_tail(t, 2) == pytest.approx(2 / (root * (root + t)), rel=1e-12)
    s = t / math.sqrt(4 + t * t)  # 1 - s (3 - s²) / 2 is (1 - s)² (2 + s) / 2
    below = 4 / (4 + t * t) / (1 + s)
    assert t_tail(t, 4) == pytest.approx(below**2 * (3 - below) / 2, rel=1e-11)
    assert t_tail(-t, 4) == t_tail(t, 4)


def test_the_ends_are_exact_and_nonsense_is_refused() -> None:
    assert t_tail(0.0, 3) == 1.0
    assert t_tail(math.inf, 3) == t_tail(-math.inf, 3) == 0.0
    for t, freedom in ((math.nan, 3), (1.0, 0)):
        with pytest.raises(ValueError, match="degrees of freedom"):
            t_tail(t, freedom)
    with pytest.raises(ValueError, match="level is 95"):
        t_quantile(95, 3)
