"""The single operations of the native backend on NumPy arrays: docs/spec.md §2 and §3, cut as the model runs them.

A forward operation returns its result and a `Saved`, which its backward takes together with the gradient at the
result. A backward returns one gradient for each field of its named tuple, each called after the tensor it belongs to,
None where that tensor is absent. Those that are sums over a step's micro-batches are added to what `add_to` holds under
their names (0 where it holds nothing); the sum is returned.

>>> o, saved = ops.attention(q, k, v, gain)
>>> dq, dk, dv, dgain = ops.attention_backward(saved, do)

Symbols: B sequences of T tokens; V vocabulary, d model width, H query heads, K key/value heads, D head width,
F hidden width, n buckets and e width of the bigram table; weights are [out, in].

Arrays: float32 or float64, all of one call alike, of any layout; anything that speaks DLPack will do. Token ids are
integers of any width. Nothing that is passed in changes; everything returned is new, but a `Saved` refers to its
forward's arguments, which must not be changed before the backward.

Raises, all functions: ValueError for a shape, id or number that does not fit, TypeError for a dtype; each names the
argument, what was found and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pgolf.common.checks import checked_integer
from pgolf.model import FloatArray, as_array, polynomials
from pgolf.ops.calls import Arrays, Backward, forward, operations_for
from pgolf.ops.calls import MixedInput as MixedInput
from pgolf.ops.calls import Saved as Saved
from pgolf.ops.calls import on as on
from pgolf.ops.calls import timed as timed

GROUPS = ("matrix", "embedding", "scalar", "head")
"""The optimizer groups of docs/spec.md §1."""


class EmbedGrads(NamedTuple):
    """Each is added to."""

    tok_emb: FloatArray
    smear_gate: FloatArray
    bigram_emb: FloatArray | None
    bigram_proj: FloatArray | None
    bigram_scale: FloatArray | None


class QkvGrads(NamedTuple):
    """All but x, skip and adapters are added to."""

    x: FloatArray | None
    x0: FloatArray | None
    skip: FloatArray | None
    resid_mix: FloatArray | None
    skip_weight: FloatArray | None
    wq: FloatArray | None
    wk: FloatArray | None
    wv: FloatArray | None
    adapters: FloatArray | None


class AttentionGrads(NamedTuple):
    """The gain's is added to."""

    q: FloatArray
    k: FloatArray
    v: FloatArray
    gain: FloatArray | None


class AttentionSublayerGrads(NamedTuple):
    """All but x, skip and adapters are added to; wo's is without the projection's scale until `finish_projection`."""

    x: FloatArray | None
    x0: FloatArray | None
    skip: FloatArray | None
    resid_mix: FloatArray | None
    skip_weight: FloatArray | None
    wq: FloatArray | None
    wk: FloatArray | None
    wv: FloatArray | None
    gain: FloatArray | None
    wo: FloatArray | None
    adapters: FloatArray | None


class MlpSublayerGrads(NamedTuple):
    """All but x are added to; down's is without the projection's scale and factor until `finish_projection`."""

    x: FloatArray
    up: FloatArray | None
    down: FloatArray | None


class ProjectResidualGrads(NamedTuple):
    """w's is added to, and is doutᵀ·a without the projection's scale until `finish_projection`.

    a's may be the gradient before ReLU²: see `project_residual_backward`.
    """

    a: FloatArray
    w: FloatArray | None


class ProjectionGrads(NamedTuple):
    """Final gradients of a projection."""

    w: FloatArray
    scale: FloatArray


class MlpUpGrads(NamedTuple):
    """Each is added to."""

    x: FloatArray
    w: FloatArray | None


class HeadGrads(NamedTuple):
    """w's is added to."""

    x: FloatArray
    w: FloatArray | None
    adapters: FloatArray | None


class AdapterNumbers(NamedTuple):
    """Each [B, size]; copy is w in the storage dtype, as far as rows changed."""

    w: FloatArray
    m: FloatArray
    v: FloatArray
    copy: FloatArray


class GradNorm(NamedTuple):
    """What clipping decides for a step."""

    norm: float
    scale: float
    """The factor for all gradients, min(1, clip/(norm + 1e−6)); 1 without a clip."""
    finite: bool


# Embedding ------------------------------------------------------------------------------------------------------------


def embed(
    ids: Any,
    tok_emb: Any,
    smear_gate: Any,
    bigram_emb: Any = None,
    bigram_proj: Any = None,
    bigram_scale: Any = None,
    *,
    reset_at_bos: bool = False,
    bos_id: int = 1,
) -> tuple[FloatArray, Saved]:
    """`x0 = smear(rms(tok_emb[ids] + bigram_scale · bigram_proj · bigram_emb[hash]))` (docs/spec.md §2.1–2.2).

    The smear gate: `y[t] = (1−g)·x[t] + g·x[t−1]`, g = sigmoid(smear_gate), x[−1] = 0.

    Args:
        ids: [B, T] token ids, 0 … V−1.
        tok_emb: [V, d].
        smear_gate: [d].
        bigram_emb: [n, e], n ≥ 2; None: no bigram term.
        bigram_proj: [d, e]; None where e = d: the identity.
        bigram_scale: a scalar, with bigram_emb.
        reset_at_bos: at `bos_id` the embedding before counts as 0.

    Returns:
        x0 [B, T, d], and what `embed_backward` needs.
    """
    call = Arrays()
    call.add("tok_emb", tok_emb, "V", "d")
    call.add("smear_gate", smear_gate, "d")
    if (bigram_emb is None) != (bigram_scale is None) or (bigram_emb is None and bigram_proj is not None):
        raise ValueError("The bigram term is incomplete; expected bigram_emb and bigram_scale, or no bigram_* at all.")
    if bigram_emb is not None:
        call.add("bigram_emb", bigram_emb, "n", "d" if bigram_proj is None else "e")
        if call.sizes["n"] < 2:
            raise ValueError("bigram_emb has 1 bucket; expected at least 2.")
        if bigram_proj is not None:
            call.add("bigram_proj", bigram_proj, "d", "e")
        call.add("bigram_scale", bigram_scale)
    call.add_tokens("ids", ids)
    numbers = {"reset_at_bos": bool(reset_at_bos), "bos_id": checked_integer(bos_id, "bos_id", -(2**31), 2**31 - 1)}
    saved = forward("embed", call, {"x0": ("B", "T", "d")}, **numbers)
    return saved.tensors["x0"], saved


def embed_backward(saved: Saved, dx0: Any, *, add_to: Mapping[str, Any] | None = None) -> EmbedGrads:
    """The gradients of `embed` from dx0 [B, T, d]; `add_to` may hold any field."""
    call = Backward("embed", saved)
    call.upstream(dx0=dx0)
    call.added(add_to, *EmbedGrads._fields)
    return EmbedGrads(*call.run(*EmbedGrads._fields))


# Attention ------------------------------------------------------------------------------------------------------------


def qkv(
    mixed: MixedInput,
    wq: Any,
    wk: Any,
    wv: Any,
    cos: Any,
    sin: Any,
    *,
    first: int = 0,
    adapters: Any = None,
    norm_scale: float = 1.0,
    rope_dims: int | None = None,
) -> tuple[tuple[FloatArray, FloatArray, FloatArray], Saved]:
    """`n = norm_scale·rms(m)`; per head `q = rope(rms(n·wqᵀ))`, `k = rope(rms(n·wkᵀ))`, `v = n·wvᵀ`.

    docs/spec.md §2.4–2.5.

    RoPE turns the pair (j, j + R/2), R = rope_dims: (a, b) → (a·cos + b·sin, −a·sin + b·cos). The query gain is
    `attention`'s.

    Args:
        mixed: the parts of m [B, T, d].
        wq: [H·D, d].
        wk, wv: [K·D, d].
        cos, sin: [rows, D/2], at least T rows; row t is for position t of every sequence. Columns from R/2 on are 1 in
            cos and 0 in sin.
        first: 0 … T−1; only positions from there on get queries. `qkv_backward` needs those of all.
        adapters: [B, r·(2d + H·D + K·D)], low-rank changes of q's and v's products (docs/spec.md §5), with first = 0:
            row b holds sequence b's a's, [r, d] of q and of v, then their b's, [H·D, r] and [K·D, r]; each product
            gains (n·aᵀ)·bᵀ. None: none.
        norm_scale: above 0.
        rope_dims: R, even and at most D; None: D. A GPU takes D, or a multiple of 16 that is at most D/2.

    Returns:
        q [B, T − first, H, D], k and v [B, T, K, D]; and what `qkv_backward` needs.
    """
    call = Arrays()
    _add_heads(call, mixed, wq, wk, wv, cos, sin, first, adapters)
    outputs = {"q": ("B", "T'", "H", "D"), "k": ("B", "T", "K", "D"), "v": ("B", "T", "K", "D")}
    numbers = {"norm_scale": _norm_scale(norm_scale), "rope_dims": _rope_dims(call, rope_dims)}
    saved = forward("qkv", call, outputs, **numbers)
    return (saved.tensors["q"], saved.tensors["k"], saved.tensors["v"]), saved


def _rope_dims(call: Arrays, dims: int | None) -> int:
    width = call.sizes["D"]
    turned = width if dims is None else checked_integer(dims, "rope_dims", 2, width)
    if turned % 2:
        raise ValueError(f"rope_dims is {turned}; expected an even number.")
    idle = call.arrays["cos"][:, turned // 2 :], call.arrays["sin"][:, turned // 2 :]
    if (idle[0] != 1).any() or idle[1].any():
        raise ValueError(f"rope_dims is {turned}; expected columns of 1 in cos and of 0 in sin from {turned // 2} on.")
    return turned


def _norm_scale(value: float) -> float:
    if not 0 < value < float("inf"):
        raise ValueError(f"norm_scale is {value}; expected a number above 0.")
    return float(value)


def _add_heads(
    call: Arrays, mixed: MixedInput, wq: Any, wk: Any, wv: Any, cos: Any, sin: Any, first: int, adapters: Any
) -> None:
    call.add_mixed(mixed)
    call.add("cos", cos, "rows", "D/2")
    call.add("sin", sin, "rows", "D/2")
    sizes = call.sizes
    if sizes["rows"] < sizes["T"]:
        raise ValueError(f"cos and sin have {sizes['rows']} rows; expected one for each of {sizes['T']} positions.")
    sizes["D"] = 2 * sizes["D/2"]
    for name, value, rows, heads in (("wq", wq, "H·D", "H"), ("wk", wk, "K·D", "K"), ("wv", wv, "K·D", "K")):
        call.add(name, value, rows, "d")
        sizes[heads], rest = divmod(sizes[rows], sizes["D"])
        if rest:
            raise ValueError(f"{name} has {sizes[rows]} rows; expected a multiple of the head width {sizes['D']}.")
    sizes["T'"] = sizes["T"] - checked_integer(first, "first", 0, sizes["T"] - 1 if adapters is None else 0)
    call.add_adapters(adapters, 2 * sizes["d"] + sizes["H·D"] + sizes["K·D"])


def qkv_backward(
    saved: Saved,
    dq: Any,
    dk: Any,
    dv: Any,
    *,
    at_products: bool = False,
    dm: Any = None,
    pending: Any = None,
    weights: bool = True,
    inputs: bool = True,
    add_to: Mapping[str, Any] | None = None,
) -> QkvGrads:
    """The gradients of `qkv` from those at its results.

    Args:
        dq, dk, dv: shaped as q, k and v.
        at_products: True: they are at the products n·wqᵀ, n·wkᵀ, n·wvᵀ, as `attention_backward` gives them that is told
            of this call.
        dm: [B, T, d], the gradient at m from its other reader, the residual path; None: 0.
        pending: [B, T, d], added to x's gradient (what later blocks sent back through a skip); None: 0.
        weights: False: x0, the vectors and the matrices have no gradients.
        inputs: False: nor have x and skip.
        add_to: may hold any field but x, skip and adapters.

    Returns:
        The gradients of both readers together. Where skip is x itself, its share stands apart, in the field skip.
    """
    call = Backward("qkv", saved)
    call.needs_all("q", "x")
    heads = [call.like(name, "d" + name, value) for name, value in (("q", dq), ("k", dk), ("v", dv))]
    call.inputs["dqkv"] = np.concatenate(heads, axis=2)
    if not at_products:
        call.operation = "heads"  # norm and RoPE, too
    if pending is not None:
        call.inputs["pending"] = call.like("x", "pending", pending)
    if inputs:
        call.outputs["dx"] = call.start("x", "dm", dm)
        call.written("skip")
    call.written("adapters")
    call.added(add_to, *(("x0", "resid_mix", "skip_weight", "wq", "wk", "wv") if weights and inputs else ()))
    return QkvGrads(*call.run(*QkvGrads._fields))


def attention(q: Any, k: Any, v: Any, gain: Any, *, normed: bool = False) -> tuple[FloatArray, Saved]:
    """`o = softmax(gain[h]·q·kᵀ/√D over keys ≤ t)·v` (docs/spec.md §2.5).

    Args:
        q: [B, T', H, D], the queries of the last T' ≤ T positions; `attention_backward` needs those of all.
        k, v: [B, T, K, D], H a multiple of K; query head h reads head ⌊h·K/H⌋.
        gain: [H].
        normed: True says that no head of q or k has a mean square above 1, but for rounding, as those of `qkv` have
            not. Scores then have a bound, of which a GPU makes use; with other arrays its softmax may overflow.

    Returns:
        o [B, T', H, D], and what `attention_backward` needs.
    """
    call = Arrays()
    call.add("q", q, "B", "T'", "H", "D")
    call.add("k", k, "B", "T", "K", "D")
    call.add("v", v, "B", "T", "K", "D")
    call.at_most("q", "T'", "T")
    call.add("gain", gain, "H")
    if call.sizes["H"] % call.sizes["K"]:
        raise ValueError(f"q has {call.sizes['H']} heads; expected a multiple of k's {call.sizes['K']}.")
    saved = forward("attention", call, {"o": ("B", "T'", "H", "D")}, normed=bool(normed))
    return saved.tensors["o"], saved


def attention_backward(
    saved: Saved,
    do: Any,
    *,
    qkv: Saved | None = None,
    weights: bool = True,
    add_to: Mapping[str, Any] | None = None,
) -> AttentionGrads:
    """The gradients of `attention` from do [B, T, H, D].

    Args:
        qkv: what `ops.qkv` returned beside the q, k and v of this call. With it the gradients in the fields q, k, v are
            those at its products, before norm and RoPE, for `qkv_backward` with at_products: a training step's way.
        weights: False: gain has no gradient.
        add_to: may hold gain.
    """
    call = Backward("attention", saved)
    numbers: dict[str, int] = {}
    call.needs_all("q", "k")
    call.upstream(do=do)
    if qkv is not None:
        made = Backward("qkv", qkv, "qkv").inputs
        if qkv.dtype != saved.dtype:
            raise TypeError(f"qkv comes from a call on {qkv.dtype}; expected {saved.dtype}, the dtype of saved.")
        for name in ("q", "k", "v"):
            if not np.array_equal(made[name], saved.tensors[name], equal_nan=True):
                raise ValueError(f"qkv comes from a call that made another {name} than this attention read.")
        call.inputs |= {"cos": made["cos"], "sin": made["sin"], "qkv_saved": made["saved"]}
        numbers["rope_dims"] = qkv.numbers["rope_dims"]
    (B, T, H, D), K = saved.tensors["q"].shape, saved.tensors["k"].shape[2]
    dqkv = call.outputs["dqkv"] = np.full((B, T, H + 2 * K, D), np.nan, saved.dtype)
    call.added(add_to, *(("gain",) if weights else ()))
    (gain,) = call.run("gain", **numbers)
    q, k, v = (part.copy() for part in np.split(dqkv, (H, H + K), axis=2))
    return AttentionGrads(q, k, v, gain)


# Residual stream and MLP ----------------------------------------------------------------------------------------------


def project_residual(residual: Any, a: Any, w: Any) -> tuple[FloatArray, Saved]:
    """`out = residual + a·wᵀ`: the last step of attention and MLP (docs/spec.md §2.4).

    Args:
        residual: a `MixedInput` [B, T, d], of whose positions the last T' ≤ T are computed anew; or an array
            [B, T', d].
        a: [B, T', c].
        w: [d, c], the projection's scale included: `working_copy(w, scale)`.

    Returns:
        out [B, T', d], and what `project_residual_backward` needs.
    """
    call = Arrays()
    if isinstance(residual, MixedInput):
        call.add_mixed(residual)
    else:
        call.add("x", residual, "B", "T'", "d")
    call.add("a", a, "B", "T'", "c")
    call.add("w", w, "d", "c")
    if isinstance(residual, MixedInput):
        call.at_most("a", "T'", "T")
    saved = forward("project_residual", call, {"out": ("B", "T'", "d")})
    return saved.tensors["out"], saved


def project_residual_backward(
    saved: Saved,
    dout: Any,
    *,
    h_scale: float = 0.0,
    negative_slope: float = 0.0,
    negative: Any = None,
    weights: bool = True,
    add_to: Mapping[str, Any] | None = None,
) -> ProjectResidualGrads:
    """The gradients of `project_residual` from dout [B, T, d], which is at once the residual's.

    Args:
        h_scale: where a is the h that `mlp_up` made with this h_scale, a's gradient is to be the one that
            `mlp_up_backward` takes: at u, before the activation. 0: at a.
        negative_slope: `mlp_up`'s, beside its h_scale.
        negative: with a slope, [⌈B·T·c/8⌉] uint8, whose bit i % 8 of byte i / 8 is set where the i-th number of u is
            below 0: `mlp_up` left it in its `Saved`, and numpy.packbits(u < 0, bitorder="little") makes it.
        weights: False: w has no gradient.
        add_to: may hold w.
    """
    if not 0 <= h_scale < float("inf"):
        raise ValueError(f"h_scale is {h_scale}; expected mlp_up's, or 0 for the gradient at a itself.")
    call = Backward("project_residual", saved)
    slope = _negative_slope(negative_slope)
    if slope:
        size, signs = saved.tensors["a"].size, np.asarray(negative)
        if h_scale == 0 or signs.dtype != np.uint8 or signs.shape != (-(-size // 8),):
            raise ValueError(
                f"negative_slope is {slope}; expected h_scale above 0 and {-(-size // 8)} bytes of signs in negative."
            )
        call.inputs["negative"] = np.ascontiguousarray(signs)
    call.upstream(dout=dout)
    call.written("a")
    call.added(add_to, *(("w",) if weights else ()))
    numbers = {"h_scale": float(h_scale), "negative_slope": slope}
    return ProjectResidualGrads(*call.run(*ProjectResidualGrads._fields, **numbers))


def _negative_slope(value: float) -> float:
    if not 0 <= value < float("inf"):
        raise ValueError(f"negative_slope is {value}; expected a number from 0 on (0: ReLU²).")
    return float(value)


def finish_projection(
    w: Any, scale: Any, dw: Any, dscale: Any = None, *, clip: int = 0, factor: float = 1.0
) -> ProjectionGrads:
    """Ends the gradients that `project_residual_backward` gathered over a step.

    The gradient of scale needs no product a·wᵀ: Σₜ dout[t, i]·(a·wᵀ)[t, i] = w[i]·(doutᵀ·a)[i].

    Args:
        w: [d, c].
        scale: [d].
        dw: [d, c], doutᵀ·a.
        dscale: [d], added to; None: 0.
        clip, factor: as `working_copy`.

    Returns:
        factor·scale⊙dw by rows, and dscale + the sums of factor·Q(w)⊙dw by rows.
    """
    call = Arrays()
    call.add("w", w, "d", "c")
    call.add("scale", scale, "d")
    results = Arrays(call.dtype, call.sizes)
    results.add("dw", dw, "d", "c", copy=True)
    results.add("dscale", np.zeros_like(call.arrays["scale"]) if dscale is None else dscale, "d", copy=True)
    call.native().finish_projection(call.arrays, results.arrays, checked_integer(clip, "clip", 0, 127), float(factor))
    return ProjectionGrads(results.arrays["dw"], results.arrays["dscale"])


def mlp_up(
    x: Any, w: Any, *, h_scale: float = 1.0, negative_slope: float = 0.0, norm_scale: float = 1.0
) -> tuple[FloatArray, Saved]:
    """`h = h_scale·f(u)` with `u = norm_scale·rms(x)·wᵀ` and f(u) = u² for u > 0, else (negative_slope·u)².

    docs/spec.md §2.6.

    Args:
        x: [B, T, d].
        w: [F, d].
        h_scale: a power of two; below 1 it keeps squares within fp16.
        negative_slope: 0 or more; 0 is ReLU².
        norm_scale: above 0.

    Returns:
        h [B, T, F], and what `mlp_up_backward` needs.
    """
    call = Arrays()
    call.add("x", x, "B", "T", "d")
    call.add("w", w, "F", "d")
    slope, size = _negative_slope(negative_slope), math.prod(call.sizes[side] for side in "BTF")
    signs = {"negative": np.zeros(-(-size // 8), np.uint8)} if slope else None
    numbers = {"h_scale": float(h_scale), "negative_slope": slope, "norm_scale": _norm_scale(norm_scale)}
    saved = forward("mlp_up", call, {"h": ("B", "T", "F")}, signs, **numbers)
    return saved.tensors["h"], saved


def mlp_up_backward(
    saved: Saved, du: Any, *, weights: bool = True, add_to: Mapping[str, Any] | None = None
) -> MlpUpGrads:
    """The gradients of `mlp_up` from du [B, T, F], the gradient at u: `project_residual_backward` makes it of h's.

    w's only with `weights`; `add_to` may hold any field.
    """
    call = Backward("mlp_up", saved)
    call.inputs["du"] = call.like("h", "du", du)
    call.added(add_to, *(MlpUpGrads._fields if weights else ("x",)))
    return MlpUpGrads(*call.run(*MlpUpGrads._fields))


# Whole sublayers ------------------------------------------------------------------------------------------------------


def attention_sublayer(
    mixed: MixedInput,
    wq: Any,
    wk: Any,
    wv: Any,
    gain: Any,
    wo: Any,
    cos: Any,
    sin: Any,
    *,
    first: int = 0,
    adapters: Any = None,
    norm_scale: float = 1.0,
    rope_dims: int | None = None,
) -> tuple[FloatArray, Saved]:
    """`out = m + attention(norm_scale·rms(m))·woᵀ`: `qkv`, `attention` and `project_residual`, as a model runs them.

    Args:
        mixed, wq, wk, wv, cos, sin, first, adapters, norm_scale, rope_dims: as `qkv`.
        gain: [H].
        wo: [d, H·D], the projection's scale included: `working_copy(wo, scale)`.

    Returns:
        out [B, T − first, d], and what `attention_sublayer_backward` needs, with first = 0.
    """
    call = Arrays()
    _add_heads(call, mixed, wq, wk, wv, cos, sin, first, adapters)
    call.add("gain", gain, "H")
    call.add("wo", wo, "d", "H·D")
    if call.sizes["H"] % call.sizes["K"]:
        raise ValueError(f"wq has {call.sizes['H']} heads; expected a multiple of wk's {call.sizes['K']}.")
    numbers = {"norm_scale": _norm_scale(norm_scale), "rope_dims": _rope_dims(call, rope_dims)}
    numbers |= {"position": 0, "backward": first == 0}
    saved = forward("attention_sublayer", call, {"out": ("B", "T'", "d")}, **numbers)
    return saved.tensors["out"], saved


def attention_sublayer_backward(
    saved: Saved,
    dout: Any,
    *,
    pending: Any = None,
    weights: bool = True,
    inputs: bool = True,
    add_to: Mapping[str, Any] | None = None,
) -> AttentionSublayerGrads:
    """The gradients of `attention_sublayer` from dout [B, T, d].

    Args:
        pending: [B, T, d], added to x's gradient (what later blocks sent back through a skip); None: 0.
        weights: False: x0, the vectors and the matrices have no gradients.
        inputs: False: nor have x and skip.
        add_to: may hold any field but x, skip and adapters.

    Returns:
        The gradients; where skip is x itself, its share stands apart, in the field skip.
    """
    call = Backward("attention_sublayer", saved)
    call.needs_all("out", "x")
    (call.outputs if inputs else call.inputs)["dx"] = call.like("out", "dout", dout)
    if pending is not None:
        call.inputs["pending"] = call.like("x", "pending", pending)
    if inputs:
        call.written("skip")
    call.written("adapters")
    vectors = ("x0", "resid_mix", "skip_weight", "wq", "wk", "wv", "gain", "wo")
    call.added(add_to, *(vectors if weights and inputs else ()))
    return AttentionSublayerGrads(*call.run(*AttentionSublayerGrads._fields, inputs=inputs))


def mlp_down_factor() -> float:
    """The `factor` of the working copy of an MLP's down projection: hidden values are kept divided by it."""
    return float(operations_for(np.dtype(np.float32)).mlp_down_factor())


def mlp_sublayer(
    x: Any, up: Any, down: Any, *, negative_slope: float = 0.0, norm_scale: float = 1.0
) -> tuple[FloatArray, Saved]:
    """`out = x + f(norm_scale·rms(x)·upᵀ)·downᵀ`: `mlp_up` and `project_residual`, as a model runs them.

    Args:
        x: [B, T, d].
        negative_slope, norm_scale: as `mlp_up`.
        up: [F, d].
        down: [d, F], the projection's scale included: `working_copy(down, scale, factor=mlp_down_factor())`.

    Returns:
        out [B, T, d], and what `mlp_sublayer_backward` needs.
    """
    call = Arrays()
    call.add("x", x, "B", "T", "d")
    call.add("up", up, "F", "d")
    call.add("down", down, "d", "F")
    numbers = {"negative_slope": _negative_slope(negative_slope), "norm_scale": _norm_scale(norm_scale)}
    saved = forward("mlp_sublayer", call, {"out": ("B", "T", "d")}, backward=True, **numbers)
    return saved.tensors["out"], saved


def mlp_sublayer_backward(
    saved: Saved, dout: Any, *, weights: bool = True, add_to: Mapping[str, Any] | None = None
) -> MlpSublayerGrads:
    """The gradients of `mlp_sublayer` from dout [B, T, d]; up's and down's only with `weights`, and added to."""
    call = Backward("mlp_sublayer", saved)
    call.outputs["dx"] = call.like("out", "dout", dout)
    call.added(add_to, *(("up", "down") if weights else ()))
    return MlpSublayerGrads(*call.run(*MlpSublayerGrads._fields))


# Head -----------------------------------------------------------------------------------------------------------------


def head_logits(x: Any, w: Any, *, softcap: float = 30.0, first: int = 0, adapters: Any = None) -> FloatArray:
    """`logits = c·tanh(rms(x)·wᵀ/c)` of the positions first … T−1 (docs/spec.md §2.7).

    Args:
        x: [B, T, d].
        w: [V, d].
        softcap: c > 0.
        first: 0 … T−1.
        adapters: [B, r·(d + V)], as those of `qkv`, of the product rms(x)·wᵀ: a [r, d], then b [V, r].

    Returns:
        [B, T − first, V].
    """
    call = Arrays()
    numbers = call.add_head(x, w, softcap, first, adapters)
    return forward("head_logits", call, {"logits": ("B", "T'", "V")}, **numbers).tensors["logits"]


def head_loss(
    x: Any, w: Any, targets: Any, *, softcap: float = 30.0, first: int = 0, adapters: Any = None
) -> FloatArray:
    """`loss[t] = logsumexp(logits[t]) − logits[t][targets[t]]` in nats, of the positions first … T−1.

    Args:
        x, w, softcap, first, adapters: as `head_logits`.
        targets: [B, T] token ids, 0 … V−1.

    Returns:
        [B, T − first].
    """
    call = Arrays()
    numbers = call.add_head(x, w, softcap, first, adapters)
    call.add_tokens("targets", targets)
    return forward("head_loss", call, {"losses": ("B", "T'")}, **numbers).tensors["losses"]


def head_loss_backward(
    x: Any,
    w: Any,
    targets: Any,
    *,
    softcap: float = 30.0,
    first: int = 0,
    adapters: Any = None,
    loss_scale: float = 1.0,
    loss_weights: Any = None,
    weights: bool = True,
    add_to: Mapping[str, Any] | None = None,
) -> tuple[FloatArray, HeadGrads]:
    """Forward and backward of `head_loss` in one pass over the logits.

    Args:
        x, w, targets, softcap, first, adapters: as `head_loss`.
        loss_scale: the gradients are those of loss_scale·Σ losses, …
        loss_weights: … each times its number of these, [B, T − first]; None: 1.
        weights: False: w has no gradient.
        add_to: may hold w.

    Returns:
        The losses [B, T − first], and the gradients; x's is 0 before first.
    """
    arrays = Arrays()
    numbers = arrays.add_head(x, w, softcap, first, adapters)
    arrays.add_tokens("targets", targets)
    if loss_weights is not None:
        arrays.add("weights", loss_weights, "B", "T'")
    numbers["loss_scale"] = float(loss_scale)
    call = Backward("head_loss", Saved("head_loss", arrays.dtype, arrays.arrays, numbers))
    call.outputs["losses"] = arrays.empty("B", "T'")
    call.written("x", "adapters")
    call.added(add_to, *(("w",) if weights else ()))
    return call.outputs["losses"], HeadGrads(*call.run(*HeadGrads._fields))


# Optimizer ------------------------------------------------------------------------------------------------------------


def grad_norm(grads: Sequence[Any], clip: float = 0.0) -> GradNorm:
    """The L2 norm of all gradients together, summed in float64, and what follows from it (docs/spec.md §3).

    Args:
        grads: arrays of any shapes.
        clip: the largest norm that is left as it is; 0: any.
    """
    call = Arrays()
    arrays = call.add_list("grads", grads)
    return GradNorm(*call.native().grad_norm(arrays, clip=float(clip)))


def adam(
    weights: Sequence[Any],
    grads: Sequence[Any],
    m: Sequence[Any],
    v: Sequence[Any],
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    finite: bool = True,
    group: str = "scalar",
) -> tuple[list[FloatArray], list[FloatArray], list[FloatArray]]:
    """A step of AdamW on several tensors (docs/spec.md §3).

    m ← β₁·m + (1−β₁)·g; v ← β₂·v + (1−β₂)·g²; w ← w·(1 − lr·decay) − lr·(m/(1−β₁ᵗ)) / (√v/√(1−β₂ᵗ) + eps), with
    g = grad_scale·grad and t = step.

    Args:
        weights, grads, m, v: as many arrays each, shaped alike.
        step: t, from 1.
        finite: False: nothing changes (see `GradNorm`).
        group: which of `GROUPS` the backend takes rate and decay from; the result does not depend on it.

    Returns:
        The new weights, m and v.
    """
    if group not in GROUPS:
        raise ValueError(f"group is {group!r}; expected one of {', '.join(GROUPS)}.")
    t = checked_integer(step, "step", 1, 2**53)
    call = Arrays()
    new_weights = call.add_list("weights", weights, copy=True)
    gradients = call.add_list("grads", grads, like=new_weights)
    new_m = call.add_list("m", m, like=new_weights, copy=True)
    new_v = call.add_list("v", v, like=new_weights, copy=True)
    call.native().adam(
        new_weights,
        gradients,
        new_m,
        new_v,
        group=GROUPS.index(group),
        lr=float(lr),
        weight_decay=float(weight_decay),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(eps),
        bias1=1.0 - beta1**t,
        bias2=1.0 - beta2**t,
        grad_scale=float(grad_scale),
        finite=bool(finite),
    )
    return new_weights, new_m, new_v


def adapters_begin(
    w: Any, m: Any, v: Any, documents: Any, *, names: Sequence[str], a_size: int, bound: float, seed: int
) -> AdapterNumbers:
    """Adapters of new documents (docs/spec.md §5): each a uniform in ±bound, b, m and v 0.

    Args:
        w, m, v: [B, size]; a row begins with one a of a_size numbers for each of the 1 or 2 names.
        documents: [B] integers below 2³¹, whose rows start anew; −1: the row stays as it is.
        names, seed: with the document and the element they decide a number of a, as docs/spec.md §1 says.

    Returns:
        New arrays.
    """
    count = checked_integer(a_size, "a_size", 1, 2**31)
    if not 1 <= len(names) <= 2:
        raise ValueError(f"names holds {len(names)} names; expected 1 or 2.")
    return _adapters(
        {"w": w, "m": m, "v": v},
        ("documents", documents, -1),
        lambda native, inputs, outputs: native.adapters_begin(
            inputs, outputs, checked_integer(seed, "seed", 0, 2**64 - 1), count, float(bound), list(names)
        ),
        least=count * len(names),
    )


def adapters_step(
    w: Any,
    grad: Any,
    m: Any,
    v: Any,
    steps: Any,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-10,
    grad_scale: float = 1.0,
) -> AdapterNumbers:
    """`adam` without decay on rows of [B, size] arrays, row b its step steps[b] from 1; 0: the row stays as it is."""
    numbers = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "grad_scale": grad_scale}
    return _adapters(
        {"w": w, "m": m, "v": v, "grad": grad},
        ("steps", steps, 0),
        lambda native, inputs, outputs: native.adapters_step(
            inputs, outputs, **{name: float(value) for name, value in numbers.items()}
        ),
    )


def _adapters(
    arrays: Mapping[str, Any], rows: tuple[str, Any, int], run: Callable[..., object], least: int = 1
) -> AdapterNumbers:
    call = Arrays()
    for name, value in arrays.items():
        call.add(name, value, "B", "size", copy=name != "grad")
    if call.sizes["size"] < least:
        raise ValueError(f"w has {call.sizes['size']} numbers a row; expected at least the {least} of the a's.")
    name, values, lowest = rows
    numbers = as_array(values, name)
    if numbers.dtype.kind not in "iu" or numbers.shape != (call.sizes["B"],):
        raise ValueError(f"{name} has shape {numbers.shape} and dtype {numbers.dtype}; expected B integers.")
    if numbers.min() < lowest or numbers.max() >= 2**31:
        raise ValueError(f"{name} holds numbers outside {lowest} … {2**31 - 1}.")
    outputs = {name: call.arrays[name] for name in ("w", "m", "v")} | {"copy": np.array(call.arrays["w"])}
    inputs = {name: np.ascontiguousarray(numbers, np.int32)}
    if "grad" in arrays:
        inputs["grad"] = call.arrays["grad"]
    run(call.native(), inputs, outputs)
    return AdapterNumbers(**outputs)


def muon(
    weights: Sequence[Any],
    grads: Sequence[Any],
    momenta: Sequence[Any],
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    ns_steps: int = 5,
    coefficients: Sequence[Sequence[float]] | None = None,
    normalize_rows: bool = False,
    grad_scale: float = 1.0,
    finite: bool = True,
) -> tuple[list[FloatArray], list[FloatArray]]:
    """A step of Muon on several matrices (docs/spec.md §3).

    m ← μ·m + g; u = NS5(g + μ·m); w ← w·(1 − lr·decay) − lr·√max(1, rows/cols)·u, with g = grad_scale·grad.

    Args:
        weights, grads, momenta: as many matrices each, shaped alike.
        ns_steps: Newton–Schulz iterations, at least 1.
        coefficients: as `newton_schulz`.
        normalize_rows: divide each row of g + μ·m by max(its norm, 1e−7) before the iterations.
        finite: False: nothing changes (see `GradNorm`).

    Returns:
        The new weights and momenta.
    """
    steps = checked_integer(ns_steps, "ns_steps", 1, 1000)
    call = Arrays()
    new_weights = call.add_list("weights", weights, copy=True)
    for i, w in enumerate(new_weights):
        if w.ndim != 2:
            raise ValueError(f"weights[{i}] has shape {w.shape}; expected a matrix.")
    gradients = call.add_list("grads", grads, like=new_weights)
    new_momenta = call.add_list("momenta", momenta, like=new_weights, copy=True)
    call.native().muon(
        new_weights,
        gradients,
        new_momenta,
        steps,
        polynomials(coefficients),
        normalize_rows=bool(normalize_rows),
        group=GROUPS.index("matrix"),
        lr=float(lr),
        weight_decay=float(weight_decay),
        momentum=float(momentum),
        grad_scale=float(grad_scale),
        finite=bool(finite),
    )
    return new_weights, new_momenta


def product(a: Any, b: Any) -> FloatArray:
    """`a·bᵀ`, stored as activations are; nothing of the model, but what a machine's limit is measured with.

    Args:
        a: [m, k].
        b: [n, k].
    """
    call = Arrays()
    call.add("a", a, "m", "k")
    call.add("b", b, "n", "k")
    out = call.empty("m", "n")
    call.native().product(call.arrays, {"out": out})
    return out


def newton_schulz(u: Any, steps: int = 5, coefficients: Sequence[Sequence[float]] | None = None) -> FloatArray:
    """Muon's orthogonalisation of a matrix, as `pgolf.newton_schulz`, where and as `on` says.

    Args:
        u: [rows, cols].
        steps: iterations, at least 1.
        coefficients: (a, b, c) of each iteration, the last also of those after it, at most 8; None: Keller Jordan's.
    """
    call = Arrays()
    call.add("u", u, "rows", "cols")
    out = call.empty("rows", "cols")
    call.native().newton_schulz(
        call.arrays["u"], out, checked_integer(steps, "steps", 1, 1000), polynomials(coefficients)
    )
    return out


def working_copy(w: Any, scale: Any = None, *, clip: int = 0, factor: float = 1.0) -> FloatArray:
    """What products read in place of a weight matrix: `factor·scale⊙Q(w)`, by rows (docs/spec.md §3).

    Args:
        w: [rows, cols].
        scale: [rows]; None: 1.
        clip: 0: Q is the identity. 1 … 127: late QAT's `clamp(round_half_even(w/σ), −clip−1, clip)·σ` a row with
            σ = max(max|row|/clip, 1e−12), in float32 also for float64 arrays; 15 is int5, 31 int6.
        factor: a power of two.
    """
    limit = checked_integer(clip, "clip", 0, 127)
    call = Arrays()
    call.add("w", w, "rows", "cols")
    if scale is not None:
        call.add("scale", scale, "rows")
    out = call.empty("rows", "cols")
    call.native().working_copy(call.arrays, {"out": out}, limit, float(factor))
    return out


def quantize_rows(w: Any, clip: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Rows to integers and fp16 scales, as `pgolf.quantize_rows(method="amax")`, where `on` says (docs/spec.md §4).

    Args:
        w: [rows, cols], float32.
        clip: 1 … 127.

    Returns:
        q [rows, cols] int8, scale [rows] float16.
    """
    limit = checked_integer(clip, "clip", 1, 127)
    call = Arrays(np.dtype(np.float32))
    matrix = call.add("w", w, "rows", "cols")
    q = np.zeros(matrix.shape, np.int8)
    scale = np.zeros(len(matrix), np.uint16)
    call.native().quantize_rows(matrix, limit, q, scale)
    return q, scale.view(np.float16)


def dequantize_rows(q: Any, scale: Any) -> FloatArray:
    """`q·scale` by rows, float32, where `on` says: q [rows, cols] int8, scale [rows] float16."""
    integers, halves = as_array(q, "q"), as_array(scale, "scale")
    if (
        integers.dtype != np.int8
        or integers.ndim != 2
        or halves.dtype != np.float16
        or halves.shape != (len(integers),)
    ):
        raise ValueError(
            f"q is {integers.dtype} {integers.shape}, scale {halves.dtype} {halves.shape}; "
            "expected int8 (rows, cols) and float16 (rows,)."
        )
    call = Arrays(np.dtype(np.float32), {"rows": integers.shape[0], "cols": integers.shape[1]})
    out = call.empty("rows", "cols")
    call.native().dequantize_rows(np.ascontiguousarray(integers), np.ascontiguousarray(halves).view(np.uint16), out)
    return out


def sum(x: Any) -> float:
    """Σ x in float64, x of any shape."""
    call = Arrays()
    (array,) = call.add_list("x", [x])
    return float(call.native().sum(array))


def axpby(a: float, x: Any, b: float, y: Any) -> FloatArray:
    """`a·x + b·y` for arrays of one shape."""
    call = Arrays()
    (left,) = call.add_list("x", [x])
    (right,) = call.add_list("y", [y], like=[left], copy=True)
    call.native().axpby(float(a), left, float(b), right)
    return right
