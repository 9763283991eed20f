"""The model of docs/spec.md §2, operation by operation, differentiated by PyTorch.

Every operation computes in the dtype of its inputs (float64 unless told otherwise). B sequences of T tokens; residual
activations have shape (B, T, d), heads (B, T, H, D) and (B, T, K, D).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.rng import normal
from tests.reference.shapes import ModelShape, is_control, layer_order, parameter_shapes

__all__ = ["ModelShape", "ReferenceGPT", "parameter_shapes", "perturb"]

EPSILON = 2.0**-23


def perturb(state: Mapping[str, npt.NDArray[np.float32]], seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """The state of the parity tests: at initialisation most gradients are zero, here none is.

    Control tensors get + normal(0, 0.1); other tensors that are zero throughout become normal(0, 0.02).
    """
    out = {}
    for name, value in state.items():
        if is_control(name):
            out[name] = value + normal(seed, name, value.shape, 0.1)
        elif not value.any():
            out[name] = normal(seed, name, value.shape, 0.02)
        else:
            out[name] = value.copy()
    return out


def as_ids(ids: Any) -> Tensor:
    """Token ids of any integer type as an int64 tensor."""
    return torch.from_numpy(np.array(ids, dtype=np.int64))


# Operations -----------------------------------------------------------------------------------------------------------


def rms(x: Tensor) -> Tensor:
    """`x · (mean(x²) + ε)^(−1/2)` over the last axis, ε = 2⁻²³."""
    return x * (x.square().mean(-1, keepdim=True) + EPSILON) ** -0.5


def bigram_hash(ids: Tensor, buckets: int) -> Tensor:
    """§2.1: the bucket of each position, (B, T) int64; position 0 has the last bucket."""
    left = (36313 * ids[:, 1:]).to(torch.int32)  # conversion from int64 wraps as int32 products do
    right = (27191 * ids[:, :-1]).to(torch.int32)
    hashed = torch.remainder((left ^ right).to(torch.int64), buckets - 1)  # non-negative
    return F.pad(hashed, (1, 0), value=buckets - 1)


def embed(ids: Tensor, table: Tensor, bigram: Tensor | None, proj: Tensor | None, scale: Tensor | None) -> Tensor:
    """§2.1: token embedding plus the scaled, projected bigram embedding, (B, T, d), before the norm."""
    x = table[ids]
    if bigram is None or scale is None:
        return x
    pair = bigram[bigram_hash(ids, bigram.shape[0])]
    return x + scale * (pair if proj is None else pair @ proj.T)


def smear(x: Tensor, gate: Tensor, reset: Tensor | None = None) -> Tensor:
    """§2.2: `(1−g)·x[t] + g·x[t−1]`, g = sigmoid(gate); where `reset` (B, T) is true the previous embedding is 0."""
    previous = F.pad(x[:, :-1], (0, 0, 1, 0))
    if reset is not None:
        previous = previous.masked_fill(reset[..., None], 0.0)
    g = gate.sigmoid()
    return (1 - g) * x + g * previous


def rope_tables(length: int, head_dim: int, base: float, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, D/2), where D numbers of a head turn; `exact`, or `bf16` as the script's eager table."""
    if kind == "exact":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        angle = torch.outer(torch.arange(length, dtype=torch.float64), base**-exponent)
        return angle.cos().to(dtype), angle.sin().to(dtype)
    if kind == "bf16":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequency = (1.0 / base**exponent).to(torch.bfloat16)
        position = torch.arange(length).to(torch.bfloat16)  # arange(dtype=bf16) on the CPU is off beyond 4096
        angle = torch.outer(position, frequency)
        return angle.cos().to(dtype), angle.sin().to(dtype)
    raise ValueError(f"rope_tables is {kind!r}; expected 'exact' or 'bf16'.")


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """§2.5: rotate the pairs (j, j + R/2) of every head of x (B, T, heads, D); cos and sin are (T, R/2), R ≤ D."""
    a, b, rest = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat([a * cos + b * sin, -a * sin + b * cos, rest], dim=-1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v over the positions up to each one's own; query head h reads key/value head ⌊h·K/H⌋."""
    length, heads, head_dim = q.shape[1:]
    shared = [h * k.shape[2] // heads for h in range(heads)]
    q, k, v = q.transpose(1, 2), k[:, :, shared].transpose(1, 2), v[:, :, shared].transpose(1, 2)
    scores = (q / math.sqrt(head_dim)) @ k.transpose(-1, -2)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -math.inf).softmax(-1) @ v).transpose(1, 2)


def queries_keys_values(
    n: Tensor, c_q: Tensor, c_k: Tensor, c_v: Tensor, q_gain: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """§2.5 up to the scores: q (B, T, H, D) normed, rotated, times its gain; k (B, T, K, D) without gain; v plain."""
    heads = q_gain.shape[0]
    head_dim = c_q.shape[0] // heads
    q = (n @ c_q.T).unflatten(-1, (heads, head_dim))
    k = (n @ c_k.T).unflatten(-1, (-1, head_dim))
    v = (n @ c_v.T).unflatten(-1, (-1, head_dim))
    return apply_rope(rms(q), cos, sin) * q_gain[:, None], apply_rope(rms(k), cos, sin), v


def attention(
    n: Tensor, c_q: Tensor, c_k: Tensor, c_v: Tensor, proj: Tensor, q_gain: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """§2.5: from the normed input n (B, T, d) to the output projection, (B, T, d)."""
    q, k, v = queries_keys_values(n, c_q, c_k, c_v, q_gain, cos, sin)
    return causal_attention(q, k, v).flatten(-2) @ proj.T


def squared_relu(u: Tensor, negative_slope: float = 0.0) -> Tensor:
    """§2.6: u² above 0, (a·u)² below."""
    return torch.where(u > 0, u, negative_slope * u).square()


def mlp(n: Tensor, fc: Tensor, proj: Tensor, negative_slope: float = 0.0) -> Tensor:
    """§2.6: `proj(f(fc(n)))` of the normed input n."""
    return squared_relu(n @ fc.T, negative_slope) @ proj.T


def head(x: Tensor, weight: Tensor, softcap: float) -> Tensor:
    """§2.7: `c · tanh(rms(x)·Wᵀ/c)`, (B, T, V)."""
    return softcap * torch.tanh(rms(x) @ weight.T / softcap)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(logits)[target], natural logarithm, (B, T)."""
    return logits.logsumexp(-1) - logits.gather(-1, targets[..., None]).squeeze(-1)


# Late QAT -------------------------------------------------------------------------------------------------------------


def fake_quantise(w: Tensor, clip: int) -> Tensor:
    """§3 Late QAT: `clamp(round_half_even(w/σ), −c−1, c)·σ` a row, in float32, σ not rounded to fp16."""
    w32 = w.detach().to(torch.float32)
    sigma = (w32.abs().amax(-1, keepdim=True) / clip).clamp_min(1e-12)
    return ((w32 / sigma).round().clamp(-clip - 1, clip) * sigma).to(w.dtype)


def straight_through(w: Tensor, clip: int) -> Tensor:
    """The value of `fake_quantise`, exactly, with the identity as its gradient to w."""
    return fake_quantise(w, clip) + (w - w.detach())


def qat_clips(cfg: Any) -> dict[str, int]:
    """The matrices that late QAT quantises and their clips: 15 for `*.mlp.*`, 31 for `*.attn.*`."""
    clips = {}
    for name, shape in parameter_shapes(cfg).items():
        for pattern, clip in (("*.mlp.*", 15), ("*.attn.*", 31)):
            if len(shape) == 2 and fnmatchcase(name, pattern):
                clips[name] = clip
    return clips


# Model ----------------------------------------------------------------------------------------------------------------


class ReferenceGPT:
    """The whole model. `params` holds the leaf tensors by name; `clips` the fake-quantised ones (empty: none)."""

    def __init__(self, cfg: Any, state: Mapping[str, npt.ArrayLike], dtype: torch.dtype = torch.float64) -> None:
        self.cfg = cfg
        self.dtype = dtype
        self.clips: dict[str, int] = {}
        self.looping = True  # of the layers that have loops
        self.turn = 0  # of the layer that is computed
        shapes = parameter_shapes(cfg)
        if set(state) != set(shapes):
            raise ValueError(f"These tensors are missing or extra: {sorted(set(state) ^ set(shapes))}.")
        self.params: dict[str, Tensor] = {}
        for name, shape in shapes.items():
            value = np.array(state[name])
            if value.shape != shape:
                raise ValueError(f"{name} has shape {value.shape}; expected {shape}.")
            self.params[name] = torch.from_numpy(value).to(dtype).requires_grad_()

    def weight(self, name: str) -> Tensor:
        """The parameter as the forward pass uses it."""
        w = self.params[name]
        return straight_through(w, self.clips[name]) if name in self.clips else w

    def block(self, i: int, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """§2.4."""

        def w(name: str) -> Tensor:
            return self.weight(f"blocks.{i}.{name}")

        scale = 1 / math.sqrt(i + 1) if self.cfg.ln_scale else 1.0
        mix = w("resid_mix")
        x = mix[0] * x + mix[1] * x0
        x = x + w("attn_scale") * attention(
            scale * rms(x),
            w("attn.c_q.weight"),
            w("attn.c_k.weight"),
            w("attn.c_v.weight"),
            w("attn.proj.weight"),
            w("attn.q_gain"),
            cos,
            sin,
        )
        hidden = mlp(scale * rms(x), w("mlp.fc.weight"), w("mlp.proj.weight"), self.cfg.mlp_negative_slope)
        return x + w("mlp_scale") * hidden

    def hidden(self, ids: Any) -> Tensor:
        """The residual stream before the head, (B, T, d)."""
        cfg, ids = self.cfg, as_ids(ids)
        order = layer_order(cfg, self.looping)
        turned = cfg.rope_dims or cfg.model_dim // cfg.num_heads
        cos, sin = rope_tables(ids.shape[1], turned, cfg.rope_base, cfg.rope_tables, self.dtype)
        bigram = self.params.get("bigram.embed.weight")
        proj = self.params.get("bigram.proj.weight")
        x = embed(ids, self.params["tok_emb.weight"], bigram, proj, self.params.get("bigram.scale"))
        x = smear(rms(x), self.params["smear.gate"], ids == cfg.bos_id if cfg.smear_reset_at_bos else None)
        x0 = x
        stack = []
        for place, i in enumerate(order):
            self.turn = order[:place].count(i)
            j = place - len(order) // 2
            if j >= 0 and stack:
                x = x + self.params["skip_weights"][j] * stack.pop()
            x = self.block(i, x, x0, cos, sin)
            if j < 0:
                stack.append(x)
        return x

    def logits(self, ids: Any) -> Tensor:
        """(B, T) ids to (B, T, V) logits, after the softcap."""
        table = self.params["tok_emb.weight" if self.cfg.tie_embeddings else "lm_head.weight"]
        return head(self.hidden(ids), table, self.cfg.logit_softcap)

    def token_losses(self, ids: Any, targets: Any) -> Tensor:
        """(B, T) losses in nats."""
        return cross_entropy(self.logits(ids), as_ids(targets))

    def loss(self, ids: Any, targets: Any) -> Tensor:
        """The mean loss, a scalar tensor."""
        return self.token_losses(ids, targets).mean()

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradient of a scalar with respect to every parameter; zeros where it does not depend on it."""
        gradients = torch.autograd.grad(loss, list(self.params.values()), materialize_grads=True)
        return dict(zip(self.params, gradients, strict=True))

    def loss_and_grads(self, ids: Any, targets: Any) -> tuple[float, dict[str, np.ndarray]]:
        """The mean loss and its gradients by name."""
        loss = self.loss(ids, targets)
        return loss.item(), {name: g.numpy() for name, g in self.gradients(loss).items()}

    def state(self) -> dict[str, np.ndarray]:
        """A copy of the parameters, in the model's dtype."""
        return {name: p.detach().numpy().copy() for name, p in self.params.items()}
