"""Student's t distribution: tail probabilities and quantiles."""

from __future__ import annotations

import math


def t_tail(t: float, freedom: float) -> float:
    """The probability that a Student variable is at least as far from 0 as ``t``, on either side.

    Small ones keep their digits. It is the regularised incomplete beta function I_x(freedom / 2, 1 / 2) at
    x = freedom / (freedom + t²).

    Args:
        t: may be infinite.
        freedom: degrees of freedom, above 0.

    Raises:
        ValueError: ``t`` is NaN or ``freedom`` is not above 0.
    """
    if math.isnan(t) or not 0 < freedom < math.inf:
        raise ValueError(f"t is {t} with {freedom} degrees of freedom, expected a number and a finite one above 0")
    if math.isinf(t * t):
        return 0.0
    total = freedom + t * t
    return _incomplete_beta(freedom / 2, 0.5, freedom / total, t * t / total)


def t_quantile(level: float, freedom: float) -> float:
    """The t within which a Student variable lies with probability ``level``, either side of 0; by bisection.

    Raises:
        ValueError: ``level`` is not between 0 and 1, or ``freedom`` not above 0.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, expected a share between 0 and 1, such as 0.95")
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > 1 - level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > 1 - level else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """I_x(a, b) with y = 1 - x, given apart because it may be too small to be told from x.

    The continued fraction 26.5.8 of Abramowitz and Stegun, which converges quickly up to x = (a + 1) / (a + b + 2),
    evaluated forwards by Lentz's method.
    """
    if x == 0:
        return 0.0
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, y, x)
    above, below, value = 1.0, 0.0, 1.0
    for step in range(1, 1000):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        below = 1 / (1 + term * below)
        above = 1 + term / above
        value *= above * below
        if abs(above * below - 1) < 1e-15:
            break
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return math.exp(a * math.log(x) + b * math.log(y) - log_beta) / (a * value)
