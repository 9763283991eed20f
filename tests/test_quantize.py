"""Row quantisers, pruning and policies against tests/reference: integers and scales are equal, not close."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgolf.artifacts.quantize import dequantize_rows, encode_plan, prune_weights, qat_clips, quantize_rows
from tests.reference import quant as reference

POLICY = [("tok_emb.*", "fp16"), ("*.mlp.*", "int5"), ("*.attn.*", "int6"), ("*", "int8")]
CONTROLS = ["attn_scale", "smear.gate", "skip_*"]


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def matrices(largest: float):
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)
    values = st.one_of(
        st.floats(-largest, largest, width=32),
        st.integers(-40, 40).map(lambda n: n / 2),  # ties of round half even
        st.sampled_from([0.0, -0.0, 1e-12, 2.0**-14, 1e-40, 1.0]),
    )
    return hnp.arrays(np.float32, shapes, elements=values)


@given(matrices(2.0**15), st.sampled_from([(5, None, 15), (6, None, 31), (8, None, 127), (6, 20, 20), (2, None, 1)]))
def test_amax_equals_reference(w, case):
    bits, clip, resolved = case
    assert_equal(quantize_rows(w, bits=bits, clip=clip), reference.quantize_rows(w, resolved))


@given(matrices(2.0**20))
def test_quantile_floor_equals_reference(w):
    assert_equal(quantize_rows(w, bits=8, method="quantile_floor"), reference.quantize_rows_int8(w))


@given(matrices(2.0**13), st.sampled_from([0.5, 3.0, 7.25, 64.0]))
def test_rms_equals_reference(w, steps):
    assert_equal(quantize_rows(w, bits=8, method="rms", steps=steps), reference.quantize_rows_rms(w, steps))


def test_rms_has_one_step_where_rows_have_room():
    w = np.random.default_rng(0).standard_normal((64, 300)).astype(np.float32)
    w[5] *= 100
    q, scale = quantize_rows(w, bits=8, method="rms", steps=8)
    step = np.float16(np.sqrt(np.mean(w.astype(np.float64) ** 2)) / 8)
    assert (np.delete(scale, 5) == step).all() and scale[5] > step
    assert np.abs(q[5]).max() == 127 and np.abs(np.delete(q, 5, 0)).max() < 10


@pytest.mark.parametrize("columns", [1, 512, 700_001])  # the last clips its largest entries
def test_quantile_floor_of_long_rows(columns):
    w = np.random.default_rng(columns).standard_normal((2, columns)).astype(np.float32) * 3
    q, scale = quantize_rows(w, bits=8, method="quantile_floor")
    assert_equal((q, scale), reference.quantize_rows_int8(w))
    assert (np.sum(np.abs(q) == 127) > 2) == (columns == 700_001)


def test_fp16_scales_round_half_even_everywhere():
    """Clip 1 makes σ = fp16(|w|): every normal fp16 number, the ties between neighbours, and both sides of each tie."""
    halves = np.arange(0x0400, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    w = np.concatenate([halves, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))])
    _, scale = quantize_rows(-w[:, None], bits=2)
    np.testing.assert_array_equal(scale, w.astype(np.float16))


def test_exact_ties_are_divided_truly_and_rounded_to_even():
    """Rows σ·(k + ½): w / σ is the tie itself, which a product with 1 / σ would miss for many σ."""
    sigma = np.random.default_rng(0).uniform(0.001, 10, 500).astype(np.float16).astype(np.float32)[:, None]
    multiples = np.append(np.arange(-31, 31) + 0.5, 31).astype(np.float32)
    q, scale = quantize_rows(sigma * multiples, bits=6)
    np.testing.assert_array_equal(scale, sigma[:, 0].astype(np.float16))
    np.testing.assert_array_equal(q, np.broadcast_to(np.round(multiples), q.shape))


def test_scale_is_at_least_the_smallest_normal_fp16():
    w = np.array([[0.0], [1e-45], [1e-12], [2.0**-15], [2.0**-14 * 0.9999]], np.float32)
    _, scale = quantize_rows(w, bits=2)
    np.testing.assert_array_equal(scale, np.full(5, 2.0**-14, np.float16))


@given(matrices(100.0), st.sampled_from([5, 6, 8]))
def test_round_trip_is_within_half_a_step(w, bits):
    q, scale = quantize_rows(w, bits=bits)
    steps = scale.astype(np.float64)[:, None]
    # Half a step, and what fp16's rounding of the scale takes from the largest magnitude (2^-11 of it).
    slack = np.abs(w).max(axis=1, keepdims=True) * 2.0**-10
    assert (np.abs(dequantize_rows(q, scale) - w.astype(np.float64)) <= steps / 2 + slack).all()


@given(
    hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9)),
    st.integers(0, 2**32 - 1),
)
def test_dequantize_equals_reference(q, seed):
    scale = np.random.default_rng(seed).integers(0, 0x7C00, q.shape[0], np.uint16).view(np.float16)
    found = dequantize_rows(q, scale)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, reference.dequantize_rows(q, scale))


def test_dequantize_knows_every_fp16_number():
    halves = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    found = dequantize_rows(np.ones((len(halves), 1), np.int8), halves)[:, 0]
    np.testing.assert_array_equal(found.view(np.uint32), halves.astype(np.float32).view(np.uint32))


@given(matrices(10.0), st.floats(0, 1))
def test_prune_kernel_equals_reference(w, fraction):
    large = np.resize(w, (257, 256))  # above the limit, with many equal magnitudes
    before = large.copy()
    pruned = prune_weights(large, fraction)
    np.testing.assert_array_equal(pruned, reference.prune(large, fraction))
    np.testing.assert_array_equal(large, before)


def test_prune_takes_the_smallest_magnitudes():
    w = np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32)
    pruned = prune_weights(w, 0.03)
    assert np.sum(pruned == 0) == np.ceil(0.03 * (w.size - 1))
    assert np.abs(w[pruned == 0]).max() < np.abs(pruned[pruned != 0]).min()


@pytest.mark.parametrize("shape", [(256, 256), (70_000,), (2, 200, 200)])
def test_prune_leaves_small_and_other_tensors(shape):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    assert prune_weights(w, 0.5) is w


def test_same_bits_for_any_number_of_threads():
    script = (
        "import hashlib, numpy as np; from pgolf.artifacts.quantize import *;"
        "w = np.random.default_rng(0).standard_normal((400, 300)).astype(np.float32);"
        "parts = [*quantize_rows(w), *quantize_rows(w, bits=8, method='quantile_floor')];"
        "parts.append(dequantize_rows(*parts[:2]));"
        "print(hashlib.sha256(b''.join(p.tobytes() for p in parts)).hexdigest())"
    )
    digests = set()
    for threads in ("1", "2", "3"):
        environment = {**os.environ, "PGOLF_NUM_THREADS": threads}
        run = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True)
        digests.add(run.stdout)
    assert len(digests) == 1


def test_other_floats_layouts_and_dlpack_are_taken():
    import torch

    w = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    expected = quantize_rows(w)
    assert_equal(quantize_rows(np.asfortranarray(w)), expected)
    assert_equal(quantize_rows(w.astype(np.float64)), expected)
    assert_equal(quantize_rows(torch.from_numpy(w)), expected)
    assert_equal(quantize_rows(np.repeat(w, 2, axis=1)[:, ::2]), expected)
    odd = np.frombuffer(b"\0" + expected[1].tobytes(), np.float16, offset=1)  # unaligned, as in an artifact
    assert_equal([dequantize_rows(expected[0], odd)], [dequantize_rows(*expected)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("arguments", [{"bits": 6}, {"bits": 8, "method": "quantile_floor"}])
def test_non_finite_rows_are_named(value, arguments):
    w = np.ones((5, 4), np.float32)
    w[3, 2] = w[4, 0] = value
    with pytest.raises(ValueError, match="Row 3 holds NaN or infinity"):
        quantize_rows(w, **arguments)


def test_scales_beyond_fp16_are_refused():
    # 65520 is the tie between fp16's largest number and infinity.
    below = np.nextafter(np.float32(65520), np.float32(0))
    assert quantize_rows(np.full((1, 1), below, np.float32), bits=2)[1][0] == 65504
    with pytest.raises(ValueError, match=r"Row 1 reaches the magnitude 65520, .* beyond 65504"):
        quantize_rows(np.array([[1], [65520]], np.float32), bits=2)
    with pytest.raises(ValueError, match=r"Row 0 reaches the magnitude 1e\+07"):
        quantize_rows(np.full((1, 3), 1e7, np.float32), bits=8, method="quantile_floor")
    with pytest.raises(ValueError, match="Row 0 holds NaN or infinity"):
        quantize_rows(np.full((1, 3), 1e300))


@pytest.mark.parametrize(
    ("error", "message", "w", "arguments"),
    [
        (ValueError, r"shape \(4,\); a matrix", np.ones(4, np.float32), {}),
        (ValueError, r"shape \(4, 0\); at least one column", np.ones((4, 0), np.float32), {}),
        (TypeError, "dtype int64; a floating dtype", np.ones((2, 2), np.int64), {}),
        (TypeError, "dtype object", np.array([[None]]), {}),
        (ValueError, "bits is 9; 2 … 8", np.ones((2, 2), np.float32), {"bits": 9}),
        (ValueError, "bits is 1; 2 … 8", np.ones((2, 2), np.float32), {"bits": 1}),
        (TypeError, "bits is 6.0; an integer", np.ones((2, 2), np.float32), {"bits": 6.0}),
        (ValueError, "clip is 32; 1 … 31", np.ones((2, 2), np.float32), {"clip": 32}),
        (ValueError, "clip is 0; 1 … 31", np.ones((2, 2), np.float32), {"clip": 0}),
        (TypeError, "clip is True; an integer", np.ones((2, 2), np.float32), {"clip": True}),
        (ValueError, "method is 'max'; one of amax, quantile_floor", np.ones((2, 2), np.float32), {"method": "max"}),
        (ValueError, "bits=6, clip=None; bits=8", np.ones((2, 2), np.float32), {"method": "quantile_floor"}),
        (ValueError, "bits=6, clip=None; bits=8", np.ones((2, 2), np.float32), {"method": "rms", "steps": 3.0}),
        (ValueError, "'rms' needs steps, and no", np.ones((2, 2), np.float32), {"bits": 8, "method": "rms"}),
        (ValueError, "'rms' needs steps, and no", np.ones((2, 2), np.float32), {"steps": 3.0}),
        (ValueError, "steps is 0; a pos", np.ones((2, 2), np.float32), {"bits": 8, "method": "rms", "steps": 0}),
        (ValueError, "Row 1 holds NaN", np.array([[1], [np.nan]]), {"bits": 8, "method": "rms", "steps": 3.0}),
    ],
)
def test_bad_arguments_of_quantize_rows(error, message, w, arguments):
    with pytest.raises(error, match=message):
        quantize_rows(w, **arguments)


@pytest.mark.parametrize(
    ("error", "message", "q", "scale"),
    [
        (ValueError, r"q has shape \(3,\)", np.ones(3, np.int8), np.ones(3, np.float16)),
        (TypeError, "q has dtype int32; int8", np.ones((3, 2), np.int32), np.ones(3, np.float16)),
        (TypeError, "scale has dtype float32; float16", np.ones((3, 2), np.int8), np.ones(3, np.float32)),
        (ValueError, r"scale has shape \(2,\); \(3,\)", np.ones((3, 2), np.int8), np.ones(2, np.float16)),
        (ValueError, "scale of row 1 is NaN", np.ones((2, 2), np.int8), np.array([1, np.inf], np.float16)),
    ],
)
def test_bad_arguments_of_dequantize_rows(error, message, q, scale):
    with pytest.raises(error, match=message):
        dequantize_rows(q, scale)


def test_late_qat_s_grids_are_the_policy_s():
    shapes = {"tok_emb.weight": (9, 4), "blocks.0.attn.c_k.weight": (4, 4), "blocks.0.attn.q_gain": (4,)}
    shapes |= {"blocks.0.mlp.fc.weight": (8, 4), "blocks.1.mlp.fc.weight": (8, 4), "bigram.proj.weight": (4, 4)}
    policy = [("blocks.0.attn.*", "fp16"), ("blocks.1.*", "int5"), ("*.mlp.*", "int6"), ("*.attn.*", "int6")]
    everywhere = [("*", "int6")]
    assert qat_clips(shapes, policy) == {
        "blocks.0.attn.c_k.weight": 31,  # kept as fp16, trained as its like
        "blocks.0.mlp.fc.weight": 31,
        "blocks.1.mlp.fc.weight": 15,
    }
    assert qat_clips(shapes, [("blocks.0.*", "rms:4.5"), *everywhere]) == {"blocks.1.mlp.fc.weight": 31}
    assert qat_clips(shapes, [("blocks.1.*", "int8"), *everywhere]).keys() == {
        "blocks.0.attn.c_k.weight",
        "blocks.0.mlp.fc.weight",
    }
    assert qat_clips(shapes, [("*.attn.*", "int6")]) == {"blocks.0.attn.c_k.weight": 31}
    assert qat_clips(shapes, [("*", "fp16")]) == {}


def test_encode_plan_in_order():
    shapes = {
        "tok_emb.weight": (100, 10),
        "blocks.0.mlp.fc.weight": (100, 10),
        "blocks.0.attn.c_q.weight": (100, 10),
        "blocks.0.mlp.proj.weight": (10, 10),  # small: before the policy
        "blocks.0.attn_scale": (10,),  # small: before control
        "blocks.1.attn_scale": (1000,),
        "smear.gate": (1000,),
        "skip_weights": (50, 20),
        "blocks.1.skip_weights": (50, 20),  # a pattern with a wildcard matches whole names only
        "lm_head.weight": (100, 10),
        "bigram.scale": (),
    }
    plan = encode_plan(shapes, POLICY, 100, CONTROLS)
    assert list(plan) == list(shapes)
    assert plan == {
        "tok_emb.weight": "fp16",
        "blocks.0.mlp.fc.weight": "int5",
        "blocks.0.attn.c_q.weight": "int6",
        "blocks.0.mlp.proj.weight": "fp16",
        "blocks.0.attn_scale": "fp16",
        "blocks.1.attn_scale": "fp32",
        "smear.gate": "fp32",
        "skip_weights": "fp32",
        "blocks.1.skip_weights": "int8",
        "lm_head.weight": "int8",
        "bigram.scale": "fp16",
    }


@given(
    st.sampled_from(
        ["tok_emb.weight", "blocks.3.mlp.fc.weight", "blocks.3.attn.c_k.weight", "blocks.3.attn_scale", "x"]
    ),
    st.integers(1, 40),
    st.integers(0, 1600),
)
def test_encode_plan_equals_reference(name, side, small_numel):
    found = encode_plan({name: (side, side)}, POLICY, small_numel, CONTROLS[:2])
    assert found == {name: reference.resolve(name, side * side, POLICY, small_numel, CONTROLS[:2])}


@pytest.mark.parametrize("shape", [(1000,), (10, 10, 10)])
def test_integer_encodings_are_for_matrices(shape):
    with pytest.raises(ValueError, match=r"'\*\.mlp\.\*' gives the tensor blocks.0.mlp.bias .* int5, which is for 2-D"):
        encode_plan({"blocks.0.mlp.bias": shape}, POLICY, 10, CONTROLS)


def test_unmatched_tensors_are_named():
    with pytest.raises(ValueError, match=r"No pattern of the policy matches the tensor lm_head.weight"):
        encode_plan({"lm_head.weight": (9, 9)}, POLICY[:-1], 10, CONTROLS)
