"""The CPU's matrix products: an element is one chain of sums, whatever is computed beside it (docs/spec.md §2)."""

from __future__ import annotations

import hashlib
import platform
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf import _C
from tests.test_core import run_isolated

FUSED = _C.cpu_isa() != "plain" or platform.machine() in ("aarch64", "arm64")
"""Whether this instruction set multiplies and adds with one rounding."""
BLOCK = 512  # of the depth of sums over tokens

HEIGHTS = [*range(1, 34), 63, 64, 65, 127, 128, 129]
DTYPES = [np.float32, np.float64]
LAYOUTS = [(False, False), (False, True), (True, False), (True, True)]


def matrix(rng: np.random.Generator, rows: int, columns: int, dtype: Any, gap: int = 0) -> np.ndarray:
    """A matrix whose rows lie `gap` numbers apart from one another; what lies between is not a number."""
    room = np.full((rows, columns + gap), np.nan, dtype)
    room[:, :columns] = rng.standard_normal((rows, columns))
    return room[:, :columns]


def operands(
    m: int, n: int, k: int, layout: tuple[bool, bool], dtype: Any, seed: int = 0, gap: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """op(A) [m, k] and op(B) [k, n] as they are stored."""
    rng = np.random.default_rng(seed)
    a = matrix(rng, *((k, m) if layout[0] else (m, k)), dtype, gap)
    return a, matrix(rng, *((n, k) if layout[1] else (k, n)), dtype, gap)


def kinds(layout: tuple[bool, bool]) -> list[str]:
    return ["chain", "blocks", "packed blocks" if layout[0] else "packed"]


def product(kind: str, a: np.ndarray, b: np.ndarray, layout: tuple[bool, bool], c: np.ndarray | None = None) -> Any:
    m, n = a.shape[1 if layout[0] else 0], b.shape[0 if layout[1] else 1]
    out = np.full((m, n), np.nan, a.dtype) if c is None else c.copy()
    if kind.endswith("blocks") and c is None:
        out[:] = 0
    words = {
        "transpose_a": layout[0],
        "transpose_b": layout[1],
        "from_c": c is not None and not kind.endswith("blocks"),
    }
    _C.cpu_product(kind, a, b, out, **words)
    return out


def plain(a: np.ndarray, b: np.ndarray, layout: tuple[bool, bool]) -> tuple[np.ndarray, np.ndarray]:
    return (a.T if layout[0] else a), (b.T if layout[1] else b)


# The rule, number by number ------------------------------------------------------------------------------------------


def fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x·y + z in float32 with one rounding: exact to double's last bit, rounded to odd, and then once to float32."""
    exact = x.astype(np.float64) * y.astype(np.float64)  # 48 bits
    wide = z.astype(np.float64)
    total = exact + wide
    back = total - exact
    error = (exact - (total - back)) + (wide - back)
    bits = total.view(np.int64).copy()
    even = (error != 0) & ((bits & 1) == 0)
    bits[even] += np.where(np.signbit(error[even]) == np.signbit(total[even]), 1, -1)
    return bits.view(np.float64).astype(np.float32)


def chain32(a: np.ndarray, b: np.ndarray, start: np.ndarray) -> np.ndarray:
    """One accumulator an element, k ascending."""
    total = start.astype(np.float32)
    for step in range(a.shape[1]):
        x, y = np.broadcast_arrays(a[:, step : step + 1], b[step : step + 1])
        total = fused(x, y, total) if FUSED else (x * y).astype(np.float32) + total
    return total


def chain64(a: np.ndarray, b: np.ndarray, start: np.ndarray) -> np.ndarray:
    total = start.copy()
    for (i, j), first in np.ndenumerate(start):
        value = float(first)
        for x, y in zip(a[i].tolist(), b[:, j].tolist(), strict=True):
            value = float(Fraction(x) * Fraction(y) + Fraction(value)) if FUSED else x * y + value
        total[i, j] = value
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1, 1), (5, 7, 3), (14, 33, 65), (31, 65, 300), (3, 100, 257)])
def test_an_element_is_one_chain_in_float32(size: tuple[int, int, int], layout: tuple[bool, bool]) -> None:
    a, b = operands(*size, layout, np.float32, gap=3)
    left, right = plain(a, b, layout)
    start = np.random.default_rng(1).standard_normal(size[:2]).astype(np.float32)
    zero = np.zeros(size[:2], np.float32)
    assert product("chain", a, b, layout).tobytes() == chain32(left, right, zero).tobytes()
    assert product("chain", a, b, layout, start).tobytes() == chain32(left, right, start).tobytes()
    if not layout[0]:
        assert product("packed", a, b, layout).tobytes() == chain32(left, right, zero).tobytes()
        assert product("packed", a, b, layout, start).tobytes() == chain32(left, right, start).tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_element_is_one_chain_in_float64(layout: tuple[bool, bool]) -> None:
    a, b = operands(5, 19, 23, layout, np.float64)
    expected = chain64(*plain(a, b, layout), np.zeros((5, 19)))
    assert product("chain", a, b, layout).tobytes() == expected.tobytes()


@pytest.mark.parametrize("depth", [1, 511, 512, 513, 1100])
def test_sums_over_tokens_go_in_blocks(depth: int) -> None:
    layout = (True, False)
    a, b = operands(9, 21, depth, layout, np.float32)
    left, right = plain(a, b, layout)
    start = np.random.default_rng(1).standard_normal((9, 21)).astype(np.float32)
    expected, one = start, np.ones((9, 21), np.float32)
    for first in range(0, depth, BLOCK):
        part = chain32(left[:, first : first + BLOCK], right[first : first + BLOCK], np.zeros_like(start))
        expected = fused(one, part, expected) if FUSED else part + expected
    for kind in ("blocks", "packed blocks"):
        assert product(kind, a, b, layout, start).tobytes() == expected.tobytes()


# Neither height nor place nor neighbours -----------------------------------------------------------------------------


@settings(max_examples=80)
@given(data=st.data())
def test_a_row_has_the_same_bits_alone_in_any_batch_and_at_any_place(data: st.DataObject) -> None:
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS))
    kind = data.draw(st.sampled_from(kinds(layout)))
    m, n = data.draw(st.sampled_from(HEIGHTS)), data.draw(st.integers(1, 70))
    k = data.draw(st.integers(1, 300) | st.sampled_from([511, 513, 1027]))
    a, b = operands(m, n, k, layout, dtype, seed=data.draw(st.integers(0, 9)), gap=data.draw(st.integers(0, 3)))
    whole = product(kind, a, b, layout)
    row, rest = data.draw(st.integers(0, m - 1)), np.random.default_rng(99)
    alone = (a[:, row : row + 1] if layout[0] else a[row : row + 1]).copy()
    assert product(kind, alone, b, layout).tobytes() == whole[row : row + 1].tobytes()
    height = data.draw(st.sampled_from(HEIGHTS))
    place = data.draw(st.integers(0, height - 1))
    other = rest.standard_normal((k, height) if layout[0] else (height, k)).astype(dtype)
    if layout[0]:
        other[:, place : place + 1] = alone
    else:
        other[place : place + 1] = alone
    assert product(kind, other, b, layout)[place].tobytes() == whole[row].tobytes()


@settings(max_examples=40)
@given(data=st.data())
def test_a_column_has_the_same_bits_in_any_width(data: st.DataObject) -> None:
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS))
    m, n, k = data.draw(st.integers(1, 40)), data.draw(st.sampled_from(HEIGHTS)), data.draw(st.integers(1, 300))
    a, b = operands(m, n, k, layout, dtype)
    first = data.draw(st.integers(0, n - 1))
    last = data.draw(st.integers(first + 1, n))
    part = b[first:last] if layout[1] else b[:, first:last]
    assert product("chain", a, part, layout).tobytes() == product("chain", a, b, layout)[:, first:last].tobytes()


@settings(max_examples=40)
@given(n=st.sampled_from(HEIGHTS), k=st.integers(1, 300) | st.sampled_from([513, 1100]), dtype=st.sampled_from(DTYPES))
def test_a_symmetric_product_has_the_bits_of_the_whole(n: int, k: int, dtype: Any) -> None:
    a, _ = operands(n, 1, k, (False, False), dtype)
    found = np.full((n, n), np.nan, dtype)
    _C.cpu_product("symmetric", a, a, found, transpose_b=True)
    assert found.tobytes() == product("chain", a, a, (False, True)).tobytes()
    assert found.tobytes() == found.T.copy().tobytes()


def test_products_are_right() -> None:
    for layout in LAYOUTS:
        for dtype, tolerance in ((np.float32, 1e-6), (np.float64, 1e-14)):
            a, b = operands(129, 257, 300, layout, dtype)
            left, right = (side.astype(np.float64) for side in plain(a, b, layout))
            bound = tolerance * np.sqrt(300) * (np.abs(left) @ np.abs(right)) / 10
            assert (np.abs(product("chain", a, b, layout) - left @ right) <= bound).all()


def test_a_product_of_no_depth_is_zero() -> None:
    a, b, c = np.ones((3, 0), np.float32), np.ones((0, 5), np.float32), np.ones((3, 5), np.float32)
    assert not product("chain", a, b, (False, False)).any()
    assert (product("chain", a, b, (False, False), c) == 1).all()


def test_bad_operands_are_refused() -> None:
    a, b, c = np.ones((3, 4), np.float32), np.ones((4, 5), np.float32), np.ones((3, 5), np.float32)
    for words, message in [
        (("other", a, b, c), "kind is 'other'"),
        (("chain", a, b.astype(np.float64), c), "one dtype"),
        (("chain", a, c, b), "do not belong to one product"),
        (("packed blocks", a, b, c), "take a transposed"),
        (("chain", a.T, b, c), "rows are contiguous"),
        (("symmetric", a, b, c), "do not belong|symmetric product is that of"),
    ]:
        with pytest.raises(ValueError, match=message):
            _C.cpu_product(*words)


# Instruction sets ----------------------------------------------------------------------------------------------------

DIGEST = """
import numpy as np
from tests.test_products import digest
print(digest())
"""


def digest() -> str:
    """Of many products in every layout and kind."""
    found = hashlib.sha256()
    for layout in LAYOUTS:
        for dtype in DTYPES:
            for m, n, k in ((1, 100, 70), (33, 65, 513), (64, 7, 31), (129, 130, 1027)):
                a, b = operands(m, n, k, layout, dtype)
                for kind in kinds(layout):
                    found.update(product(kind, a, b, layout).tobytes())
    return found.hexdigest()


@pytest.mark.skipif(_C.cpu_isa() == "plain", reason="this processor, or PGOLF_CPU_ISA, has no two sets with FMA")
def test_fused_instruction_sets_agree_to_the_bit() -> None:
    answers = {isa: run_isolated(DIGEST, PGOLF_CPU_ISA=isa) for isa in ("avx2", "avx512")}
    found = {isa: answer.stdout.strip() for isa, answer in answers.items() if answer.returncode == 0}
    assert found and set(found.values()) == {digest()}
