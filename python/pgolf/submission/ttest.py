"""One-sided t-tests: is a mean below a number, or below another mean, by more than chance explains?

Student's t distribution through the regularised incomplete beta function, whose continued fraction is Lentz's
(Press et al., Numerical Recipes, §6.4). The degrees of freedom need not be whole, as Welch's are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

_TINY = 1e-300  # in place of a zero denominator
_EPSILON = 1e-15
_MOST_TERMS = 100_000  # O(√max(a, b)) are needed: enough for 10⁹ degrees of freedom


@dataclass(frozen=True)
class TTest:
    """A one-sided test of "the mean is below the reference by more than the margin".

    kind: "one-sample" (against a number), "paired" (against other values, one for one) or "welch" (against others).
    reference: the number, or the others' mean; margin: by how much it is to be beaten.
    difference: the mean less the reference plus the margin; negative where the claim holds for the means.
    statistic, df: t and its degrees of freedom; t is ±inf where nothing varies. p_value: the chance of a t at most this
    large if the difference were 0.
    """

    kind: str
    reference: float
    margin: float
    difference: float
    statistic: float
    df: float
    p_value: float


def below(
    values: Sequence[float], reference: float | Sequence[float], margin: float = 0.0, paired: bool = False
) -> TTest:
    """Test whether the mean of ``values`` is below the reference by more than ``margin``.

    reference: a number, or other values (n of them): paired, values[i] with reference[i] (Student's), else with the
        variance that each group has for itself (Welch's).

    Raises ValueError for fewer than two values on a side, pairs of unequal number, and numbers that are not finite.
    """
    if isinstance(reference, (int, float)):
        return _one_sample("one-sample", [value - reference + margin for value in values], reference, margin)
    if paired:
        if len(values) != len(reference):
            raise ValueError(
                f"There are {len(values)} values and {len(reference)} to pair with them; expected as many."
            )
        differences = [a - b + margin for a, b in zip(values, reference, strict=True)]
        return _one_sample("paired", differences, fmean(reference or [0.0]), margin)
    _check(values)
    _check(reference)
    shares = [variance(group) / len(group) for group in (values, reference)]
    mean, spread = fmean(reference), sum(shares)
    below_ones = [share**2 / (len(group) - 1) for share, group in zip(shares, (values, reference), strict=True)]
    # Both groups constant: t is infinite or 0, whatever the degrees of freedom.
    df = spread**2 / sum(below_ones) if sum(below_ones) else len(values) + len(reference) - 2.0
    return _test("welch", mean, margin, fmean(values) - mean + margin, spread, df)


def _one_sample(kind: str, differences: Sequence[float], reference: float, margin: float) -> TTest:
    _check(differences)
    n = len(differences)
    return _test(kind, reference, margin, fmean(differences), variance(differences) / n, n - 1.0)


def _test(kind: str, reference: float, margin: float, difference: float, squared_error: float, df: float) -> TTest:
    if squared_error > 0:
        t = difference / math.sqrt(squared_error)
    else:
        t = math.copysign(math.inf, difference) if difference else 0.0
    return TTest(kind, reference, margin, difference, t, df, student_t_sf(-t, df))


def _check(values: Sequence[float]) -> None:
    if len(values) < 2:
        raise ValueError(f"A t-test needs at least two values on a side; there is {len(values)}.")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"A t-test needs finite values; these are {list(values)}.")


def student_t_sf(t: float, df: float) -> float:
    """P(T > t) for Student's t with ``df`` > 0 degrees of freedom; raises ValueError for NaN and other df."""
    if math.isnan(t) or not df > 0:
        raise ValueError(f"t is {t} and df is {df}; expected a number and degrees of freedom above 0.")
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    # I_{df/(df+t²)}(df/2, 1/2), both sides' chance; where t is small its complement is the exact one.
    ratio = t * t / df
    outside = (
        regularised_incomplete_beta(df / 2, 0.5, 1 / (1 + ratio))
        if ratio > 1e-3
        else (1 - regularised_incomplete_beta(0.5, df / 2, ratio / (1 + ratio)))
    )
    return 0.5 * outside if t > 0 else 1 - 0.5 * outside


def regularised_incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b), the share of ∫₀¹ u^(a−1) (1−u)^(b−1) du that lies below x; a, b > 0, 0 ≤ x ≤ 1, else ValueError."""
    if not (a > 0 and b > 0 and 0 <= x <= 1):
        raise ValueError(f"a is {a}, b is {b}, x is {x}; expected a > 0, b > 0 and 0 ≤ x ≤ 1.")
    if x in (0.0, 1.0):
        return float(x)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast only below the distribution's bulk
        return 1 - regularised_incomplete_beta(b, a, 1 - x)
    small, large = sorted((a, b))
    log_front = a * math.log(x) + b * math.log1p(-x) + _log_gamma_step(large, small) - math.lgamma(small)
    return math.exp(log_front) * _continued_fraction(a, b, x) / a


def _log_gamma_step(a: float, b: float) -> float:
    """log Γ(a + b) − log Γ(a), b ≤ a."""
    if a < 1e5 or b > 10:
        return math.lgamma(a + b) - math.lgamma(a)
    # Two numbers of 10¹⁰ would leave five digits of their difference: Stirling's series, its next term below 1e-11.
    return b * math.log(a) + b * (b - 1) / (2 * a) - b * (b - 1) * (2 * b - 1) / (12 * a * a)


def _continued_fraction(a: float, b: float, x: float) -> float:
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, _MOST_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _nonzero(1 + term * d)
            c = _nonzero(1 + term / c)
            value *= d * c
        if abs(d * c - 1) < _EPSILON:
            return value
    raise ArithmeticError(f"The incomplete beta function does not converge for a = {a}, b = {b}, x = {x}.")


def _nonzero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
