"""Which of many figures moved between two sides, given repeated measurements of each: paired t-test, Holm's correction.

A figure is the logarithm of a time, so that a difference is a relative change. Blocks of the two sides are measured in
turn, each in a process of its own; the difference of neighbouring blocks is one observation. A case has moved if

1. Student's t-test on the differences rejects "no change", at a level that holds for all cases *together* (Holm): where
   nothing changed, a whole comparison shows any moved case with a probability of at most ``LEVEL``;
2. the change is larger than the usual difference between two blocks of the *same* side (root mean square), so that one
   who runs either side once sees it too;
3. and larger than ``LEAST``: less is the layout of code and memory, which no number of blocks averages away.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.05
"""Probability that a comparison of equal sides shows a moved case, and one less the coverage of each interval."""
LEAST = 0.02
"""The smallest relative change that counts, as a difference of logarithms."""


@dataclass(frozen=True)
class Change:
    """The change of one case, in differences of natural logarithms of times: positive is slower.

    Attributes:
        mean: of the paired differences.
        low: lower end of the 95 % interval of the mean, of this case alone.
        high: its upper end.
        noise: usual difference between two blocks of the same side (root mean square).
        p: of the t-test, corrected for the number of cases.
        verdict: ``slower``, ``faster`` or ``within noise``.
    """

    mean: float
    low: float
    high: float
    noise: float
    p: float
    verdict: str


def t_within(t: float, freedom: int) -> float:
    """Probability that Student's t with that many degrees of freedom lies between ``-t`` and ``t``.

    The closed forms for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine2 = math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for i in range(1 + odd, freedom, 2):
        total += term
        term *= cosine2 * i / (i + 1)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def t_quantile(probability: float, freedom: int) -> float:
    """The ``t`` with :func:`t_within` equal to ``probability``, by bisection."""
    low, high = 0.0, 1.0
    while t_within(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, freedom) < probability else (low, middle)
    return high


def holm(values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values: rejecting those at most ``a`` errs anywhere with probability at most ``a``."""
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected = [0.0] * len(values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, values[i] * (len(values) - rank)))
        corrected[i] = largest
    return corrected


def changes(base: Mapping[str, Sequence[float]], head: Mapping[str, Sequence[float]]) -> dict[str, Change]:
    """The verdict on every case.

    Args:
        base: by case, the logarithm of its time in each block, in the order of measuring.
        head: the same for the other side; block ``i`` is the neighbour of block ``i`` of ``base``.

    Raises:
        ValueError: sides with other cases or numbers of blocks, or fewer than two blocks.
    """
    if base.keys() != head.keys():
        raise ValueError(f"the sides have other cases: {sorted(base.keys() ^ head.keys())}")
    means, errors, noises, ps = {}, {}, {}, {}
    for name, before in base.items():
        after = head[name]
        if len(before) != len(after) or len(before) < 2:
            raise ValueError(f"{name}: {len(before)} and {len(after)} blocks; expected the same number, two or more")
        differences = [b - a for a, b in zip(before, after, strict=True)]
        means[name] = statistics.fmean(differences)
        errors[name] = statistics.stdev(differences) / math.sqrt(len(differences))
        noises[name] = math.sqrt(statistics.variance(before) + statistics.variance(after))
        t = abs(means[name]) / errors[name] if errors[name] else math.inf * abs(means[name]) if means[name] else 0.0
        ps[name] = 1 - t_within(t, len(differences) - 1)
    found = {}
    for name, p in zip(ps, holm(list(ps.values())), strict=True):
        mean = means[name]
        moved = p <= LEVEL and abs(mean) > max(noises[name], LEAST)
        half = t_quantile(1 - LEVEL, len(base[name]) - 1) * errors[name]
        verdict = ("slower" if mean > 0 else "faster") if moved else "within noise"
        found[name] = Change(mean, mean - half, mean + half, noises[name], p, verdict)
    return found


def percent(logarithm: float) -> float:
    """A difference of logarithms of times as a change in per cent: 10.0 is a time 1.1 times as long."""
    return 100 * math.expm1(logarithm)
