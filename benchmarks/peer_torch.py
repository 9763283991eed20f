"""The model of docs/spec.md as a competent PyTorch user writes it: what pgolf is measured against.

float32; F.scaled_dot_product_attention with grouped queries, F.rms_norm, fused AdamW, Muon with a Newton–Schulz
iteration per matrix. Parameters have docs/spec.md's names, so that state dictionaries can be exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def linear(rows: int, columns: int, *, zero: bool = False) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False)
    if zero:
        nn.init.zeros_(layer.weight)
    else:
        nn.init.orthogonal_(layer.weight)
    return layer


class Bigram(nn.Module):
    def __init__(self, buckets: int, width: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(buckets, width)
        nn.init.zeros_(self.embed.weight)
        self.proj = linear(dim, width)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def forward(self, ids: Tensor) -> Tensor:
        buckets, ids = self.embed.num_embeddings, ids.int()  # the products wrap at 32 bits
        pairs = (36313 * ids[:, 1:] ^ 27191 * ids[:, :-1]) % (buckets - 1)
        return self.scale * self.proj(self.embed(F.pad(pairs, (1, 0), value=buckets - 1)))


class Smear(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), self.gate.sigmoid())


class Rotary(nn.Module):
    def __init__(self, head_dim: int, seq_len: int, base: float = 10_000.0) -> None:
        super().__init__()
        frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * self.cos + b * self.sin, b * self.cos - a * self.sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, rotary: Rotary) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.c_q = linear(dim, dim)
        self.c_k = linear(kv_heads * self.head_dim, dim)
        self.c_v = linear(kv_heads * self.head_dim, dim)
        self.proj = linear(dim, dim, zero=True)
        self.q_gain = nn.Parameter(torch.full((heads,), 1.5))
        self.rotary = rotary

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.c_q, self.c_k, self.c_v)
        )
        q = self.rotary(rms(q)) * self.q_gain[:, None, None]
        out = F.scaled_dot_product_attention(q, self.rotary(rms(k)), v, is_causal=True, enable_gqa=True)
        return self.proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc = linear(hidden, dim)
        self.proj = linear(dim, hidden, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int, rotary: Rotary) -> None:
        super().__init__()
        self.attn = Attention(dim, heads, kv_heads, rotary)
        self.mlp = MLP(dim, hidden)
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        x = self.resid_mix[0] * x + self.resid_mix[1] * x0
        x = x + self.attn_scale * self.attn(rms(x))
        return x + self.mlp_scale * self.mlp(rms(x))


class GPT(nn.Module):
    """bigram_vocab_size 0: no bigram term."""

    def __init__(
        self,
        *,
        vocab_size: int,
        model_dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        hidden: int,
        seq_len: int,
        bigram_vocab_size: int,
        bigram_dim: int,
        softcap: float = 30.0,
    ) -> None:
        super().__init__()
        self.softcap, self.encoders = softcap, num_layers // 2
        self.tok_emb = nn.Embedding(vocab_size, model_dim)
        nn.init.normal_(self.tok_emb.weight, std=0.005)
        self.bigram = Bigram(bigram_vocab_size, bigram_dim, model_dim) if bigram_vocab_size else None
        self.smear = Smear(model_dim)
        rotary = Rotary(model_dim // num_heads, seq_len)
        self.blocks = nn.ModuleList(
            Block(model_dim, num_heads, num_kv_heads, hidden, rotary) for _ in range(num_layers)
        )
        self.skip_weights = nn.Parameter(torch.ones(self.encoders, model_dim))

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids)
        if self.bigram is not None:
            x = x + self.bigram(ids)
        x = x0 = self.smear(rms(x))
        stack = []
        for i, block in enumerate(self.blocks):
            if i >= self.encoders and stack:
                x = x + self.skip_weights[i - self.encoders] * stack.pop()
            x = block(x, x0)
            if i < self.encoders:
                stack.append(x)
        return x

    def forward(self, ids: Tensor, targets: Tensor, first: int = 0, reduction: str = "mean") -> Tensor:
        """The loss of positions first … T − 1: their mean, or with reduction "none" each, (B·(T − first),)."""
        logits = F.linear(rms(self.hidden(ids)[:, first:]), self.tok_emb.weight)
        logits = self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits.flatten(0, 1), targets[:, first:].flatten(), reduction=reduction)


def gpt_like(config: Any, seq_len: int) -> GPT:
    """The model of a pgolf [model] table."""
    names = ("vocab_size", "model_dim", "num_layers", "num_heads", "num_kv_heads", "bigram_vocab_size", "bigram_dim")
    return GPT(**{name: getattr(config, name) for name in names}, hidden=config.mlp_hidden, seq_len=seq_len)


def newton_schulz(u: Tensor, steps: int = 5) -> Tensor:
    x = u.T if u.size(0) > u.size(1) else u
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        a = x @ x.T
        b = torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, b, x, beta=3.4445)
    return x.T if u.size(0) > u.size(1) else x


class Muon(torch.optim.Optimizer):
    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].mul_(momentum).add_(p.grad)
                u = newton_schulz(p.grad.add(buffer, alpha=momentum))
                p.mul_(1 - lr * group["weight_decay"]).add_(u, alpha=-lr * max(1, p.size(0) / p.size(1)) ** 0.5)


class Training:
    """Whole training steps of a model, with the rates of the recipe `tiny` and no schedule but the momentum's."""

    def __init__(self, model: GPT, compiled: bool = False, dtype: torch.dtype | None = None) -> None:
        """dtype: of products, through autocast; None is float32."""
        self.model, self.finished, self.dtype = model, 0, dtype
        self.loss = torch.compile(model, dynamic=False) if compiled else model
        embeddings: list[Tensor] = []
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, p in model.named_parameters():
            control = p.ndim < 2 or name.endswith(("resid_mix", "skip_weights"))
            (embeddings if "emb" in name else others if control else matrices).append(p)
        self.muon = Muon(matrices, lr=0.02, momentum=0.92, weight_decay=0.04)
        self.adam = torch.optim.AdamW(
            [{"params": embeddings, "lr": 0.03}, {"params": others, "lr": 0.02}],
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.04,
            fused=True,
        )

    def step(self, ids: Tensor, targets: Tensor) -> float:
        """One step on (B, T) inputs and targets; the loss before the update."""
        return self.step_in_parts([(ids, targets)]).item()

    def step_in_parts(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """One step on micro-batches of equal size; the loss before the update."""
        total = torch.zeros((), device=parts[0][0].device)
        for ids, targets in parts:
            with torch.autocast(ids.device.type, self.dtype, enabled=self.dtype is not None):
                loss = self.loss(ids, targets) / len(parts)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.3)
        self.muon.param_groups[0]["momentum"] = 0.92 + 0.07 * min(self.finished / 100, 1)
        self.muon.step()
        self.adam.step()
        self.muon.zero_grad()
        self.adam.zero_grad()
        self.finished += 1
        return total


@torch.inference_mode()
def sliding_loss(
    model: GPT, tokens: Tensor, seq_len: int, stride: int, batch: int, compiled: Callable[..., Tensor] | None = None
) -> float:
    """The mean loss over windows of seq_len tokens, `stride` apart; each later one scores its last `stride` targets.

    compiled: the model compiled, which is given the batches of windows, but not the first one, of another shape.
    """
    total = model(tokens[None, :seq_len], tokens[None, 1 : seq_len + 1], reduction="none").double().sum()
    windows = tokens.unfold(0, seq_len + 1, stride)[1:]
    score = model if compiled is None else compiled
    for part in map(Tensor.contiguous, windows.split(batch)):
        losses = score(part[:, :-1], part[:, 1:], first=seq_len - stride, reduction="none")
        total += losses.double().sum()
    return total.item() / (seq_len + len(windows) * stride)
