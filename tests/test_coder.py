"""The streams of version 2 against tests/reference: equal bytes, equal values, for hostile streams too."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgolf import _C
from tests.reference import coder as reference

shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=40)
FLOATS = {"u2": _C.decode_halves, "u4": _C.decode_singles}


def scales_for(rows: int, seed: int) -> npt.NDArray[np.uint16]:
    return np.random.default_rng(seed).normal(0.01, 0.003, rows).astype(np.float16).view(np.uint16)


def gaussian(rows: int, columns: int, clip: int, seed: int = 0) -> npt.NDArray[np.int8]:
    """Integers as quantised weights are: normal, with a factor for each row and one for each column."""
    dice = np.random.default_rng(seed)
    factors = np.exp(dice.normal(0, 0.3, (rows, 1)) + dice.normal(0, 0.4, columns))
    return np.clip(np.rint(dice.normal(0, clip / 4, (rows, columns)) * factors), -clip, clip).astype(np.int8)


@settings(max_examples=60)
@given(
    st.one_of(hnp.arrays(np.int8, shapes), hnp.arrays(np.int8, shapes, elements=st.integers(-2, 2), fill=st.just(0))),
    st.integers(0, 99),
)
def test_integers_equal_reference(q: npt.NDArray[np.int8], seed: int) -> None:
    scale = scales_for(len(q), seed)
    stream = _C.encode_integers(q, scale)
    assert stream == reference.encode_integers(q.ravel().tolist(), scale.tolist(), *q.shape)
    values, scales = _C.decode_integers(stream, *q.shape)
    assert (values.tobytes(), scales.tobytes()) == (q.tobytes(), scale.tobytes())


@pytest.mark.parametrize("clip", [1, 15, 31, 127])
def test_weights_equal_reference(clip: int) -> None:
    q = gaussian(70, 50, clip)
    scale = scales_for(70, 1)
    stream = _C.encode_integers(q, scale)
    assert stream == reference.encode_integers(q.ravel().tolist(), scale.tolist(), 70, 50)
    assert reference.decode_integers(stream, 70, 50) == (q.ravel().tolist(), scale.tolist())


@settings(max_examples=60)
@given(st.sampled_from([np.uint16, np.uint32]).flatmap(lambda dtype: hnp.arrays(dtype, shapes)))
def test_floats_equal_reference(bits: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]) -> None:
    width = 8 * bits.itemsize
    stream = _C.encode_floats(bits)
    assert stream == reference.encode_floats(bits.ravel().tolist(), *bits.shape, width)
    assert FLOATS[f"u{bits.itemsize}"](stream, *bits.shape).tobytes() == bits.tobytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_weights_as_floats_equal_reference(dtype: type) -> None:
    weights = np.random.default_rng(2).normal(0, 0.02, (90, 33)).astype(dtype)
    bits = weights.view(f"u{weights.itemsize}")
    stream = _C.encode_floats(bits)
    assert stream == reference.encode_floats(bits.ravel().tolist(), 90, 33, 8 * weights.itemsize)


@settings(max_examples=150)
@given(st.binary(max_size=80), st.integers(0, 9), st.integers(0, 40), st.sampled_from(["int", "u2", "u4"]))
def test_any_bytes_decode_as_in_the_reference(stream: bytes, rows: int, columns: int, kind: str) -> None:
    """What a hostile stream stands for is defined as well: nothing beyond its ends is ever read."""
    if kind == "int":
        values, scales = _C.decode_integers(stream, rows, columns)
        assert (values.ravel().tolist(), scales.tolist()) == reference.decode_integers(stream, rows, columns)
    else:
        found = FLOATS[kind](stream, rows, columns)
        assert found.ravel().tolist() == reference.decode_floats(stream, rows, columns, 8 * int(kind[1]))


def test_carries_run_through() -> None:
    """Streams whose numbers end in a long row of 255 before a carry; found by their effect, so many are tried."""
    dice = np.random.default_rng(3)
    for _ in range(300):
        q = np.where(dice.random((8, 40)) < 0.97, 0, 1).astype(np.int8)
        stream = _C.encode_integers(q, np.zeros(8, np.uint16))
        assert stream == reference.encode_integers(q.ravel().tolist(), [0] * 8, 8, 40)


def test_columns_beyond_65536_share_what_is_known_of_them() -> None:
    q = gaussian(2, 65_540, 3)
    scale = scales_for(2, 4)
    stream = _C.encode_integers(q, scale)
    assert stream == reference.encode_integers(q.ravel().tolist(), scale.tolist(), *q.shape)
    bits = np.random.default_rng(5).normal(0, 1, (2, 65_537)).astype(np.float16).view(np.uint16)
    assert _C.encode_floats(bits) == reference.encode_floats(bits.ravel().tolist(), *bits.shape, 16)


@pytest.mark.parametrize(("clip", "columns"), [(15, 512), (31, 512), (7, 1536)])
def test_close_to_the_entropy_of_normal_weights(clip: int, columns: int) -> None:
    """With factors for rows and columns, an ideal coder that knows them; ours learns them."""
    dice = np.random.default_rng(6)
    deviations = clip / 4 * np.exp(dice.normal(0, 0.2, (512, 1)) + dice.normal(0, 0.3, columns))
    q = np.rint(dice.normal(0, 1, deviations.shape) * deviations)
    edges = np.linspace(-9, 9, 36_001)
    cumulated = np.cumsum(np.exp(-(edges**2) / 2)) * (edges[1] - edges[0]) / np.sqrt(2 * np.pi)
    upper, lower = (np.interp((q + half) / deviations, edges, cumulated) for half in (0.5, -0.5))
    ideal = -np.log2(np.maximum(upper - lower, 1e-12)).sum() / 8
    stream = _C.encode_integers(np.clip(q, -128, 127).astype(np.int8), np.full(512, 0x2000, np.uint16))
    assert ideal * 0.999 < len(stream) < ideal * 1.012


def test_zeros_cost_nothing() -> None:
    stream = _C.encode_integers(np.zeros((1000, 1000), np.int8), np.full(1000, 0x0400, np.uint16))
    values, _ = _C.decode_integers(stream, 1000, 1000)
    assert not values.any() and len(stream) < 1000


def test_the_same_bytes_everywhere() -> None:
    """Golden, for a million integers: what one machine writes, every other reads."""
    n = np.arange(1 << 20, dtype=np.int64)
    q = (n * n % 1_000_003 >> 3) % 17 + (n * 40_503 >> 9) % 17 - 16
    scale = (n[:1024] * 37 % 30_000).astype(np.uint16)
    stream = _C.encode_integers(q.astype(np.int8).reshape(1024, 1024), scale)
    assert (len(stream), hashlib.sha256(stream).hexdigest()) == GOLDEN


GOLDEN = (631_562, "794f0625735462624d939d640c3e046e863e458f245ba2c5437ab4f5151bc8fe")
