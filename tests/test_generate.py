"""Sampling from logits: the properties of greedy, top-k and nucleus sampling, stopping, seeds and bad arguments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgolf.errors import NonFiniteError
from pgolf.generate import _draw, distribution, sample

logit_rows = hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(-30, 30))


def bigram(table):
    """A logits function whose next-token logits depend on the last token alone."""
    return lambda ids: table[ids[-1]]


@st.composite
def tables(draw):
    size = draw(st.integers(1, 8))
    return draw(hnp.arrays(np.float32, (size, size), elements=st.floats(-10, 10, width=32)))


def greedy(table, start, count):
    ids = [start]
    for _ in range(count):
        ids.append(int(np.argmax(table[ids[-1]])))
    return ids[1:]


@given(tables(), st.integers(0, 2**64 - 1))
def test_temperature_0_and_top_k_1_are_greedy(table, seed):
    expected = greedy(table, 0, 6)
    assert sample(bigram(table), [0], 6, temperature=0, seed=seed).tolist() == expected
    assert sample(bigram(table), [0], 6, top_k=1, seed=seed).tolist() == expected


@given(tables(), st.integers(0, 2**64 - 1))
def test_a_tiny_nucleus_or_temperature_is_greedy(table, seed):
    expected = greedy(table, 0, 6)
    assert sample(bigram(table), [0], 6, top_p=1e-9, seed=seed).tolist() == expected
    # Equal logits stay equally likely at any temperature above 0: only distinct ones have a single limit.
    distinct = np.random.default_rng(seed).permuted(np.tile(np.arange(9.0), (9, 1)), axis=1)
    assert sample(bigram(distinct), [0], 6, temperature=5e-324, seed=seed).tolist() == greedy(distinct, 0, 6)


@given(tables(), st.integers(0, 2**64 - 1), st.integers(0, 8), st.integers(0, 8))
def test_a_seed_gives_the_same_tokens_whatever_the_length(table, seed, short, more):
    long = sample(bigram(table), [0], short + more, seed=seed)
    assert long.dtype == np.int64
    assert long.shape == (short + more,)
    np.testing.assert_array_equal(sample(bigram(table), [0], short, seed=seed), long[:short])


def test_seeds_differ():
    flat = bigram(np.zeros((100, 100)))
    assert sample(flat, [0], 20, seed=0).tolist() != sample(flat, [0], 20, seed=1).tolist()


@given(logit_rows, st.floats(0.01, 10), st.integers(1, 12), st.floats(0.01, 1))
def test_the_distribution_keeps_the_k_best_then_the_smallest_nucleus(logits, temperature, top_k, top_p):
    shifted = (logits - logits.max()) / temperature
    softmax = np.exp(shifted) / np.exp(shifted).sum()
    best = sorted(range(logits.size), key=lambda i: (-logits[i], i))[:top_k]
    within = softmax[best] / softmax[best].sum()

    ids, probabilities = distribution(logits, temperature, top_k, None)
    assert ids.tolist() == best
    np.testing.assert_allclose(probabilities, within, rtol=1e-12)

    nucleus, probabilities = distribution(logits, temperature, top_k, top_p)
    count = nucleus.size
    assert nucleus.tolist() == best[:count]
    assert within[:count].sum() >= top_p - 1e-12
    assert within[: count - 1].sum() < top_p + 1e-12
    np.testing.assert_allclose(probabilities, within[:count] / within[:count].sum(), rtol=1e-12)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.floats(0.05, 1), st.integers(1, 6))
def test_sampled_tokens_lie_in_the_support(seed, top_p, top_k):
    logits = np.random.default_rng(seed).normal(size=6)
    support, _ = distribution(logits, 0.7, top_k, top_p)
    drawn = sample(lambda ids: logits, [0], 40, temperature=0.7, top_k=top_k, top_p=top_p, seed=seed)
    assert set(drawn.tolist()) <= set(support.tolist())


def test_frequencies_follow_the_probabilities():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    drawn = sample(lambda ids: np.log(probabilities), [0], 20_000, seed=3)
    # Five standard deviations of a binomial share are at most 5·sqrt(0.25/20000) = 0.018.
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / drawn.size, probabilities, atol=0.018)


def test_temperature_divides_the_logits():
    logits = np.array([0.0, 1.0, -2.0])
    ids, probabilities = distribution(logits, 2.0, None, None)
    assert ids.tolist() == [1, 0, 2]
    np.testing.assert_allclose(probabilities, np.exp([0.5, 0, -1]) / np.exp([0.5, 0, -1]).sum(), rtol=1e-15)


@given(hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1)))
def test_a_draw_is_the_inverse_of_the_cumulative_distribution(probabilities):
    probabilities[0] += 1e-3
    cumulative = np.cumsum(probabilities)
    for uniform in (0.0, 0.3, 0.5, 1 - 2**-53):
        index = _draw(probabilities, uniform)
        assert probabilities[index] > 0
        assert cumulative[index] > uniform * cumulative[-1]
        assert index == 0 or cumulative[index - 1] <= uniform * cumulative[-1]
    assert [_draw(np.array([0.5, 0.25, 0.25]), uniform) for uniform in (0.0, 0.5, 0.75)] == [0, 1, 2]


@given(st.integers(0, 2**32))
def test_a_forbidden_token_is_never_drawn(seed):
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf])
    assert set(sample(lambda ids: logits, [0], 20, seed=seed).tolist()) <= {1, 3}


def test_the_stop_token_ends_the_generation_and_is_returned():
    counting = bigram(np.roll(np.eye(10), 1, axis=1))
    assert sample(counting, [0], 20, temperature=0, stop=4).tolist() == [1, 2, 3, 4]
    assert sample(counting, [0], 20, temperature=0, stop=[7, 3]).tolist() == [1, 2, 3]
    assert sample(counting, [0], 20, temperature=0, stop=np.array([5])).tolist() == [1, 2, 3, 4, 5]
    assert sample(counting, [0], 3, temperature=0, stop=9).tolist() == [1, 2, 3]
    assert sample(counting, [4], 3, temperature=0, stop=4).tolist() == [5, 6, 7]


def test_the_function_sees_the_prompt_and_every_new_token():
    seen = []

    def logits_fn(ids):
        seen.append(ids.tolist())
        return np.eye(5)[len(seen)]

    assert sample(logits_fn, np.array([3, 2], dtype=np.uint16), 3, temperature=0).tolist() == [1, 2, 3]
    assert seen == [[3, 2], [3, 2, 1], [3, 2, 1, 2]]


def test_no_new_tokens_need_no_logits():
    def refuse(ids):
        raise AssertionError("not to be called")

    assert sample(refuse, [1], 0).tolist() == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ids": []}, ValueError, "ids is empty"),
        ({"ids": [[1]]}, ValueError, r"shape \(1, 1\)"),
        ({"ids": [0.5]}, TypeError, "dtype float64"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens is -1"),
        ({"max_new_tokens": 1.5}, TypeError, "max_new_tokens is 1.5; expected an integer"),
        ({"temperature": -0.1}, ValueError, "temperature is -0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": float("inf")}, ValueError, "temperature is inf"),
        ({"temperature": "warm"}, TypeError, "temperature is 'warm'; expected a number"),
        ({"top_k": 0}, ValueError, "top_k is 0; expected at least 1"),
        ({"top_k": True}, TypeError, "top_k is True"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5"),
        ({"stop": "</s>"}, TypeError, "stop is '</s>'"),
        ({"stop": [1, -2]}, ValueError, "stop is -2"),
        ({"stop": 4}, ValueError, "stop is 4; expected token ids of at most 3"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 2**64}, ValueError, "seed is 18446744073709551616"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        sample(lambda ids: np.zeros(4), **{"ids": [0], "max_new_tokens": 2, **arguments})


@pytest.mark.parametrize("logits", [[0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_logits_that_define_no_distribution_are_an_error(logits):
    with pytest.raises(NonFiniteError, match="token at position 3"):
        sample(lambda ids: logits, [0, 1, 2], 2, temperature=0)


def test_misshapen_logits_are_an_error():
    with pytest.raises(ValueError, match=r"returned shape \(1, 4\)"):
        sample(lambda ids: np.zeros((1, 4)), [0], 1)
