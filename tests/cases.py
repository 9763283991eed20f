"""The backend's operations as cases: inputs, the reference in float64, and how the package runs them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pgolf import ops
from tests.reference import model as reference

DTYPES = ("float32", "float64")
TOLERANCE = {"float32": 1e-5, "float64": 1e-11}

Arrays = dict[str, np.ndarray]


@dataclass
class Case:
    """An operation on given inputs: its reference, and how the package runs it."""

    name: str
    inputs: Arrays
    expected: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    """Inputs to outputs. A scalar among them, or one called `reader of …`, is there for its gradient alone."""
    run: Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]
    """Inputs, the gradients at outputs, starts of gradients -> outputs, gradients."""
    gradients: list[str]
    started: list[str] = field(default_factory=list)
    """Those gradients that are added to."""

    def __str__(self) -> str:
        return self.name

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(len(self.name))

    def reference(self, stored: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> tuple[Arrays, Arrays, Arrays]:
        """Outputs, the random gradients at them, and gradients; float64. stored: what a random gradient is kept as."""
        rng = self.generator()
        leaves = {
            name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
            if value.dtype.kind == "f"
            else torch.tensor(value)
            for name, value in self.inputs.items()
        }
        outputs = self.expected(leaves)
        upstream = {name: stored(draw(rng, *out.shape)) if out.ndim else np.ones(()) for name, out in outputs.items()}
        objective = sum((out * torch.tensor(upstream[name])).sum() for name, out in outputs.items())
        gradients = torch.autograd.grad(objective, [leaves[name] for name in self.gradients])
        return (
            {name: out.detach().numpy() for name, out in outputs.items()},
            upstream,
            {name: g.numpy() for name, g in zip(self.gradients, gradients, strict=True)},
        )

    def starts(self, gradients: Arrays) -> Arrays:
        rng = self.generator()
        sizes = {name: np.sqrt(np.mean(gradients[name] ** 2)) for name in self.started}
        return {name: as_float32(draw(rng, *gradients[name].shape) * (size or 1)) for name, size in sizes.items()}

    def native(self, dtype: str, upstream: Arrays, starts: Arrays) -> tuple[Arrays, Arrays]:
        return self.run(*(cast(arrays, dtype) for arrays in (self.inputs, upstream, starts)))

    def check(self, dtype: str) -> None:
        """Asserts the relative error of every output and every gradient."""
        outputs, upstream, gradients = self.reference()
        starts = self.starts(gradients)
        found_outputs, found_gradients = self.native(dtype, upstream, starts)
        assert set(found_gradients) == set(gradients)
        for name, found in found_outputs.items():
            assert_close(found, outputs[name], dtype, f"{self.name}: {name}")
        everything = math.sqrt(sum(float(np.sum(g**2)) for g in gradients.values()))
        for name, found in found_gradients.items():
            expected = gradients[name] + starts.get(name, 0)
            scale = float(np.linalg.norm(gradients[name]))
            # What is zero by its mathematics has no relative error.
            scale = scale if scale > 1e-9 * everything else everything
            assert_close(found, expected, dtype, f"{self.name}: gradient of {name}", scale)


def as_float32(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).astype(np.float64)


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal float32 numbers, as float64."""
    return as_float32(rng.standard_normal(shape))


def cast(arrays: Arrays, dtype: str) -> Arrays:
    """Read-only copies, floats in `dtype`: an operation that writes to its arguments fails."""
    out = {name: a.astype(dtype) if a.dtype.kind == "f" else a.copy() for name, a in arrays.items()}
    for a in out.values():
        a.flags.writeable = False
    return out


def assert_close(found: Any, expected: np.ndarray, dtype: str, what: str, scale: float | None = None) -> None:
    assert found.shape == expected.shape and found.dtype == dtype, what
    scale = float(np.linalg.norm(expected)) if scale is None else scale
    error = float(np.linalg.norm(found - expected))
    assert error <= TOLERANCE[dtype] * scale, f"{what}: relative error {error / scale if scale else error}"


# Cases ----------------------------------------------------------------------------------------------------------------


def embed_case(
    B: int, T: int, V: int, d: int, bigram: tuple[int, int | None] | None = None, reset: bool = False
) -> Case:
    """bigram: (n, e); e None is e = d without projection."""
    rng = np.random.default_rng(1)
    inputs = {
        "ids": rng.integers(0, V, (B, T)),
        "tok_emb": draw(rng, V, d),
        "smear_gate": draw(rng, d),
    }
    if bigram is not None:
        n, e = bigram
        inputs["bigram_emb"] = draw(rng, n, e or d)
        if e is not None:
            inputs["bigram_proj"] = draw(rng, d, e)
        inputs["bigram_scale"] = draw(rng)

    def expected(t):
        x = reference.embed(t["ids"], t["tok_emb"], *(t.get(f"bigram_{name}") for name in ("emb", "proj", "scale")))
        return {"x0": reference.smear(reference.rms(x), t["smear_gate"], t["ids"] == 1 if reset else None)}

    def run(inputs, upstream, starts):
        x0, saved = ops.embed(**inputs, reset_at_bos=reset, bos_id=1)
        return {"x0": x0}, named(ops.embed_backward(saved, upstream["x0"], add_to=starts))

    gradients = [name for name in inputs if name != "ids"]
    return Case(f"embed {B}x{T} V{V} d{d} bigram {bigram} {reset}", inputs, expected, run, gradients, gradients)


def mixed_inputs(rng: np.random.Generator, B: int, T: int, d: int, skip: str) -> Arrays:
    inputs = {"x": draw(rng, B, T, d), "x0": draw(rng, B, T, d), "resid_mix": draw(rng, 2, d)}
    if skip:
        inputs["skip"] = inputs["x"] if skip == "x" else draw(rng, B, T, d)
        inputs["skip_weight"] = draw(rng, d)
    return inputs


def mixed_reference(t: dict[str, torch.Tensor]) -> torch.Tensor:
    x = t["x"] + t["skip_weight"] * t["skip"] if "skip" in t else t["x"]
    return t["resid_mix"][0] * x + t["resid_mix"][1] * t["x0"]


def mixed_native(inputs: Arrays, skip: str) -> ops.MixedInput:
    fields = {name: inputs[name] for name in ops.MixedInput._fields if name in inputs}
    return ops.MixedInput(**{**fields, "skip": inputs["x"]} if skip == "x" else fields)


def adapters_of(adapters: torch.Tensor, rank: int, d: int, *outs: int) -> list[torch.Tensor]:
    """A sequence's row of adapters to b·a [out, d] for each product."""
    parts = adapters.split([rank * d] * len(outs) + [rank * out for out in outs])
    pairs = zip(parts[: len(outs)], parts[len(outs) :], outs, strict=True)
    return [b.view(out, rank) @ a.view(rank, d) for a, b, out in pairs]


def qkv_case(
    B: int,
    T: int,
    d: int,
    H: int,
    K: int,
    D: int,
    skip: str = "",
    rank: int = 0,
    norm_scale: float = 1.0,
    turned: int | None = None,
) -> Case:
    """skip: "" for none, "x" for x itself, "other". rank: of adapters; 0: none. turned: rope_dims."""
    rng = np.random.default_rng(2)
    first, width = T // 3, D if turned is None else turned
    cos, sin = (table.numpy() for table in reference.rope_tables(T + 3, width, 10000.0, "exact", torch.float64))
    idle = ((0, 0), (0, (D - width) // 2))
    cos, sin = np.pad(cos, idle, constant_values=1.0), np.pad(sin, idle)
    inputs = {
        **mixed_inputs(rng, B, T, d, skip),
        "wq": draw(rng, H * D, d),
        "wk": draw(rng, K * D, d),
        "wv": draw(rng, K * D, d),
        "cos": as_float32(cos),
        "sin": as_float32(sin),
    }
    if rank:
        inputs["adapters"] = as_float32(draw(rng, B, rank * (2 * d + H * D + K * D)) / (4 * rank**0.5))

    def expected(t):
        m = mixed_reference(t)
        n, ones = norm_scale * reference.rms(m), torch.ones(H, dtype=torch.float64)
        found = []
        for b in range(B):
            wq, wv = t["wq"], t["wv"]
            if rank:
                of_q, of_v = adapters_of(t["adapters"][b], rank, d, H * D, K * D)
                wq, wv = wq + of_q, wv + of_v
            part = slice(b, b + 1)
            tables = (t["cos"][:T, : width // 2], t["sin"][:T, : width // 2])
            found.append(reference.queries_keys_values(n[part], wq, t["wk"], wv, ones, *tables))
        q, k, v = (torch.cat(parts) for parts in zip(*found, strict=True))
        late = {} if rank else {"late q": q[:, first:], "late k": k, "late v": v}
        return {"q": q, "k": k, "v": v, "reader of m": m, "reader of x": t["x"], **detached(late)}

    def run(inputs, upstream, starts):
        mixed = mixed_native(inputs, skip)
        arguments = [inputs[name] for name in ("wq", "wk", "wv", "cos", "sin")]
        late, numbers = {}, {"norm_scale": norm_scale, "rope_dims": turned}
        if not rank:
            late_heads, _ = ops.qkv(mixed, *arguments, first=first, **numbers)
            late = dict(zip(("late q", "late k", "late v"), late_heads, strict=True))
        (q, k, v), saved = ops.qkv(mixed, *arguments, adapters=inputs.get("adapters"), **numbers)

        def backward(**ways):
            return named(
                ops.qkv_backward(
                    saved,
                    upstream["q"],
                    upstream["k"],
                    upstream["v"],
                    dm=upstream["reader of m"],
                    pending=upstream["reader of x"],
                    **ways,
                )
            )

        gradients = backward(add_to=starts)
        assert_same({"x", "skip", "adapters"}, backward(weights=False), gradients)
        assert_same({"adapters"}, backward(weights=False, inputs=False), gradients)
        return {"q": q, "k": k, "v": v, **late}, gradients

    gradients = [name for name in inputs if name not in ("cos", "sin")]
    started = [name for name in gradients if name not in ("x", "skip", "adapters")]
    name = f"qkv {B}x{T} d{d} H{H} K{K} D{D} skip {skip!r}" + (f" rank {rank}" if rank else "")
    name += (f" scale {norm_scale}" if norm_scale != 1 else "") + (f" turned {turned}" if turned else "")
    return Case(name, inputs, expected, run, gradients, started)


def attention_case(B: int, T: int, H: int, K: int, D: int, normed: float | None = None) -> Case:
    """normed: heads of q and k are, and gains are of this size, half of them negative."""
    rng = np.random.default_rng(3)
    first = T // 3
    shapes = {"q": (B, T, H, D), "k": (B, T, K, D), "v": (B, T, K, D), "gain": (H,)}
    inputs = {name: draw(rng, *shape) for name, shape in shapes.items()}
    if normed is not None:
        for name in ("q", "k"):
            inputs[name] = as_float32(inputs[name] / np.sqrt(np.mean(inputs[name] ** 2, axis=-1, keepdims=True)))
        inputs["gain"] = as_float32(normed * (1 - 2 * (np.arange(H) % 2)))
    ways = {"normed": normed is not None}

    def expected(t):
        o = reference.causal_attention(t["q"] * t["gain"][:, None], t["k"], t["v"])
        return {"o": o, **detached({"late o": o[:, first:], "last o": o[:, -1:]})}

    def run(inputs, upstream, starts):
        late, _ = ops.attention(**{**inputs, "q": inputs["q"][:, first:]}, **ways)
        last, _ = ops.attention(**{**inputs, "q": inputs["q"][:, -1:]}, **ways)
        o, saved = ops.attention(**inputs, **ways)
        gradients = named(ops.attention_backward(saved, upstream["o"], add_to=starts))
        assert_same({"q", "k", "v"}, named(ops.attention_backward(saved, upstream["o"], weights=False)), gradients)
        return {"o": o, "late o": late, "last o": last}, gradients

    name = f"attention {B}x{T} H{H} K{K} D{D}" + (f" normed {normed}" if normed is not None else "")
    return Case(name, inputs, expected, run, list(inputs), ["gain"])


def heads_case(B: int, T: int, d: int, H: int, K: int, D: int, skip: str = "", turned: int | None = None) -> Case:
    """q, k, v and attention as a training step runs them: attention's backward goes on to the products."""
    inputs = qkv_case(B, T, d, H, K, D, skip, turned=turned).inputs
    angles = (turned or D) // 2
    gain = draw(np.random.default_rng(3), H)

    def expected(t):
        n = reference.rms(mixed_reference(t))
        parts = (t["wq"], t["wk"], t["wv"], t["gain"], t["cos"][:T, :angles], t["sin"][:T, :angles])
        return {"o": reference.causal_attention(*reference.queries_keys_values(n, *parts))}

    def run(inputs, upstream, starts):
        arguments = [inputs[name] for name in ("wq", "wk", "wv", "cos", "sin")]
        heads, made = ops.qkv(mixed_native(inputs, skip), *arguments, rope_dims=turned)
        o, saved = ops.attention(*heads, inputs["gain"], normed=True)
        add_to = {"gain": starts.pop("gain")}
        *at_products, gain = ops.attention_backward(saved, upstream["o"], qkv=made, add_to=add_to)
        gradients = ops.qkv_backward(made, *at_products, at_products=True, add_to=starts)
        return {"o": o}, {**named(gradients), "gain": gain}

    gradients = [name for name in (*inputs, "gain") if name not in ("cos", "sin")]
    started = [name for name in gradients if name not in ("x", "skip")]
    name = f"heads {B}x{T} d{d} H{H} K{K} D{D} skip {skip!r}" + (f" turned {turned}" if turned else "")
    return Case(name, {**inputs, "gain": gain}, expected, run, gradients, started)


def project_residual_case(
    B: int, T: int, d: int, c: int, skip: str | None = None, h_scale: float | None = None, slope: float = 0.0
) -> Case:
    """skip: as in qkv_case; None: the residual is an array. h_scale: a is h_scale·f(u), and u's gradient wanted."""
    rng = np.random.default_rng(4)
    first = T // 3
    inputs = {"x": draw(rng, B, T, d)} if skip is None else mixed_inputs(rng, B, T, d, skip)
    inputs |= {"a": draw(rng, B, T, c), "w": draw(rng, d, c), "scale": draw(rng, d)}
    if h_scale is not None:  # 4 bits, whose squares all dtypes hold
        inputs["u"] = np.clip(np.round(4 * inputs.pop("a")), -15, 15) / 4

    def expected(t):
        residual = t["x"] if skip is None else mixed_reference(t)
        a = t["a"] if h_scale is None else h_scale * reference.squared_relu(t["u"], slope)
        out = residual + t["scale"] * (a @ t["w"].T)
        return {"out": out, **detached({"late out": out[:, first:]})}

    def run(inputs, upstream, starts):
        residual = inputs["x"] if skip is None else mixed_native(inputs, skip)
        w = ops.working_copy(inputs["w"], inputs["scale"])
        a, ways = inputs.get("a"), {"h_scale": h_scale or 0}
        if h_scale is not None:
            u = inputs["u"]
            a = h_scale * np.where(u > 0, u, u.dtype.type(slope) * u) ** 2
            if slope:
                ways |= {"negative_slope": slope, "negative": np.packbits(u < 0, bitorder="little")}
        late_residual = residual if isinstance(residual, ops.MixedInput) else residual[:, first:]
        late, _ = ops.project_residual(late_residual, a[:, first:], w)
        out, saved = ops.project_residual(residual, a, w)
        da, dw = ops.project_residual_backward(saved, upstream["out"], **ways)
        without = ops.project_residual_backward(saved, upstream["out"], **ways, weights=False)
        assert_same({"a"}, named(without), {"a": da})
        dw, dscale = ops.finish_projection(inputs["w"], inputs["scale"], dw, starts["scale"])
        return {"out": out, "late out": late}, {wanted: da, "w": dw, "scale": dscale}

    wanted = "a" if h_scale is None else "u"
    name = f"project {B}x{T} d{d} c{c} skip {skip!r}" + ("" if h_scale is None else f" h_scale {h_scale}")
    name += f" slope {slope}" if slope else ""
    return Case(name, inputs, expected, run, [wanted, "w", "scale"], ["scale"])


def mlp_up_case(B: int, T: int, d: int, F: int, slope: float = 0.0, norm_scale: float = 1.0) -> Case:
    rng = np.random.default_rng(5)
    inputs = {"x": draw(rng, B, T, d), "w": draw(rng, F, d)}

    def expected(t):
        u = norm_scale * reference.rms(t["x"]) @ t["w"].T
        return {"u": u, **detached({"h": reference.squared_relu(u, slope)})}

    def run(inputs, upstream, starts):
        h, saved = ops.mlp_up(**inputs, negative_slope=slope, norm_scale=norm_scale)
        gradients = named(ops.mlp_up_backward(saved, upstream["u"], add_to=starts))
        without = ops.mlp_up_backward(saved, upstream["u"], weights=False, add_to={"x": starts["x"]})
        assert_same({"x"}, named(without), gradients)
        return {"h": h}, gradients

    name = f"mlp_up {B}x{T} d{d} F{F}" + (f" slope {slope}" if slope else "")
    name += f" scale {norm_scale}" if norm_scale != 1 else ""
    return Case(name, inputs, expected, run, ["x", "w"], ["x", "w"])


def attention_sublayer_case(B: int, T: int, d: int, H: int, K: int, D: int, skip: str = "", rank: int = 0) -> Case:
    """skip, rank: as qkv_case. w and scale are the output projection's."""
    rng = np.random.default_rng(8)
    first = T // 3
    inputs = {**qkv_case(B, T, d, H, K, D, skip, rank).inputs, "gain": draw(rng, H)}
    inputs |= {"w": draw(rng, d, H * D), "scale": draw(rng, d)}

    def expected(t):
        m = mixed_reference(t)
        n, found = reference.rms(m), []
        for b in range(B):
            wq, wv = t["wq"], t["wv"]
            if rank:
                of_q, of_v = adapters_of(t["adapters"][b], rank, d, H * D, K * D)
                wq, wv = wq + of_q, wv + of_v
            parts = (wq, t["wk"], wv, t["gain"], t["cos"][:T], t["sin"][:T])
            found.append(reference.causal_attention(*reference.queries_keys_values(n[b : b + 1], *parts)))
        out = m + t["scale"] * (torch.cat(found).flatten(-2) @ t["w"].T)
        return {"out": out, "reader of x": t["x"], **detached({} if rank else {"late out": out[:, first:]})}

    def run(inputs, upstream, starts):
        mixed, wo = mixed_native(inputs, skip), ops.working_copy(inputs["w"], inputs["scale"])
        arguments = [inputs[name] for name in ("wq", "wk", "wv", "gain")] + [wo, inputs["cos"], inputs["sin"]]
        late = {} if rank else {"late out": ops.attention_sublayer(mixed, *arguments, first=first)[0]}
        out, saved = ops.attention_sublayer(mixed, *arguments, adapters=inputs.get("adapters"))

        def backward(**ways):
            pending = upstream["reader of x"]
            return named(ops.attention_sublayer_backward(saved, upstream["out"], pending=pending, **ways))

        dscale = starts.pop("scale")
        gradients = backward(add_to=starts)
        assert_same({"x", "skip", "adapters"}, backward(weights=False), gradients)
        assert_same({"adapters"}, backward(weights=False, inputs=False), gradients)
        ends = ops.finish_projection(inputs["w"], inputs["scale"], gradients.pop("wo"), dscale)
        return {"out": out, **late}, {**gradients, **named(ends)}

    gradients = [name for name in inputs if name not in ("cos", "sin")]
    started = [name for name in gradients if name not in ("x", "skip", "adapters", "w")]
    name = f"attention sublayer {B}x{T} d{d} H{H} K{K} D{D} skip {skip!r}" + (f" rank {rank}" if rank else "")
    return Case(name, inputs, expected, run, gradients, started)


def mlp_sublayer_case(B: int, T: int, d: int, F: int, slope: float = 0.0) -> Case:
    """w and scale are the down projection's."""
    rng = np.random.default_rng(9)
    inputs = {"x": draw(rng, B, T, d), "up": draw(rng, F, d), "w": draw(rng, d, F), "scale": draw(rng, d)}

    def expected(t):
        return {"out": t["x"] + t["scale"] * reference.mlp(reference.rms(t["x"]), t["up"], t["w"], slope)}

    def run(inputs, upstream, starts):
        factor = ops.mlp_down_factor()
        down = ops.working_copy(inputs["w"], inputs["scale"], factor=factor)
        out, saved = ops.mlp_sublayer(inputs["x"], inputs["up"], down, negative_slope=slope)
        gradients = ops.mlp_sublayer_backward(saved, upstream["out"], add_to={"up": starts["up"]})
        without = ops.mlp_sublayer_backward(saved, upstream["out"], weights=False)
        assert_same({"x"}, named(without), named(gradients))
        ends = ops.finish_projection(inputs["w"], inputs["scale"], gradients.down, starts["scale"], factor=factor)
        return {"out": out}, {"x": gradients.x, "up": gradients.up, **named(ends)}

    name = f"mlp sublayer {B}x{T} d{d} F{F}" + (f" slope {slope}" if slope else "")
    return Case(name, inputs, expected, run, list(inputs), ["up", "scale"])


def head_case(B: int, T: int, d: int, V: int, softcap: float = 30.0, loss_scale: float = 1.0) -> Case:
    rng = np.random.default_rng(6)
    inputs = {"x": draw(rng, B, T, d), "w": draw(rng, V, d), "targets": rng.integers(0, V, (B, T))}
    first = T // 3

    def expected(t):
        logits = reference.head(t["x"], t["w"], softcap)
        losses = reference.cross_entropy(logits, t["targets"])
        # Only the sum of all losses has a gradient.
        parts = {"logits": logits, "losses": losses, "late logits": logits[:, first:], "late losses": losses[:, first:]}
        return detached(parts) | {"objective": loss_scale * losses.sum()}

    def run(inputs, upstream, starts):
        x, w, targets = inputs.values()
        losses, gradients = ops.head_loss_backward(x, w, targets, softcap=softcap, loss_scale=loss_scale, add_to=starts)
        assert same_bits(losses, ops.head_loss(x, w, targets, softcap=softcap))
        return {
            "losses": losses,
            "logits": ops.head_logits(x, w, softcap=softcap),
            "late logits": ops.head_logits(x, w, softcap=softcap, first=first),
            "late losses": ops.head_loss(x, w, targets, softcap=softcap, first=first),
        }, named(gradients)

    return Case(f"head {B}x{T} d{d} V{V} cap {softcap}", inputs, expected, run, ["x", "w"], ["w"])


def adapted_head_case(
    B: int, T: int, d: int, V: int, first: int, rank: int, softcap: float = 30.0, loss_scale: float = 1.0
) -> Case:
    """With adapters, a weight for each loss, and only positions from `first` on; rank 0: no adapters."""
    rng = np.random.default_rng(7)
    inputs = {"x": draw(rng, B, T, d), "w": draw(rng, V, d), "targets": rng.integers(0, V, (B, T))}
    loss_weights = as_float32(rng.uniform(0.5, 1.0, (B, T - first)) * (rng.random((B, T - first)) < 0.8))
    if rank:
        inputs["adapters"] = as_float32(draw(rng, B, rank * (d + V)) / (4 * rank**0.5))

    def expected(t):
        heads = [t["w"] + adapters_of(t["adapters"][b], rank, d, V)[0] if rank else t["w"] for b in range(B)]
        logits = torch.cat([reference.head(t["x"][b : b + 1, first:], w, softcap) for b, w in enumerate(heads)])
        losses = reference.cross_entropy(logits, t["targets"][:, first:])
        objective = loss_scale * (torch.tensor(loss_weights) * losses).sum()
        return {"losses": losses.detach(), "logits": logits.detach(), "objective": objective}

    def run(inputs, upstream, starts):
        x, w, targets, *adapters = inputs.values()
        ways = {"softcap": softcap, "first": first, "adapters": adapters[0] if adapters else None}
        weights = {"loss_scale": loss_scale, "loss_weights": loss_weights.astype(x.dtype)}
        losses, gradients = ops.head_loss_backward(x, w, targets, **ways, **weights, add_to=starts)
        again, without = ops.head_loss_backward(x, w, targets, **ways, **weights, weights=False)
        assert_same({"x", "adapters"}, named(without), named(gradients))
        assert same_bits(losses, again) and same_bits(losses, ops.head_loss(x, w, targets, **ways))
        assert not gradients.x[:, :first].any()
        return {"losses": losses, "logits": ops.head_logits(x, w, **ways)}, named(gradients)

    name = f"adapted head {B}x{T} d{d} V{V} first {first} rank {rank}"
    return Case(name, inputs, expected, run, [name for name in inputs if name != "targets"], ["w"])


def assert_same(names: set[str], found: Arrays, expected: Arrays) -> None:
    """A backward that leaves gradients out: these are left, those of them that there are, and have the same bits."""
    assert set(found) == names & set(expected)
    for name in found:
        assert same_bits(found[name], expected[name]), name


def detached(outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Results that nobody takes gradients of."""
    return {name: out.detach() for name, out in outputs.items()}


def named(gradients: Any) -> Arrays:
    return {name: g for name, g in gradients._asdict().items() if g is not None}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
