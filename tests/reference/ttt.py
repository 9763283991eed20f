"""Test-time training as docs/spec.md §5 defines it: one document at a time, adapters as changes of whole matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tests.reference.model import ReferenceGPT, head
from tests.reference.rng import uniform
from tests.reference.shapes import layer_order


def split(tokens: npt.ArrayLike, bos_id: int) -> list[tuple[int, int]]:
    """(first token, one past the last) of each document: up to and with the next BOS token; at least 2 tokens."""
    ids = [int(token) for token in np.asarray(tokens)]
    starts = sorted({0} | {i for i, token in enumerate(ids) if token == bos_id})
    ends = [start + 1 for start in starts[1:]] + [len(ids)]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if end - start >= 2]


class AdaptedGPT(ReferenceGPT):
    """The model with a document's adapters: n·Wᵀ + n·Aᵀ·Bᵀ = n·(W + B·A)ᵀ."""

    def __init__(self, cfg: Any, state: Mapping[str, npt.ArrayLike], dtype: torch.dtype = torch.float64) -> None:
        super().__init__(cfg, state, dtype)
        self.adapters: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        """By weight and by the turn in which its layer runs: a layer's loops have adapters of their own."""
        for p in self.params.values():
            p.requires_grad_(False)

    @property
    def head_name(self) -> str:
        return "tok_emb.weight" if self.cfg.tie_embeddings else "lm_head.weight"

    def begin(self, document: int, rank: int, seed: int) -> None:
        """Adapters of a new document: A uniform ±1/√in, B = 0."""
        order = layer_order(self.cfg)
        self.adapters = {}
        products = []
        for place, i in enumerate(order):
            turn = order[:place].count(i)
            for matrix in ("c_q", "c_v"):
                name = f"blocks.{i}.attn.{matrix}"
                products.append((f"{name}.lora_a" + (f".{turn}" if turn else ""), f"{name}.weight", turn))
        products.append(("lm_head.lora_a", self.head_name, 0))
        for name, weight, turn in products:
            rows, columns = self.params[weight].shape
            a = uniform(seed, name, (rank, columns), 1 / math.sqrt(columns), document)
            b = torch.zeros(rows, rank, dtype=self.dtype)
            pair = (torch.from_numpy(a).to(self.dtype).requires_grad_(), b.requires_grad_())
            self.adapters[weight, turn] = pair

    def numbers(self) -> list[Tensor]:
        return [t for pair in self.adapters.values() for t in pair]

    def weight(self, name: str) -> Tensor:
        w = super().weight(name)
        turn = 0 if name == self.head_name else self.turn
        if (name, turn) not in self.adapters:
            return w
        a, b = self.adapters[name, turn]
        return w + b @ a

    def logits(self, ids: Any) -> Tensor:
        return head(self.hidden(ids), self.weight(self.head_name), self.cfg.logit_softcap)


def adam_step(numbers: list[Tensor], moments: list[tuple[Tensor, Tensor]], loss: Tensor, t: int, lr: float) -> None:
    """Adam with β = (0.9, 0.95) and eps 1e−10."""
    gradients = torch.autograd.grad(loss, numbers)
    with torch.no_grad():
        for p, (m, v), g in zip(numbers, moments, gradients, strict=True):
            m.mul_(0.9).add_(0.1 * g)
            v.mul_(0.95).add_(0.05 * g * g)
            p -= lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-10)


def document_losses(
    model: AdaptedGPT,
    tokens: npt.ArrayLike,
    document: int,
    *,
    rank: int = 8,
    lr: float = 0.01,
    chunk: int = 256,
    context: int = 1024,
    seed: int = 0,
) -> npt.NDArray[np.float64]:
    """The losses of all targets of one document, whose tokens and number these are."""
    ids = np.asarray(tokens, np.int64)
    targets = len(ids) - 1
    model.begin(document, rank, seed)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in model.numbers()]
    found: list[Tensor] = []
    chunks = math.ceil(targets / chunk)
    for c in range(chunks):
        begin, end = c * chunk, min((c + 1) * chunk, targets)
        start = max(0, end - context)
        losses = model.token_losses(ids[None, start:end], ids[None, start + 1 : end + 1])[0, begin - start :]
        found.append(losses.detach())
        if c < chunks - 1:
            adam_step(model.numbers(), moments, losses.mean(), c + 1, lr)
    return torch.cat(found).double().numpy()


def losses(model: AdaptedGPT, tokens: npt.ArrayLike, bos_id: int, **settings: Any) -> npt.NDArray[np.float64]:
    """The losses of all targets of a stream, (N,), document after document."""
    ids = np.asarray(tokens)
    found = [
        document_losses(model, ids[begin:end], index, **settings)
        for index, (begin, end) in enumerate(split(ids, bos_id))
    ]
    return np.concatenate(found)
