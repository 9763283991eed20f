"""Test-time training as a competent PyTorch user writes it, on peer_torch's model: what pgolf is measured against.

Adapters are parameters with a document axis, their products batched ones; 64 documents go forward together, in windows
of 256, 512, 768 or 1024 tokens; base weights have no gradients. The natural way computes the head for a chunk's
positions alone and compiles a function for each length of window, with the fused Adam; the eager way does what the
public evaluation does: uncompiled, logits of every position, the default Adam.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from peer_torch import GPT, rms
from torch import Tensor, nn

Adapters = list[tuple[Tensor, Tensor]]  # (A [B, r, in], B [B, out, r]) of each block's q and v, then of the head


def low_rank(x: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
    a, b = pair
    return x @ a.transpose(1, 2) @ b.transpose(1, 2)


def adapted_losses(model: GPT, adapters: Adapters, ids: Tensor, targets: Tensor, first: int) -> Tensor:
    """(B, T − first) losses of the positions from `first` on."""
    x = model.tok_emb(ids)
    if model.bigram is not None:
        x = x + model.bigram(ids)
    x = x0 = model.smear(rms(x))
    stack = []
    for i, block in enumerate(model.blocks):
        if i >= model.encoders and stack:
            x = x + model.skip_weights[i - model.encoders] * stack.pop()
        x = block.resid_mix[0] * x + block.resid_mix[1] * x0
        n, attention = rms(x), block.attn
        products = (
            attention.c_q(n) + low_rank(n, adapters[2 * i]),
            attention.c_k(n),
            attention.c_v(n) + low_rank(n, adapters[2 * i + 1]),
        )
        q, k, v = (y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for y in products)
        length = ids.size(1)
        cos, sin = attention.rotary.cos[:length], attention.rotary.sin[:length]

        def rotate(y: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            a, b = y.chunk(2, dim=-1)
            return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

        q = (rotate(rms(q)) * attention.q_gain[:, None, None]).to(v.dtype)
        o = F.scaled_dot_product_attention(q, rotate(rms(k)).to(v.dtype), v, is_causal=True, enable_gqa=True)
        x = x + block.attn_scale * attention.proj(o.transpose(1, 2).flatten(-2))
        x = x + block.mlp_scale * block.mlp(rms(x))
        if i < model.encoders:
            stack.append(x)
    n = rms(x[:, first:])
    logits = (F.linear(n, model.tok_emb.weight) + low_rank(n, adapters[-1])).float()
    logits = model.softcap * torch.tanh(logits / model.softcap)
    losses = F.cross_entropy(logits.flatten(0, 1), targets[:, first:].flatten(), reduction="none")
    return losses.view(ids.size(0), -1)


class Peer:
    """Scores and trains batches of documents; `first_adapters` gives the initial numbers of a batch's documents."""

    def __init__(
        self,
        model: GPT,
        rows: int,
        rank: int,
        lr: float,
        first_adapters: Callable[[np.ndarray], list[Tensor]],
        *,
        natural: bool,
        dtype: torch.dtype | None,
    ) -> None:
        self.model, self.natural, self.dtype = model.requires_grad_(False), natural, dtype
        self.device = model.tok_emb.weight.device
        self.rows, self.lr, self.first_adapters = rows, lr, first_adapters
        shapes = [(block.attn.c_q.weight, block.attn.c_v.weight) for block in model.blocks]
        weights = [w for pair in shapes for w in pair] + [model.tok_emb.weight]
        self.adapters: Adapters = [
            (
                nn.Parameter(torch.zeros(rows, rank, w.size(1), device=self.device)),
                nn.Parameter(torch.zeros(rows, w.size(0), rank, device=self.device)),
            )
            for w in weights
        ]
        self.losses = torch.compile(adapted_losses, dynamic=False) if natural else adapted_losses

    def begin(self, documents: np.ndarray) -> None:
        """(rows,) the documents that a batch starts on, −1 in rows without."""
        for (a, b), numbers in zip(self.adapters, self.first_adapters(documents), strict=True):
            a.data.copy_(numbers)
            b.data.zero_()
        parameters = [p for pair in self.adapters for p in pair]
        ways = {"fused": True} if self.natural and self.device.type == "cuda" else {}
        self.optimizer = torch.optim.Adam(parameters, lr=self.lr, betas=(0.9, 0.95), eps=1e-10, **ways)

    def window(self, ids: Tensor, targets: Tensor, weights: Tensor | None, first: int) -> Tensor:
        """Losses of positions from `first` on, then, with weights (rows, T − first), one step on their weighted sum."""
        skipped = first if self.natural else 0
        with (
            torch.set_grad_enabled(weights is not None),
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None),
        ):
            losses = self.losses(self.model, self.adapters, ids, targets, skipped)
        losses = losses[:, first - skipped :]
        if weights is not None:
            self.optimizer.zero_grad()
            (losses * weights).sum().backward()
            self.optimizer.step()
        return losses.detach()
