"""Every operation in 16-bit storage and on the GPU, against the float64 reference and exactly where that is possible.

Inputs are rounded to the storage dtype first. bfloat16: every output and gradient is within 4e-3 in norm, and every
element of a stored tensor within 3 units in its last place plus 2 % of the tensor's root mean square, for what cancels
(8 % in the gradients of attention, where p·(dp − δ) cancels in rows whose probabilities are nearly 0 and 1).
float16: an eighth of that in norm, but not less than 1e-3. float32: 1e-5 in norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from pgolf import ops
from pgolf.artifacts.quantize import quantize_rows
from pgolf.config import NEWTON_SCHULZ
from tests.cases import (
    Case,
    adapted_head_case,
    attention_case,
    attention_sublayer_case,
    cast,
    draw,
    embed_case,
    head_case,
    mixed_native,
    mlp_up_case,
    named,
    project_residual_case,
    qkv_case,
    same_bits,
)
from tests.places import GPU_PLACES, ROUNDING_PLACES, Place
from tests.reference import model, trainer
from tests.reference.rng import uniform

torch.set_num_threads(2)

PLACES = [*ROUNDING_PLACES, *GPU_PLACES]
IN_NORM = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 1e-5}
CANCELLED, CANCELLED_IN_ATTENTION = 0.02, 0.08

# Tensors that no dtype but float32 holds: vectors and scalars of parameters, tables, losses (backend.h).
MASTER = {"gain", "resid_mix", "skip_weight", "smear_gate", "bigram_scale", "cos", "sin", "scale", "reader of m"}
MASTER_RESULTS = {"losses", "logits", "late losses", "late logits", "objective"}

CASES = [
    embed_case(2, 130, 97, 32, (53, 6), reset=True),
    embed_case(1, 1, 2, 64),
    embed_case(1, 63, 1000, 64, (11, 5)),
    embed_case(3, 65, 97, 64, (1000, None)),
    embed_case(2, 513, 1000, 640, (300, 128)),
    embed_case(1, 2047, 8192, 512, (10240, 128)),
    qkv_case(2, 65, 64, 2, 1, 32, "other"),
    qkv_case(1, 1, 64, 2, 2, 32),
    qkv_case(1, 63, 128, 2, 1, 64, "x"),
    qkv_case(2, 130, 96, 1, 1, 96, "other"),
    qkv_case(1, 65, 256, 2, 1, 128),
    qkv_case(3, 130, 128, 4, 2, 64, "other"),
    qkv_case(1, 600, 512, 8, 4, 64),
    qkv_case(1, 515, 640, 10, 5, 64, "other"),
    qkv_case(3, 40, 80, 2, 2, 40),
    qkv_case(3, 65, 64, 2, 1, 32, "other", rank=3),
    qkv_case(2, 130, 96, 1, 1, 96, rank=8),
    qkv_case(2, 256, 512, 8, 4, 64, "other", turned=16),
    qkv_case(2, 256, 512, 8, 4, 64, "other", rank=8, turned=32),
    qkv_case(2, 65, 256, 2, 2, 128, turned=48),
    qkv_case(2, 65, 64, 2, 1, 32, "other", turned=16),
    qkv_case(2, 256, 512, 8, 4, 64, "other", norm_scale=0.3),
    qkv_case(2, 130, 96, 1, 1, 96, rank=8, norm_scale=0.5),
    qkv_case(2, 256, 512, 8, 4, 64, "other", rank=8),
    qkv_case(1, 65, 256, 2, 1, 128, "x", rank=16),
    qkv_case(3, 24, 128, 2, 1, 64, "x", rank=8),  # blocks of rows of several sequences,
    qkv_case(5, 24, 640, 10, 5, 64, rank=8),  # also in wide rows,
    qkv_case(2, 512, 256, 4, 2, 64, "other", rank=8),  # and of parts of one
    attention_case(1, 1, 2, 1, 32),
    attention_case(2, 63, 4, 2, 32),
    attention_case(2, 65, 4, 2, 64),
    attention_case(3, 130, 6, 2, 64),
    attention_case(1, 200, 3, 1, 40),
    attention_case(1, 129, 2, 2, 96),
    attention_case(2, 257, 2, 1, 128),
    attention_case(1, 2047, 2, 1, 64),
    attention_case(1, 4096, 2, 2, 64),
    attention_case(2, 65, 4, 2, 64, normed=1.5),
    attention_case(24, 260, 8, 4, 64),  # more work than SMs: persistent blocks do several tiles
    project_residual_case(2, 65, 64, 48, "other"),
    project_residual_case(1, 1, 32, 32),
    project_residual_case(1, 63, 64, 32, "x"),
    project_residual_case(3, 130, 640, 1920),
    project_residual_case(1, 65, 64, 97, ""),
    project_residual_case(3, 130, 128, 192, "other"),
    project_residual_case(1, 600, 512, 512, ""),
    project_residual_case(2, 65, 64, 48, h_scale=1.0),
    project_residual_case(1, 63, 32, 97, h_scale=1 / 16),
    project_residual_case(1, 1, 64, 128, h_scale=1.0),
    project_residual_case(3, 130, 128, 256, h_scale=1 / 16),
    project_residual_case(2, 300, 512, 1536, h_scale=1.0),
    project_residual_case(3, 130, 640, 1920, h_scale=1 / 16),
    project_residual_case(2, 65, 64, 48, h_scale=1.0, slope=0.5),
    project_residual_case(3, 130, 128, 256, h_scale=1 / 16, slope=0.3),
    project_residual_case(2, 300, 512, 1536, h_scale=1.0, slope=0.5),
    project_residual_case(1, 40_000, 64, 128, h_scale=1.0),  # several tiles of rows for every block
    mlp_up_case(2, 65, 64, 97),
    mlp_up_case(40, 1, 32, 64),
    mlp_up_case(1, 40, 32, 1),
    mlp_up_case(3, 130, 640, 1920),
    mlp_up_case(1, 1, 64, 128),
    mlp_up_case(2, 65, 64, 97, slope=0.5),
    mlp_up_case(2, 300, 512, 1536, slope=0.5, norm_scale=0.3),
    mlp_up_case(1, 1, 64, 128, slope=0.3),
    mlp_up_case(2, 300, 512, 1536),
    mlp_up_case(1, 40_000, 64, 128),  # more rows than the blocks of one pass have
    project_residual_case(2, 17_000, 64, 128, ""),
    head_case(2, 65, 64, 97, softcap=5.0, loss_scale=0.25),
    head_case(40, 1, 32, 50),
    head_case(1, 40, 32, 2),
    head_case(3, 63, 64, 1000, loss_scale=1 / 6),
    head_case(1, 2047, 64, 8192, loss_scale=32.0),
    head_case(1, 65, 640, 20_001),
    adapted_head_case(3, 65, 64, 97, first=3, rank=3, softcap=5.0, loss_scale=0.5),
    adapted_head_case(4, 128, 512, 1024, first=64, rank=8, loss_scale=32.0),
    adapted_head_case(2, 1100, 64, 8192, first=0, rank=8),
    adapted_head_case(2, 65, 64, 20_001, first=1, rank=8),
    adapted_head_case(2, 65, 64, 97, first=5, rank=0),
]


def rounded(case: Case, place: Place) -> Case:
    inputs = {
        name: place.round(a) if a.dtype.kind == "f" and name not in MASTER else a for name, a in case.inputs.items()
    }
    if "scale" in inputs:  # a projection's weights are rounded together with their scale, by `working_copy`
        scale = inputs["scale"][:, None]
        inputs["w"] = place.round(case.inputs["w"] * scale) / scale
    return Case(case.name, inputs, case.expected, case.run, case.gradients, case.started)


def check(case: Case, place: Place) -> None:
    case = rounded(case, place)
    outputs, upstream, gradients = case.reference(place.round)
    starts = {name: place.round(start) for name, start in case.starts(gradients).items()}
    with ops.on(place.device, place.dtype):
        native_outputs, native_gradients = case.native("float32", upstream, starts)
    for name, out in native_outputs.items():
        wanted = outputs[name]
        size = float(np.linalg.norm(wanted))
        if "losses" in name:  # differences of logits
            size = max(size, rms_of(outputs["logits"]) * math.sqrt(wanted.size))
        cancelled = 0.0 if name in MASTER_RESULTS else CANCELLED
        compare(out, wanted, size, place, f"{case.name}: {name}", cancelled)
    everything = math.sqrt(sum(float(np.sum(g**2)) for g in gradients.values()))
    for name, g in native_gradients.items():
        wanted = gradients[name] + starts.get(name, 0)
        size = float(np.linalg.norm(wanted))
        if size <= 1e-9 * everything:  # what is zero by its mathematics has no relative error
            size = everything
        stored = name in ("x", "skip", "q", "k", "v", "a", "u")
        cancelled = (CANCELLED_IN_ATTENTION if "gain" in case.inputs else CANCELLED) if stored else 0.0
        compare(g, wanted, size, place, f"{case.name}: gradient of {name}", cancelled)


def rms_of(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


def compare(found: np.ndarray, expected: np.ndarray, scale: float, place: Place, what: str, cancelled: float) -> None:
    """cancelled: 0 for what is not stored in 16 bits, so that its elements are not looked at singly."""
    assert found.shape == expected.shape and found.dtype == np.float32, what
    error = np.abs(found - expected)
    in_norm = float(np.linalg.norm(error))
    bound = IN_NORM[place.dtype] * (2 if what.endswith("of gain") else 1)  # a sum of T·D products that cancel
    assert in_norm <= bound * scale, f"{what}: relative error {in_norm / scale if scale else in_norm:.2e}"
    if cancelled and place.dtype != "float32":
        allowed = 3 * place.ulp * np.abs(expected) + cancelled * (place.ulp / 2**-7) * scale / math.sqrt(expected.size)
        worst = float(np.max(error / allowed))
        assert worst <= 1, f"{what}: an element is {worst:.2f} times as far away as allowed"


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_the_reference_s_up_to_rounding(case: Case, place: Place) -> None:
    check(case, place)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("skip", ["", "x", "other"])
@pytest.mark.parametrize("rank", [0, 8])
def test_an_attention_sublayer_has_the_bits_of_its_pieces(rank: int, skip: str, place: Place) -> None:
    case = attention_sublayer_case(2, 128, 128, 2, 1, 64, skip, rank)
    _, upstream, gradients = case.reference(place.round)
    inputs, upstream, starts = (cast(a, "float32") for a in (case.inputs, upstream, case.starts(gradients)))
    with ops.on(place.device, place.dtype):
        mixed, wo = mixed_native(inputs, skip), ops.working_copy(inputs["w"], inputs["scale"])
        tables, adapters = (inputs["cos"], inputs["sin"]), inputs.get("adapters")
        weights = [inputs[name] for name in ("wq", "wk", "wv")]
        dout, pending = upstream["out"], upstream["reader of x"]
        started = {name: start for name, start in starts.items() if name != "scale"}

        out, saved = ops.attention_sublayer(mixed, *weights, inputs["gain"], wo, *tables, adapters=adapters)
        found = ops.attention_sublayer_backward(saved, dout, pending=pending, add_to=started)

        dgain = started.pop("gain")
        heads, made = ops.qkv(mixed, *weights, *tables, adapters=adapters)
        o, attended = ops.attention(*heads, inputs["gain"], normed=True)
        a = o.reshape(*o.shape[:2], -1)
        wanted_out, projected = ops.project_residual(mixed, a, wo)
        do, dwo = ops.project_residual_backward(projected, dout)
        *at_products, gain = ops.attention_backward(attended, do.reshape(o.shape), qkv=made, add_to={"gain": dgain})
        wanted = ops.qkv_backward(made, *at_products, at_products=True, dm=dout, pending=pending, add_to=started)
    assert same_bits(out, wanted_out)
    for name, gradient in {**named(wanted), "gain": gain, "wo": dwo}.items():
        assert same_bits(getattr(found, name), gradient), name


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("slope", "norm_scale"), [(0.0, 1.0), (0.5, 0.3)])
def test_an_mlp_sublayer_has_the_bits_of_its_pieces(slope: float, norm_scale: float, place: Place) -> None:
    rng = np.random.default_rng(8)
    x, dout = (place.round(draw(rng, 2, 65, 64)).astype(np.float32) for _ in range(2))
    up, down = (place.round(draw(rng, *shape) / 8).astype(np.float32) for shape in ((96, 64), (64, 96)))
    with ops.on(place.device, place.dtype):
        out, saved = ops.mlp_sublayer(x, up, down, negative_slope=slope, norm_scale=norm_scale)
        found = ops.mlp_sublayer_backward(saved, dout)

        h_scale = 1 / ops.mlp_down_factor()
        h, squared = ops.mlp_up(x, up, h_scale=h_scale, negative_slope=slope, norm_scale=norm_scale)
        wanted_out, projected = ops.project_residual(x, h, down)
        ways = {"negative_slope": slope, "negative": squared.tensors.get("negative")}
        du, ddown = ops.project_residual_backward(projected, dout, h_scale=h_scale, **ways)
        dx, dup = ops.mlp_up_backward(squared, du, add_to={"x": dout})
    assert same_bits(out, wanted_out)
    for name, gradient in {"x": dx, "up": dup, "down": ddown}.items():
        assert same_bits(getattr(found, name), gradient), name


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("gain", [0.0, 1.5, -1.5, 4.2, -4.2, 12.0])  # up to 4.2 a GPU uses the bound of scores
@pytest.mark.parametrize("scores", ["random", "alike", "apart"])
def test_attention_of_normed_heads(gain: float, scores: str, place: Place) -> None:
    """alike: all are at one bound; apart: those of the first 128 keys at one, those of later keys at the other."""
    rng = np.random.default_rng(5)
    B, T, H, K, D = 2, 330, 4, 2, 64
    q, k, v, do = (place.round(draw(rng, B, T, heads, D)) for heads in (H, K, K, H))
    for x in (q, k):
        x /= np.sqrt(np.mean(x**2, axis=-1, keepdims=True))
    if scores != "random":
        q[:] = np.where(rng.standard_normal(D) > 0, 1.0, -1.0)
        k[:] = -q[0, 0, 0]
    if scores == "apart":
        k[:, 128:] *= -1
    q, k, v, do, gains = (x.astype(np.float32) for x in (place.round(q), place.round(k), v, do, np.full(H, gain)))
    with ops.on(place.device, place.dtype):
        (o, saved), (_, plain) = ops.attention(q, k, v, gains, normed=True), ops.attention(q, k, v, gains)
        gradients, wanted = ops.attention_backward(saved, do), ops.attention_backward(plain, do)
    leaves = [torch.tensor(x, dtype=torch.float64) for x in (q * gain, k, v)]
    expected = model.causal_attention(*leaves).numpy()
    compare(o, expected, float(np.linalg.norm(expected)), place, "o", CANCELLED)
    everything = math.sqrt(sum(float(np.linalg.norm(g)) ** 2 for g in (wanted.q, wanted.k, wanted.v)))
    for name in "qkv":  # from the log-sum-exp
        found, like = getattr(gradients, name), getattr(wanted, name)
        assert np.linalg.norm(found - like) <= IN_NORM[place.dtype] * everything, name


HEADS = [(1, 1, 32, 2, 1, 32), (2, 65, 64, 2, 1, 32), (3, 130, 128, 4, 2, 64), (1, 257, 128, 2, 2, 128)]
HEADS += [(1, 200, 80, 2, 1, 40), (1, 1000, 512, 8, 4, 64), (24, 260, 64, 8, 4, 64)]
TURNED = [(*sizes, sizes[-1]) for sizes in HEADS]
TURNED += [
    (3, 130, 128, 4, 2, 64, 32),
    (1, 1000, 512, 8, 4, 64, 16),
    (1, 257, 128, 2, 2, 128, 48),
    (2, 65, 64, 2, 1, 32, 16),
]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("B", "T", "d", "H", "K", "D", "turned"), TURNED)
def test_attention_s_backward_goes_past_norm_and_rope(
    B: int, T: int, d: int, H: int, K: int, D: int, turned: int, place: Place
) -> None:
    """From the q, k and v that the place itself stored: what it rounded before is no error of this step."""
    case = rounded(qkv_case(B, T, d, H, K, D, turned=turned), place)
    t = {name: torch.tensor(value) for name, value in case.inputs.items()}
    rng = np.random.default_rng(4)
    gain, do = draw(rng, H).astype(np.float32), place.round(draw(rng, B, T, H, D)).astype(np.float32)
    inputs = {name: value.astype(np.float32) for name, value in case.inputs.items()}
    with ops.on(place.device, place.dtype):
        weights = (inputs[name] for name in ("wq", "wk", "wv", "cos", "sin"))
        heads, made = ops.qkv(mixed_native(inputs, ""), *weights, rope_dims=turned)
        _, saved = ops.attention(*heads, gain, normed=True)
        found = ops.attention_backward(saved, do, qkv=made)
        at_heads = ops.attention_backward(saved, do)
    assert same_bits(found.gain, at_heads.gain)

    n = model.rms(t["resid_mix"][0] * t["x"] + t["resid_mix"][1] * t["x0"])
    cos, sin = t["cos"][:T, : turned // 2], t["sin"][:T, : turned // 2]
    leaves, rotated = [], []
    for stored, w in zip(heads[:2], (t["wq"], t["wk"]), strict=True):
        size = (n @ w.T).unflatten(-1, (-1, D)).square().mean(-1, keepdim=True).sqrt()
        back = model.apply_rope(torch.tensor(stored, dtype=torch.float64), cos, -sin)
        leaves.append((back * size).requires_grad_())
        through = model.apply_rope(model.rms(leaves[-1]), cos, sin)
        rotated.append(through + (torch.tensor(stored) - through).detach())
    leaves.append(torch.tensor(heads[2], dtype=torch.float64, requires_grad=True))
    o = model.causal_attention(rotated[0] * torch.tensor(gain)[:, None], rotated[1], leaves[2])
    expected = torch.autograd.grad(o, leaves, torch.tensor(do, dtype=torch.float64))
    everything = math.sqrt(sum(float(g.square().sum()) for g in expected))
    for name, wanted in zip("qkv", expected, strict=True):
        size = float(wanted.norm())
        size = size if size > 1e-9 * everything else everything  # of one position, q's and k's are 0
        compare(getattr(found, name), wanted.numpy(), size, place, f"gradient of {name}", CANCELLED_IN_ATTENTION)


# Exact ----------------------------------------------------------------------------------------------------------------


def integers(rng: np.random.Generator, *shape: int, most: int = 2) -> np.ndarray:
    return rng.integers(-most, most + 1, shape).astype(np.float32)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("N", "d", "c"), [(1, 32, 8), (65, 64, 48), (130, 96, 33), (300, 640, 64)])
def test_products_of_small_integers_are_exact(N: int, d: int, c: int, place: Place) -> None:
    """Every partial sum is an integer that the dtype holds: a single wrong index shows."""
    rng = np.random.default_rng(1)
    x, a, w = integers(rng, 1, N, d), integers(rng, 1, N, c, most=1), integers(rng, d, c, most=1)
    dout = integers(rng, 1, N, d, most=1) * (rng.random((1, N, d)) < 64 / d)
    with ops.on(place.device, place.dtype):
        out, saved = ops.project_residual(x, a, w)
        gradients = ops.project_residual_backward(saved, dout)
    assert np.array_equal(out, x + a @ w.T)
    assert np.array_equal(gradients.a, dout @ w)
    assert np.array_equal(gradients.w, np.einsum("btd,btc->dc", dout, a))


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("N", "d", "F"), [(1, 32, 8), (65, 64, 48), (130, 64, 128), (300, 640, 384), (9000, 512, 256)])
def test_gradients_before_relu2_are_exact_on_small_integers(N: int, d: int, F: int, place: Place) -> None:
    rng = np.random.default_rng(2)
    u, w = integers(rng, 1, N, F, most=4), integers(rng, d, F, most=1)
    dout = integers(rng, 1, N, d, most=1) * (rng.random((1, N, d)) < 24 / d)  # sums of at most 24 ones or so
    with ops.on(place.device, place.dtype):
        _, saved = ops.project_residual(np.zeros((1, N, d), np.float32), np.maximum(u, 0) ** 2, w)
        found = ops.project_residual_backward(saved, dout, h_scale=1.0, weights=False).a
    assert np.array_equal(found, (dout @ w) * 2 * np.maximum(u, 0))


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 8), (513, 40, 64), (130, 264, 96)])
def test_bare_products_are_exact_on_small_integers(m: int, n: int, k: int, place: Place) -> None:
    rng = np.random.default_rng(3)
    a, b = integers(rng, m, k, most=1), integers(rng, n, k, most=1)
    with ops.on(place.device, place.dtype):
        assert np.array_equal(ops.product(a, b), a @ b.T)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("T", "D"), [(1, 64), (63, 32), (65, 64), (130, 40), (257, 128)])
def test_zero_queries_give_prefix_means(T: int, D: int, place: Place) -> None:
    """Each key counts once: a missing or a doubled one shows. Prefix lengths that are powers of two are exact."""
    rng = np.random.default_rng(2)
    v = integers(rng, 2, T, 1, D, most=1)
    q, k = np.zeros((2, T, 2, D), np.float32), place.round(draw(rng, 2, T, 1, D)).astype(np.float32)
    with ops.on(place.device, place.dtype):
        o, _ = ops.attention(q, k, v, np.full(2, 1.5, np.float32))
    count = np.arange(1, T + 1, dtype=np.float64)[:, None, None]
    expected = np.broadcast_to(np.cumsum(v, axis=1, dtype=np.float64) / count, o.shape)
    np.testing.assert_allclose(o, expected, rtol=place.ulp, atol=0)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("H", "K"), [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_query_heads_read_their_key_value_heads(H: int, K: int, place: Place) -> None:
    rng = np.random.default_rng(10)
    v = integers(rng, 3, 1, K, 32, most=9)
    q, k = (draw(rng, 3, 1, heads, 32).astype(np.float32) for heads in (H, K))
    with ops.on(place.device, place.dtype):
        o, _ = ops.attention(q, k, v, np.ones(H, np.float32))
    np.testing.assert_array_equal(o, v[:, :, [h * K // H for h in range(H)]])


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_embedding_and_smear_gate_are_exact_on_signs(place: Place) -> None:
    """Rows of ±1 have rms 1, and gates of 0, ½ and 1 keep them exact."""
    rng = np.random.default_rng(9)
    table = rng.choice([-1.0, 1.0], (11, 64)).astype(np.float32)
    ids = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    gate = np.repeat(np.array([-1000.0, 0.0, 1000.0, 0.0], np.float32), 16)
    share = np.repeat([0.0, 0.5, 1.0, 0.5], 16)
    previous = np.concatenate([np.zeros((2, 1, 64)), table[ids[:, :-1]]], axis=1)
    for reset in (False, True):
        with ops.on(place.device, place.dtype):
            x0, _ = ops.embed(ids, table, gate, reset_at_bos=reset, bos_id=1)
        before = np.where((ids == 1)[..., None], 0.0, previous) if reset else previous
        np.testing.assert_array_equal(x0, (1 - share) * table[ids] + share * before)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_embedding_gradients_gather_every_reader_once(place: Place) -> None:
    """A row of equal signs passes a gradient that is orthogonal to it unchanged; their sums are integers."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 7, (3, 130))
    table = np.ones((7, 64), np.float32)
    half = integers(rng, 3, 130, 32)
    dx0 = np.concatenate([half, -half], axis=2)  # orthogonal to a row of ones
    with ops.on(place.device, place.dtype):
        _, saved = ops.embed(ids, table, np.full(64, -1000.0, np.float32))
        found = ops.embed_backward(saved, dx0).tok_emb
    expected = np.zeros((7, 64))
    np.add.at(expected, ids, dx0.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# Optimizer ------------------------------------------------------------------------------------------------------------

NS_SHAPES = [(64, 64), (40, 136), (136, 40), (1, 8), (8, 1), (512, 128), (256, 512), (130, 200), (330, 260), (390, 900)]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("coefficients", NEWTON_SCHULZ)
def test_newton_schulz_rounds_as_the_storage_does(coefficients: str, place: Place) -> None:
    """Beside the same iteration with the same rounding in PyTorch; and what it is for: singular values near 1."""
    rng = np.random.default_rng(17)
    for shape in NS_SHAPES:
        u = draw(rng, *shape).astype(np.float32)
        expected = emulated_newton_schulz(u, place, coefficients=NEWTON_SCHULZ[coefficients])
        with ops.on(place.device, place.dtype):
            found = ops.newton_schulz(u, coefficients=NEWTON_SCHULZ[coefficients])
        bound = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 2e-5}[place.dtype]
        assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected), shape
        values = np.linalg.svd(u, compute_uv=False)
        reached = np.linalg.svd(found.astype(np.float64), compute_uv=False)
        if values.min() >= 1e-2 * values.max():
            assert reached.min() >= 0.6 and reached.max() <= 1.3, shape


def emulated_newton_schulz(
    u: np.ndarray, place: Place, steps: int = 5, coefficients: Sequence[Sequence[float]] = trainer.KELLER_JORDAN
) -> np.ndarray:
    def stored(x: torch.Tensor) -> torch.Tensor:
        return x.to(place.torch_dtype).to(torch.float32)

    x = torch.tensor(u)
    x = x.T if x.shape[0] > x.shape[1] else x
    x = stored(x / (x.norm() + 1e-7))
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        gram = stored(x @ x.T)
        poly = stored(b * gram + c * (gram @ gram))
        x = stored(a * x + poly @ x)
    return (x.T if u.shape[0] > u.shape[1] else x).numpy()


@pytest.mark.parametrize("place", [place for place in PLACES if place.dtype != "float32"], ids=str)
@pytest.mark.parametrize("shape", [(8, 8), (100, 100), (129, 136), (136, 321), (264, 72), (392, 500), (650, 650)])
def test_one_newton_schulz_step_of_signs_in_every_element(shape: tuple[int, int], place: Place) -> None:
    """Of ±1 and 0 the Gram matrix is exact in any order, so that only sums of its square and of the result may differ.

    A number that is written to a wrong place is wrong by far more: rows differ in how many zeros they have.
    """
    rng = np.random.default_rng(23)
    zeros = rng.random(shape) < np.linspace(0.5, 0.95, shape[0])[:, None]
    u = np.where(zeros, 0.0, rng.choice([-1.0, 1.0], shape)).astype(np.float32)
    with ops.on(place.device, place.dtype):
        found = ops.newton_schulz(u, steps=1)
    expected = emulated_newton_schulz(u, place, steps=1)
    # Sums in another order fall on the other side of a tie now and then: a unit of the largest number at the most.
    assert np.abs(found - expected).max() <= 2 * place.ulp * np.abs(expected).max()
    assert np.linalg.norm(found - expected) <= place.ulp / 4 * np.linalg.norm(expected)


WHOLE_BATCHES = [p for p in PLACES if p.device == "cpu" or (p.dtype != "float32" and "path 90" in p.description)]
"""Where a matrix's update depends on no other one: cuBLASLt, which the other paths use, knows how many there are."""


@pytest.mark.parametrize("place", WHOLE_BATCHES, ids=str)
def test_muon_of_many_shapes_is_muon_of_each(place: Place) -> None:
    rng = np.random.default_rng(24)
    shapes = [(128 + 8 * i, 200 + 16 * i) for i in range(10)] * 2 + [(200, 128), (72, 8), (1, 7), (136, 216)]
    weights, gradients, momenta = ([draw(rng, *shape).astype(np.float32) for shape in shapes] for _ in range(3))
    with ops.on(place.device, place.dtype):
        together = ops.muon(weights, gradients, momenta, lr=0.02)
        for i, shape in enumerate(shapes):
            alone = ops.muon(*([arrays[i]] for arrays in (weights, gradients, momenta)), lr=0.02)
            assert all(same_bits(all_of[i], one[0]) for all_of, one in zip(together, alone, strict=True)), shape


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("rule", [{}, {"normalize_rows": True}], ids=["plain", "rows"])
def test_steps_of_muon_and_adam(rule: dict[str, Any], place: Place) -> None:
    """Three steps of each on several tensors; Adam is float32 everywhere, Muon's direction is that of the storage."""
    rng = np.random.default_rng(13)
    shapes = [(64, 64), (136, 40), (40, 136), (64, 64), (1, 7), (130, 2), (600, 24)]
    weights = [draw(rng, *shape).astype(np.float32) for shape in shapes]
    zeros = [np.zeros_like(w) for w in weights]
    muon, adam = [weights, zeros], [weights, zeros, zeros]
    expected_muon = [(torch.tensor(w).double(), torch.zeros(w.shape, dtype=torch.float64)) for w in weights]
    expected_adam = [(p.clone(), m.clone(), m.clone()) for p, m in expected_muon]
    for t in (1, 2, 3):
        gradients = [draw(rng, *shape).astype(np.float32) for shape in shapes]
        with ops.on(place.device, place.dtype):
            ways = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.04, "grad_scale": 0.5, **rule}
            muon = [*ops.muon(muon[0], gradients, muon[1], **ways)]
            adam = [*ops.adam(*[adam[0], gradients, *adam[1:]], step=t, lr=0.02, weight_decay=0.01, grad_scale=0.5)]
        for i, g in enumerate(gradients):
            half = torch.tensor(g).double() * 0.5
            trainer.muon_update(expected_muon[i][0], half, expected_muon[i][1], 0.02, 0.9, 0.04, 5, **rule)
            trainer.adamw_update(expected_adam[i][0], half, *expected_adam[i][1:], t, 0.02, (0.9, 0.95), 1e-8, 0.01)
    for i, shape in enumerate(shapes):
        for state in range(3):
            assert_near(adam[state][i], expected_adam[i][state].numpy(), 1e-5, shape)
        assert_near(muon[1][i], expected_muon[i][1].numpy(), 1e-5, shape)
        moved = expected_muon[i][0].numpy() - weights[i]
        bound = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-4}[place.dtype]
        assert_near(muon[0][i] - weights[i], moved, bound, shape)


def assert_near(found: np.ndarray, expected: np.ndarray, bound: float, what: object) -> None:
    assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected), what


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("bad", [None, np.nan, np.inf])
def test_norm_clip_and_what_is_not_finite(bad: float | None, place: Place) -> None:
    rng = np.random.default_rng(16)
    gradients = [draw(rng, *shape).astype(np.float32) for shape in ((300, 70), (5,), (1,), (2, 3, 4), (100_003,))]
    gradients += [draw(rng, 3).astype(np.float32) for _ in range(300)]
    if bad is not None:
        gradients[3][1, 2, 3] = bad
    with ops.on(place.device, place.dtype):
        norm = ops.grad_norm(gradients, 0.3)
        weights = [g + 1 for g in gradients[:2]]
        settings = {"lr": 0.1, "weight_decay": 0.1, "grad_scale": 0.5, "finite": norm.finite}
        adam = ops.adam(weights, gradients[:2], weights, weights, step=1, **settings)
        muon = ops.muon(weights[:1], gradients[:1], weights[:1], **settings)
    if bad is None:
        expected = math.sqrt(math.fsum(float(x) ** 2 for g in gradients for x in g.ravel()))
        assert norm.finite and norm.norm == pytest.approx(expected, rel=1e-13)
        assert norm.scale == pytest.approx(0.3 / (expected + 1e-6), rel=1e-13)
        assert not same_bits(adam[0][0], weights[0]) and not same_bits(muon[0][0], weights[0])
    else:
        assert not norm.finite
        assert all(same_bits(a, w) for state in adam for a, w in zip(state, weights, strict=True))
        assert all(same_bits(state[0], weights[0]) for state in muon)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("clip", [0, 1, 15, 31])
@pytest.mark.parametrize("cols", [1, 33, 128])
def test_working_copies_are_the_cpu_s_bits(clip: int, cols: int, place: Place) -> None:
    rng = np.random.default_rng(18)
    w = (draw(rng, 70, cols) * np.exp(draw(rng, 70, 1) * 5)).astype(np.float32)
    w[0] = 0.0
    w[1] = clip + 0.5  # ties
    w[2] = 1 + (np.arange(cols) + 0.5) * 2.0**-7  # between neighbours in bfloat16, and in float16
    w[3] = 1 + (np.arange(cols) + 0.5) * 2.0**-10
    scale = draw(rng, 70).astype(np.float32)
    for vector in (None, scale):
        plain = ops.working_copy(w, vector, clip=clip)
        with ops.on(place.device, place.dtype):
            found = ops.working_copy(w, vector, clip=clip)
        assert same_bits(found, place.round(plain).astype(np.float32))


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("clip", [0, 15])
def test_ends_of_projection_gradients(clip: int, place: Place) -> None:
    rng = np.random.default_rng(19)
    w, dw, scale, dscale = (draw(rng, *s).astype(np.float32) for s in ((70, 129), (70, 129), (70,), (70,)))
    expected = ops.finish_projection(*(a.astype(np.float64) for a in (w, scale, dw, dscale)), clip=clip, factor=4.0)
    with ops.on(place.device, place.dtype):
        found = ops.finish_projection(w, scale, dw, dscale, clip=clip, factor=4.0)
    for a, b in zip(found, expected, strict=True):
        assert_near(a, b, 1e-5, clip)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_sums_and_averages(place: Place) -> None:
    rng = np.random.default_rng(20)
    x, y = (draw(rng, 100_003).astype(np.float32) for _ in range(2))
    with ops.on(place.device, place.dtype):
        assert ops.sum(x) == pytest.approx(math.fsum(x.tolist()), rel=1e-10)
        assert_near(ops.axpby(0.3, x, 0.7, y), 0.3 * x.astype(np.float64) + 0.7 * y, 1e-7, "axpby")
        assert same_bits(ops.axpby(1.0, x, 0.0, y), x)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("clip", "bits"), [(15, 5), (31, 6), (127, 8)])
def test_quantised_rows_are_the_artifact_s_bits(clip: int, bits: int, place: Place) -> None:
    rng = np.random.default_rng(21)
    w = (draw(rng, 300, 130) * np.exp(draw(rng, 300, 1) * 3)).astype(np.float32)
    w[0], w[1], w[2] = 0.0, 1e-9, np.arange(130) + 0.5
    expected = quantize_rows(w, bits=bits, clip=clip)
    with ops.on(place.device, place.dtype):
        q, scale = ops.quantize_rows(w, clip)
        back = ops.dequantize_rows(q, scale)
    assert same_bits(q, expected[0]) and same_bits(scale.view(np.uint16), np.asarray(expected[1]).view(np.uint16))
    assert same_bits(back, q.astype(np.float32) * scale.astype(np.float32)[:, None])


# Adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("rows", "size", "products"), [(1, 7, 1), (5, 301, 2), (64, 4099, 2)])
def test_adapters_begin_with_the_reference_s_numbers(rows: int, size: int, products: int, place: Place) -> None:
    rng = np.random.default_rng(22)
    w, m, v = (draw(rng, rows, size).astype(np.float32) for _ in range(3))
    a_size = size // (products + 1)
    documents = rng.permutation(rows) * 1_000_003
    documents[1::3] = -1
    names = ["blocks.3.attn.c_q.lora_a", "blocks.3.attn.c_v.lora_a"][:products]
    with ops.on(place.device, place.dtype):
        found = ops.adapters_begin(w, m, v, documents, names=names, a_size=a_size, bound=0.125, seed=2**63 + 1)
    for row, document in enumerate(documents):
        if document < 0:
            assert all(same_bits(a[row], b[row]) for a, b in zip(found, (w, m, v), strict=False))
            continue
        drawn = [uniform(2**63 + 1, name, (a_size,), 0.125, int(document)) for name in names]
        expected = np.concatenate([*drawn, np.zeros(size - products * a_size, np.float32)])
        assert same_bits(found.w[row], expected)
        assert same_bits(found.copy[row], place.round(expected).astype(np.float32))
        assert not found.m[row].any() and not found.v[row].any()


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 7), (5, 301), (64, 4099)])
def test_adapters_step_row_by_row(rows: int, size: int, place: Place) -> None:
    """Each row has its own step; a row of step 0 keeps every bit. Gradients of 0 change nothing."""
    rng = np.random.default_rng(23)
    w, grad, m, v = (draw(rng, rows, size).astype(np.float32) for _ in range(4))
    v = np.abs(v)
    grad[:, 2], m[:, 2], v[:, 2] = 0, 0, 0
    steps = rng.integers(0, 40, rows)
    steps[0] = 3
    with ops.on(place.device, place.dtype):
        found = ops.adapters_step(w, grad, m, v, steps, lr=0.01, grad_scale=0.5)
    for row, t in enumerate(steps):
        if t == 0:
            assert all(same_bits(a[row], b[row]) for a, b in zip(found, (w, m, v), strict=False))
            continue
        p, first, second, half = (torch.tensor(a[row]).double() for a in (w, m, v, grad))
        trainer.adamw_update(p, half * 0.5, first, second, int(t), 0.01, (0.9, 0.95), 1e-10, 0.0)
        for a, b in zip(found, (p, first, second), strict=False):
            assert_near(a[row], b.numpy(), 1e-6, row)
        assert found.w[row, 2] == w[row, 2]
        assert same_bits(found.copy[row], place.round(found.w[row]).astype(np.float32))
