"""Sampling from logits: the properties of greedy, top-k and nucleus sampling, stopping, seeds and bad arguments; and
generation by a model, which keeps keys and values: its logits are those of a pass over the whole text."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import pgolf
import pgolf.model.sampling
from pgolf import _C
from pgolf.common.errors import DeviceError, NonFiniteError
from pgolf.config import NEWTON_SCHULZ, ModelConfig
from pgolf.model import GPT
from pgolf.model.sampling import _draw, distribution, sample
from tests.reference.model import perturb, qat_clips
from tests.reference.rng import init_state
from tests.test_model import TINY

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


# A model's keys and values -------------------------------------------------------------------------------------------

# What differs from TINY.
MODELS: dict[str, dict[str, Any]] = {
    "three layers": {},
    "one layer": {"num_layers": 1},
    "two layers": {"num_layers": 2},
    "ten layers": {"num_layers": 10},
    "untied": {"tie_embeddings": False},
    "no bigram": {"bigram_vocab_size": 0},
    "bigram as wide as the model": {"bigram_dim": 16},
    "one key head": {"num_kv_heads": 1},
    "as many key heads": {"num_kv_heads": 4},
    "one head": {"num_heads": 1, "num_kv_heads": 1},
    "smear reset": {"smear_reset_at_bos": True, "vocab_size": 4, "bos_id": 2},
    "bf16 rope tables": {"rope_tables": "bf16"},
    "loops": {"loop_start": 1, "loop_end": 2, "num_loops": 2},
    "part of a head turned": {"model_dim": 32, "rope_dims": 4, "ln_scale": True, "mlp_negative_slope": 0.5},
    "low softcap": {"logit_softcap": 0.7, "rope_base": 500.0},
    "odd sizes": {"model_dim": 70, "num_heads": 7, "num_kv_heads": 7, "bigram_dim": 33, "mlp_mult": 2.7},
}
LENGTH = 50
DTYPES = ["float64", "float32", "bfloat16", "float16"]


def made(case: str, dtype: str = "float32") -> GPT:
    config = ModelConfig(**{**TINY, **MODELS[case]})
    model = GPT(config, seed=None, device="cpu", dtype=dtype)
    model.load_state_dict(perturb(init_state(config, 42), 7))
    return model


def text_of(model: GPT, length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(5).integers(0, model.config.vocab_size, length, dtype=np.int32)


def assert_logits_of_the_whole_text(found: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert found.tobytes() == expected.tobytes(), dtype


def read(model: GPT, text: np.ndarray, pieces: list[int], room: int = LENGTH) -> np.ndarray:
    """The logits after each piece."""
    decoder = _C.Decoder(model._native, room)
    ends = list(itertools.accumulate(pieces))
    rows = [decoder.read(text[end - piece : end]) for piece, end in zip(pieces, ends, strict=True)]
    assert decoder.length == ends[-1] and decoder.room >= ends[-1]
    return np.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MODELS)
def test_logits_are_those_of_a_pass_over_the_whole_text(case: str, dtype: str) -> None:
    """Also where a text is read in pieces, and beyond the length that the model was trained at."""
    model = made(case, dtype)
    model.train_seq_len = 16
    text = text_of(model)
    whole = model.logits(text[None])[0]
    for pieces in ([1] * LENGTH, [2, *[1] * 48], [3, 1, 46], [20, 2, 3, *[1] * 25], [LENGTH]):
        ends = np.cumsum(pieces)
        assert_logits_of_the_whole_text(read(model, text, pieces), whole[ends - 1], dtype)


def uncached(model: GPT) -> Any:
    """The next token's logits from a pass over all tokens."""
    return lambda ids: model.logits(ids[None])[0, -1]


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0}, {}, {"temperature": 1.3, "top_k": 5}, {"top_p": 0.7, "temperature": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_tokens_as_without_keys_and_values(dtype: str, case: str, sampling: dict[str, Any]) -> None:
    model = made(case, dtype)
    model.train_seq_len = 16
    text = text_of(model)
    for prompt, seed in ((1, 0), (2, 1), (3, 2**64 - 1), (17, 3)):
        found = model.generate(text[:prompt], 24, seed=seed, **sampling)
        assert found.tolist() == sample(uncached(model), text[:prompt], 24, seed=seed, **sampling).tolist()


def test_every_token_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, native = [], _C.Decoder

    class Counting:
        def __init__(self, model: Any, positions: int) -> None:
            self.decoder = native(model, positions)

        @property
        def length(self) -> int:
            return self.decoder.length

        def read(self, ids: np.ndarray) -> np.ndarray:
            reads.append(ids.tolist())
            return self.decoder.read(ids)

    monkeypatch.setattr(pgolf.model.gpt._C, "Decoder", Counting)
    new = made("three layers").generate([1, 5, 9], 6).tolist()
    assert reads == [[1, 5, 9], *([token] for token in new[:-1])]


def test_room_grows_with_the_text_and_changes_no_bit() -> None:
    model = made("ten layers")
    text = text_of(model, 200)
    pieces = [3, *[1] * 197]
    expected = read(model, text, pieces, room=200)
    for room in (1, 5, 128):
        assert np.array_equal(read(model, text, pieces, room), expected)
    decoder = _C.Decoder(model._native, 4)
    rooms = []
    for token in text[:20]:
        decoder.read(token[None])
        rooms.append(decoder.room)
    assert rooms == [4] * 4 + [8] * 4 + [16] * 8 + [32] * 4


def test_a_stop_token_may_come_before_room_for_the_whole_text_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upper limit that is never reached costs no keys and values."""
    rooms, native = [], _C.Decoder
    monkeypatch.setattr(
        pgolf.model.gpt._C, "Decoder", lambda model, positions: rooms.append(positions) or native(model, positions)
    )
    model = made("three layers")
    for limit in (30, 10**7):
        stopped = model.generate([1, 2], limit, temperature=0, stop=range(37))
        assert stopped.size == 1
    assert rooms == [31, 1026]


@pytest.mark.usefixtures("one_thread")
def test_threads_and_where_tensors_lie_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("odd sizes")
    text = text_of(model)
    pieces = [9, *[1] * 41]
    expected = read(model, text, pieces)
    decoder = _C.Decoder(model._native, LENGTH)
    found = []
    for index, (first, last) in enumerate(itertools.pairwise([0, *np.cumsum(pieces)])):
        pgolf.set_num_threads(1 + index % 3)
        found.append(decoder.read(text[first:last]))
    assert np.array_equal(found, expected)
    monkeypatch.setenv("PGOLF_ARENA", "separate")  # every tensor in a block of its own that starts as NaN
    assert np.array_equal(read(model, text, pieces, room=12), expected)


def test_weights_must_not_change_while_a_text_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "weights have changed since the first token of this text was read; begin the text anew"
    model = made("three layers")
    text = text_of(model)
    expected = read(model, text, [1] * 4)
    decoder = _C.Decoder(model._native, 8)
    assert np.array_equal(decoder.read(text[:1]), expected[0])
    model.loss_and_grads(text[None, :-1], text[None, 1:])  # gradients change no weight, late QAT's copies neither
    model._native.set_qat_clips(qat_clips(model.config))
    model._native.begin_step(True)
    model._native.micro_step(text[None, :-1], text[None, 1:], 1.0)
    assert np.array_equal(decoder.read(text[1:2]), expected[1])
    model.load_state_dict(model.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            decoder.read(text[2:3])
    assert decoder.length == 2
    assert np.array_equal(read(model, text, [1] * 4), expected)

    def train_in_between(logits_fn: Any, ids: np.ndarray, *rest: Any) -> np.ndarray:
        first = logits_fn(ids)
        optimizer = _C.Optimizer(model._native, 5, NEWTON_SCHULZ["keller_jordan"], False)
        settings = {"lr": [0.1] * 4, "weight_decay": [0.0] * 4, "momentum": 0.9, "clip": 1.0}
        settings |= {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
        model._native.begin_step(False)
        model._native.micro_step(text[None, :-1], text[None, 1:], 1.0)
        model._native.end_step()
        optimizer.wait(optimizer.step(settings))
        return logits_fn(np.append(ids, first.argmax()))

    monkeypatch.setattr(pgolf.model.sampling, "sample", train_in_between)
    with pytest.raises(RuntimeError, match=message):
        model.generate([1], 2)


def test_what_is_refused_is_not_read() -> None:
    model = made("three layers")
    text = text_of(model)
    expected = read(model, text, [4, 1])
    decoder = _C.Decoder(model._native, 2)
    for ids, message in (
        ([0, 37], r"ids\[0, 1\] is 37; token ids of this model run from 0 to 36"),
        ([-1], r"ids\[0, 0\] is -1"),
        ([], "There is no token to read; expected at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.read(np.array(ids, np.int32))
    assert decoder.length == 0 and np.array_equal(decoder.read(text[:4]), expected[0])
    with pytest.raises(ValueError, match="is 37"):
        decoder.read(np.array([37], np.int32))
    assert decoder.length == 4 and np.array_equal(decoder.read(text[4:5]), expected[1])
    shortage = r" The keys and values of 1000000000000 tokens take \d+ MiB; a shorter text needs less\.$"
    with pytest.raises(DeviceError, match=shortage):  # more than addresses reach
        _C.Decoder(model._native, 10**12)
    with pytest.raises(ValueError, match="room for at least one token, not for 0"):
        _C.Decoder(model._native, 0)
