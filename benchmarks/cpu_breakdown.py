"""Where each millisecond of a pgolf step goes: every operation on the step's shapes, beside its bare products.

An operation's time is its own, without moving arrays between NumPy and the backend. The products beside it are those
that its mathematics needs, in the libraries' fastest form; attention's are half of the T×T ones, for causality.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import products
from cpu_workers import Shape
from products import Product

from pgolf import ops

Array = np.ndarray


@dataclass
class Row:
    """A line of the table; `seconds` has one list of samples a variant, each with its number of calls in a step."""

    what: str
    products: list[Product] = field(default_factory=list)
    share: float = 1.0
    """Of the products, what must be computed."""
    calls: int = 0
    seconds: float = 0.0
    """Of a step."""

    def add(self, calls: int, samples: list[float]) -> None:
        self.calls += calls
        self.seconds += calls * statistics.median(samples)

    def product_seconds(self, library: Any) -> float:
        calls = max(self.calls, 1)
        return calls * self.share * products.total_seconds(library, self.products)


class Bench:
    """Random tensors of one micro-batch, and the rows measured on them."""

    def __init__(self, shape: Shape, sequences: int, parts: int, state: dict[str, Array], repeats: int) -> None:
        self.shape, self.B, self.parts, self.state, self.repeats = shape, sequences, parts, state, repeats
        self.rng = np.random.default_rng(0)
        self.rows: list[Row] = []

    def array(self, *sides: int) -> Array:
        return self.rng.standard_normal(sides, dtype=np.float32)

    def tokens(self) -> Array:
        return self.rng.integers(0, self.shape.vocab_size, (self.B, self.shape.seq_len), dtype=np.int32)

    def row(self, what: str, needed: list[Product] | None = None, share: float = 1.0) -> Row:
        self.rows.append(Row(what, needed or [], share))
        return self.rows[-1]

    def measure(self, *steps: tuple[Row, int, Callable[[Any], Any]]) -> None:
        """Calls the steps in turn, each with what the one before returned, and adds their times to their rows."""
        samples: list[list[float]] = [[] for _ in steps]
        with ops.timed() as seconds:
            for _ in range(self.repeats + 1):
                passed = None
                for taken, (_, _, step) in zip(samples, steps, strict=True):
                    passed = step(passed)
                    taken.append(seconds())
        for taken, (row, calls, _) in zip(samples, steps, strict=True):
            row.add(calls, taken[1:])

    # ---- The model's operations; N tokens a micro-batch.

    def model(self) -> None:
        s, B, N = self.shape, self.B, self.B * self.shape.seq_len
        d, T, F, V, e = s.model_dim, s.seq_len, s.hidden, s.vocab_size, s.bigram_dim
        D, state = d // s.num_heads, self.state
        width = d + 2 * s.num_kv_heads * D
        layers, encoders = s.num_layers, s.num_layers // 2

        def forward(rows: int, columns: int) -> list[Product]:
            return [Product(N, rows, columns, transpose_b=True)]

        def backward(rows: int, columns: int) -> list[Product]:
            return [Product(N, columns, rows), Product(rows, columns, N, transpose_a=True)]

        bigram = [state[f"bigram.{name}"] for name in ("embed.weight", "proj.weight", "scale")]
        ids, x = self.tokens(), self.array(B, T, d)
        self.measure(
            (
                self.row("embedding, forward", forward(d, e)),
                self.parts,
                lambda _: ops.embed(ids, state["tok_emb.weight"], state["smear.gate"], *bigram)[1],
            ),
            (self.row("embedding, backward", backward(d, e)), self.parts, lambda saved: ops.embed_backward(saved, x)),
        )

        qkv_rows = [self.row("q, k, v, forward", forward(width, d)), self.row("q, k, v, backward", backward(width, d))]
        self.attention(D)
        out_rows = [
            self.row("attention out, forward", forward(d, d)),
            self.row("attention out, backward", backward(d, d)),
        ]
        angle = self.array(T, D // 2)
        heads = [self.array(B, T, n, D) for n in (s.num_heads, s.num_kv_heads, s.num_kv_heads)]
        weights = [state[f"blocks.0.attn.c_{name}.weight"] for name in "qkv"]
        proj = state["blocks.0.attn.proj.weight"]
        # A block's input may have a skip, its gradient what came back through one: each kind takes its own time.
        kinds = Counter((encoders <= i < 2 * encoders, 1 <= i <= encoders) for i in range(layers))
        for (has_skip, has_pending), count in kinds.items():
            skip = (self.array(B, T, d), self.array(d)) if has_skip else ()
            mixed = ops.MixedInput(x, self.array(B, T, d), self.array(2, d), *skip)
            pending = self.array(B, T, d) if has_pending else None
            a, calls = self.array(B, T, d), count * self.parts
            self.measure(
                (qkv_rows[0], calls, lambda _, m=mixed: ops.qkv(m, *weights, np.cos(angle), np.sin(angle))[1]),
                (qkv_rows[1], calls, lambda saved, p=pending: ops.qkv_backward(saved, *heads, dm=x, pending=p)),
            )
            self.measure(
                (out_rows[0], calls, lambda _, m=mixed, a=a: ops.project_residual(m, a, proj)[1]),
                (out_rows[1], calls, lambda saved: ops.project_residual_backward(saved, x)),
            )

        calls, h = layers * self.parts, np.maximum(self.array(B, T, F), 0) ** 2
        up, out = state["blocks.0.mlp.fc.weight"], state["blocks.0.mlp.proj.weight"]
        self.measure(
            (self.row("mlp up, forward", forward(F, d)), calls, lambda _: ops.mlp_up(x, up)[1]),
            (self.row("mlp up, backward", backward(F, d)), calls, lambda saved: ops.mlp_up_backward(saved, h)),
        )
        self.measure(
            (
                self.row("mlp out, forward", forward(d, F)),
                calls,
                lambda _: ops.project_residual(x, h, out)[1],
            ),
            (
                self.row("mlp out, backward", backward(d, F)),
                calls,
                lambda saved: ops.project_residual_backward(saved, x, h_scale=1.0),
            ),
        )
        self.measure(
            (
                self.row("head and loss, both", forward(V, d) + backward(V, d)),
                self.parts,
                lambda _: ops.head_loss_backward(x, state["tok_emb.weight"], ids),
            )
        )
        finish = self.row("projections' ends")
        for name, s_name in (("attn.proj.weight", "attn_scale"), ("mlp.proj.weight", "mlp_scale")):
            w, w_scale = state[f"blocks.0.{name}"], state[f"blocks.0.{s_name}"]
            self.measure((finish, layers, lambda _, w=w, c=w_scale: ops.finish_projection(w, c, w)))

    def attention(self, D: int) -> None:
        s, T = self.shape, self.shape.seq_len
        q, k, v = (self.array(self.B, T, n, D) for n in (s.num_heads, s.num_kv_heads, s.num_kv_heads))
        heads, calls = self.B * s.num_heads, s.num_layers * self.parts
        scores = Product(T, T, D, transpose_b=True, count=heads)  # q·kᵀ, do·vᵀ
        values = Product(T, D, T, count=heads)  # p·v, ds·k
        columns = Product(T, D, T, transpose_a=True, count=heads)  # pᵀ·do, dsᵀ·q
        forward = self.row("attention, forward", [scores, values], share=0.5)
        backward = self.row("attention, backward", [scores, scores, values, columns, columns], share=0.5)
        self.measure(
            (forward, calls, lambda _: ops.attention(q, k, v, self.state["blocks.0.attn.q_gain"])[1]),
            (backward, calls, lambda saved: ops.attention_backward(saved, q)),
        )

    # ---- The optimizer's.

    def optimizer(self) -> None:
        def is_matrix(name: str) -> bool:
            return name.endswith("weight") and "emb" not in name

        matrices = [w for name, w in self.state.items() if is_matrix(name)]
        others = [w for name, w in self.state.items() if not is_matrix(name)]
        self.measure((self.row("gradient norm"), 1, lambda _: ops.grad_norm([*matrices, *others])))
        squares = [w * w for w in others]
        self.measure((self.row("AdamW"), 1, lambda _: ops.adam(others, others, others, squares, step=9, lr=0.01)))

        needed = []
        for (rows, columns), count in Counter(w.shape for w in matrices).items():
            r, c = sorted((rows, columns))
            gram = Product(r, r, c, transpose_b=True, count=5 * count, symmetric=True)
            square = Product(r, r, r, transpose_b=True, count=5 * count, symmetric=True)
            needed += [gram, square, Product(r, c, r, count=5 * count)]
        muon = self.row("Muon", needed)
        self.measure((muon, 1, lambda _: ops.muon(matrices, matrices, matrices, lr=0.01)))


def breakdown(shape: Shape, trainer: Any, step: Callable[[], float], repeats: int, threads: int) -> str:
    """The table, as Markdown, and the time of whole steps beside its sum."""
    step()
    whole = statistics.median(step() for _ in range(repeats))
    sequences = min(trainer.micro_batch_seqs, shape.step_tokens // shape.seq_len)
    parts = shape.step_tokens // (sequences * shape.seq_len)
    bench = Bench(shape, sequences, parts, trainer.model.state_dict(), repeats)
    bench.model()
    bench.optimizer()

    libraries = [products.OpenBLAS(threads), products.Torch(threads)]
    lines = [
        "| operation | calls a step | pgolf, ms | products, ms: OpenBLAS | torch | pgolf beyond the faster, ms |",
        "| --- |" + " ---: |" * 5,
    ]
    totals = [0.0] * 4

    def line(what: str, calls: object, *seconds: float) -> None:
        lines.append(f"| {what} | {calls} | " + " | ".join(f"{1e3 * value:.1f}" for value in seconds) + " |")

    for row in bench.rows:
        bare = [row.product_seconds(library) for library in libraries]
        numbers = [row.seconds, *bare, row.seconds - min(bare)]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        line(row.what, row.calls, *numbers)
    line("sum", "", *totals)
    lines.append(f"\nA whole step takes {1e3 * whole:.1f} ms, {shape.step_tokens / whole:,.0f} tok/s.")
    return "\n".join(lines)
