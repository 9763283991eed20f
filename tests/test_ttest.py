"""One-sided t-tests: Student's t against closed forms, printed tables and a numerical integral; the tests by hand."""

from __future__ import annotations

import math
from statistics import NormalDist, fmean, stdev

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgolf.submission.ttest import below, regularised_incomplete_beta, student_t_sf

finite_t = st.floats(-50, 50)
freedom = st.floats(0.3, 300)
positive = st.floats(0.05, 200)


@given(finite_t)
def test_closed_forms_of_one_two_three_and_four_degrees_of_freedom(t: float) -> None:
    u = t / math.sqrt(3)
    closed = {
        1: 0.5 - math.atan(t) / math.pi,
        2: 0.5 - t / (2 * math.sqrt(2 + t * t)),
        3: 0.5 - (u / (1 + u * u) + math.atan(u)) / math.pi,
        4: 0.5 - 3 / 8 * t / math.sqrt(1 + t * t / 4) * (1 - t * t / (1 + t * t / 4) / 12),
    }
    for df, expected in closed.items():
        assert student_t_sf(t, df) == pytest.approx(expected, rel=1e-9, abs=1e-15), df


@pytest.mark.parametrize(
    ("df", "p", "t"),  # critical values as tables print them
    [
        (1, 0.05, 6.314), (2, 0.05, 2.920), (2, 0.01, 6.965), (2, 0.005, 9.925), (3, 0.01, 4.541), (4, 0.01, 3.747),
        (5, 0.025, 2.571), (9, 0.01, 2.821), (10, 0.05, 1.812), (20, 0.005, 2.845), (30, 0.05, 1.697),
        (120, 0.025, 1.980),
    ],
)  # fmt: skip
def test_printed_tables(df: int, p: float, t: float) -> None:
    assert student_t_sf(t + 0.0005, df) < p < student_t_sf(t - 0.0005, df)


@given(finite_t, freedom)
def test_both_sides_add_up_and_the_tail_falls(t: float, df: float) -> None:
    assert student_t_sf(t, df) + student_t_sf(-t, df) == pytest.approx(1, abs=1e-14)
    assert student_t_sf(t, df) >= student_t_sf(t + 0.01, df)
    assert student_t_sf(0.0, df) == 0.5
    assert (student_t_sf(math.inf, df), student_t_sf(-math.inf, df)) == (0.0, 1.0)


@given(st.floats(0.01, 8), freedom)
def test_the_density_integrates_to_it(t: float, df: float) -> None:
    x = np.linspace(0, t, 4001)
    log_front = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
    density = np.exp(log_front - (df + 1) / 2 * np.log1p(x * x / df))
    weights = np.full(x.size, 2.0)
    weights[1::2], weights[[0, -1]] = 4, 1  # Simpson's
    assert 0.5 - student_t_sf(t, df) == pytest.approx(float(weights @ density) * t / 4000 / 3, abs=1e-9)


@given(st.floats(-5, 5))
@example(1.640625)
def test_many_degrees_of_freedom_are_normal(t: float) -> None:
    assert student_t_sf(t, 1e9) == pytest.approx(NormalDist().cdf(-t), rel=1e-6, abs=1e-9)


@given(positive, positive, st.integers(0, 1024))
def test_the_incomplete_beta_function(a: float, b: float, share: int) -> None:
    x = share / 1024  # so that 1 − x is exact
    value = regularised_incomplete_beta(a, b, x)
    assert 0 <= value <= 1 + 1e-12
    assert value + regularised_incomplete_beta(b, a, 1 - x) == pytest.approx(1, abs=1e-9)
    assert regularised_incomplete_beta(a, 1, x) == pytest.approx(x**a, rel=1e-9, abs=1e-300)
    if 0 < x < 1:  # DLMF 8.17.20
        step = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a + 1) - math.lgamma(b))
        assert regularised_incomplete_beta(a + 1, b, x) == pytest.approx(value - step, abs=1e-9)


def test_impossible_arguments() -> None:
    for a, b, x in ((0, 1, 0.5), (1, -1, 0.5), (1, 1, 1.5), (1, 1, math.nan)):
        with pytest.raises(ValueError, match="expected a > 0"):
            regularised_incomplete_beta(a, b, x)
    for t, df in ((math.nan, 2), (1.0, 0), (1.0, math.nan)):
        with pytest.raises(ValueError, match="degrees of freedom above 0"):
            student_t_sf(t, df)


groups = st.lists(st.floats(0.5, 3), min_size=2, max_size=8)


def test_a_mean_below_a_number() -> None:
    # Mean 2 and deviation 1: t = −2·√3 with 2 degrees of freedom.
    test = below([1.0, 2.0, 3.0], 4.0)
    assert (test.kind, test.difference, test.df) == ("one-sample", -2.0, 2.0)
    assert test.statistic == pytest.approx(-2 * math.sqrt(3))
    assert test.p_value == pytest.approx(0.5 - math.sqrt(3) / math.sqrt(14))
    assert below([1.0, 2.0, 3.0], 4.0, margin=2.0).p_value == 0.5


@given(groups, st.floats(0.5, 3), st.floats(-0.1, 0.1))
def test_one_sample_statistic(values: list[float], reference: float, margin: float) -> None:
    test = below(values, reference, margin)
    assert test.difference == pytest.approx(fmean(values) - reference + margin, abs=1e-9)
    assert 0 <= test.p_value <= 1
    spread = stdev(value - reference + margin for value in values)
    if spread > 1e-9:
        assert test.statistic == pytest.approx(test.difference * math.sqrt(len(values)) / spread, rel=1e-6, abs=1e-9)
        assert below(values, reference, margin + 0.01).p_value >= test.p_value


@given(groups, st.randoms(use_true_random=False))
def test_pairs_are_a_sample_of_differences(values: list[float], random: object) -> None:
    others = [value + 0.1 * (1 + index % 3) for index, value in enumerate(values)]
    paired = below(values, others, 0.05, paired=True)
    single = below([a - b for a, b in zip(values, others, strict=True)], 0.0, 0.05)
    assert (paired.kind, paired.difference, paired.df) == ("paired", single.difference, single.df)
    assert paired.p_value == pytest.approx(single.p_value, rel=1e-9)


def test_welch_by_hand() -> None:
    # Means 2 and 5, variances 1 and 4, 3 and 4 values: t = −3/√(1/3+1), df = (4/3)²/((1/3)²/2 + 1²/3).
    test = below([1.0, 2.0, 3.0], [5 - math.sqrt(6), 5.0, 5.0, 5 + math.sqrt(6)])
    assert test.kind == "welch"
    assert test.statistic == pytest.approx(-3 / math.sqrt(4 / 3))
    assert test.df == pytest.approx((4 / 3) ** 2 / (1 / 18 + 1 / 3))


def test_what_does_not_vary() -> None:
    assert below([1.0, 1.0], 2.0).p_value == 0.0
    assert below([1.0, 1.0], 0.5).p_value == 1.0
    assert below([1.0, 1.0], 1.0).p_value == 0.5
    assert below([1.0, 1.0], [2.0, 2.0]).p_value == 0.0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least two values on a side; there is 1"):
        below([1.0], 2.0)
    with pytest.raises(ValueError, match="at least two values"):
        below([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="There are 2 values and 3 to pair with them"):
        below([1.0, 2.0], [1.0, 2.0, 3.0], paired=True)
    with pytest.raises(ValueError, match="finite"):
        below([1.0, math.nan], 2.0)
