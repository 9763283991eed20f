"""Window plans: against the reference evaluator's loops, and as published."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf.scoring.windows import Windows, sliding_windows, standard_windows
from tests.reference import evaluate as reference


def rows(plan: Windows):
    return list(zip(plan.start.tolist(), plan.length.tolist(), plan.first_scored.tolist(), strict=True))


def times_scored(plan: Windows, n):
    count = np.zeros(n, dtype=np.int64)
    for start, length, first in rows(plan):
        count[start + first : start + length] += 1
    return count


@st.composite
def sizes(draw, min_windows=0):
    length = draw(st.integers(1, 40))
    stride = draw(st.integers(1, length))
    n = draw(st.integers(max(1, min_windows * length), 400))
    return n, length, stride


@given(sizes())
def test_exact_tail_is_the_definition_and_scores_every_target_once(size):
    n, length, stride = size
    plan = sliding_windows(n, length, stride, "exact")
    assert rows(plan) == reference.sliding_windows(n, length, stride, "exact")
    assert (times_scored(plan, n) == 1).all()
    assert plan.scored.sum() == n


@given(sizes())
def test_exact_tail_gives_every_later_target_its_context(size):
    n, length, stride = size
    for start, _, first in rows(sliding_windows(n, length, stride, "exact")):
        assert start == 0 or first == length - stride


@given(sizes(min_windows=1))
def test_reference_tail_is_the_definition(size):
    n, length, stride = size
    plan = sliding_windows(n, length, stride, "reference")
    assert rows(plan) == reference.sliding_windows(n, length, stride, "reference")
    count = times_scored(plan, n)
    cut = n // length * length
    assert (count[: cut - stride + 1] >= 1).all()
    assert (count[cut:] == 0).all()
    assert (count[: cut - stride] == 1).all()
    if length % stride == 0:
        assert count[cut - stride : cut].tolist() == [length // stride] * stride


@given(st.integers(1, 400), st.integers(1, 40))
def test_standard_windows_tile_the_stream(n, length):
    if n < length:
        with pytest.raises(ValueError, match="seq_len"):
            standard_windows(n, length)
        return
    plan = standard_windows(n, length)
    assert rows(plan) == reference.standard_windows(n, length)


@given(st.integers(1, 30), st.integers(1, 10))
def test_a_stride_of_the_whole_window_is_standard(length, count):
    expected = rows(standard_windows(length * count, length))
    assert rows(sliding_windows(length * count, length, length, "exact")) == expected
    assert rows(sliding_windows(length * count, length, length, "reference")) == expected


def test_books_have_the_published_number_of_windows():
    plan = sliding_windows(1_103_510, 2048, 64, "reference")
    assert len(plan) == 17_216
    assert plan.scored.sum() == 2048 + 17_215 * 64
    assert len(standard_windows(1_103_510, 2048)) == 538
    exact = sliding_windows(1_103_510, 2048, 64, "exact")
    assert exact.scored.sum() == 1_103_510


def test_data_shorter_than_a_window_is_one_short_window_in_the_exact_tail():
    assert rows(sliding_windows(5, 8, 2)) == [(0, 5, 0)]
    with pytest.raises(ValueError, match=r"5 targets .* at least 8"):
        sliding_windows(5, 8, 2, "reference")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 8, 2), ValueError, "n_targets is 0"),
        ((10, 0, 2), ValueError, "seq_len is 0"),
        ((10, 8, 0), ValueError, "stride is 0"),
        ((10, 8, 9), ValueError, "stride is 9; expected at most the window's length, 8"),
        ((10, 8, 2, "both"), ValueError, "'both'; expected one of 'exact', 'reference'"),
        ((10, 8.0, 2), TypeError, "seq_len is 8.0; expected an integer"),
        ((10, 8, True), TypeError, "stride is True"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        sliding_windows(*arguments)
