"""Every operation of pgolf on the base recipe's shapes, beside what the libraries and PyTorch take for the same work.

    python benchmarks/ops.py                               # all, for 65,536 tokens; PyTorch's compiled: minutes
    python benchmarks/ops.py --peer eager                  # sooner
    python benchmarks/ops.py --only qkv,attention,head
    python benchmarks/ops.py --quick --device cpu          # does it run?

benchmarks/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import common
import numpy as np
import peer_torch
import torch
import torch.nn.functional as F
from common import Work
from products import Product

from pgolf import ops
from pgolf.model import GPT

Array = np.ndarray
TOKENS, REPEATS = 65_536, 20


@dataclass
class Row:
    """An operation, or its backward.

    flop, bytes: its useful arithmetic, and what must cross the memory: every tensor of tokens × something once.
    seconds: pgolf's. library: those of the bare products (cuBLAS) or of the bare attention (cuDNN). peer: PyTorch's.
    """

    name: str
    flop: float
    bytes: float
    seconds: float
    library: float | None = None
    peer: float | None = None

    def share(self, tflops: float, tb_per_s: float) -> float:
        """Of the least time that its arithmetic or its memory asks for, whichever is longer."""
        return max(self.flop / (tflops * 1e12), self.bytes / (tb_per_s * 1e12)) / self.seconds


@dataclass
class Bench:
    """The shapes, random tensors, and the rows measured on them."""

    work: Work
    args: argparse.Namespace
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        c = self.work.config
        self.c, self.T, self.B = c, self.work.length, max(1, self.args.tokens // self.work.length)
        self.N, self.d, self.hidden, self.V = self.B * self.T, c.model_dim, c.mlp_hidden, c.vocab_size
        self.D = self.d // c.num_heads
        self.kv = c.num_kv_heads * self.D
        self.S = 4 if self.args.dtype == "float32" else 2  # bytes of a stored number
        self.rng = np.random.default_rng(0)
        self.device, self.torch_dtype = self.args.device, getattr(torch, self.args.dtype)

    # ---- Measuring

    def draw(self, *shape: int, scale: float = 1.0) -> Array:
        return np.float32(scale) * self.rng.standard_normal(shape, dtype=np.float32)

    def weight(self, rows: int, columns: int) -> Array:
        return self.draw(rows, columns, scale=columns**-0.5)

    def tokens(self) -> Array:
        return self.rng.integers(0, self.V, (self.B, self.T), dtype=np.int32)

    def here(self, array: Array, master: bool = False) -> torch.Tensor:
        """A tensor of PyTorch's; master: float32, as vectors and losses are."""
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        return tensor if master or not tensor.is_floating_point() else tensor.to(self.torch_dtype)

    def pgolf(self, *steps: Callable[[Any], Any]) -> list[float]:
        """Seconds of each step, which is given what the one before returned."""
        times, passed = [], None
        with ops.timed(self.args.repeats) as seconds:
            for step in steps:
                passed = step(passed)
                times.append(seconds())
        return times

    def mean(self, call: Callable[[], object]) -> float:
        return common.mean_seconds(call, self.device, 0.01 if self.args.quick else 0.1)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.args.peer == "eager":
            return function
        torch._dynamo.reset()
        return torch.compile(function, dynamic=False)

    def peer(self, function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> tuple[float, float]:
        """Seconds of PyTorch's forward, with what its backward needs, and of both together."""
        leaves = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
        wanted = [t for t in leaves if t.requires_grad]
        call = self.compiled(function)
        outputs = call(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.randn_like(out) for out in outputs]

        def both() -> object:
            found = call(*leaves)
            return torch.autograd.grad(found if isinstance(found, tuple) else (found,), wanted, upstream)

        return self.mean(lambda: call(*leaves)), self.mean(both)

    def library(self, products: Sequence[Product]) -> float:
        """Seconds of bare products in the storage dtype."""
        total = 0.0
        for p in products:
            a, b = (self.here(self.draw(*shape)) for shape in p.operand_shapes())
            a, b = a.T if p.transpose_a else a, b.T if p.transpose_b else b
            out = torch.empty(p.m, p.n, device=self.device, dtype=self.torch_dtype)
            total += p.count * self.mean(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
        return total

    def linear(self, rows: int, columns: int) -> tuple[list[Product], list[Product]]:
        """The products of y = x·wᵀ and of its two gradients."""
        forward = [Product(self.N, rows, columns, transpose_b=True)]
        return forward, [Product(self.N, columns, rows), Product(rows, columns, self.N, transpose_a=True)]

    def add(
        self,
        name: str,
        forward: tuple[float, float],
        backward: tuple[float, float],
        steps: tuple[Callable[[Any], Any], Callable[[Any], Any]],
        peer: Callable[..., Any],
        inputs: Sequence[torch.Tensor],
        library: tuple[float, float],
    ) -> None:
        """Two rows: (flop, bytes) of each direction, pgolf's calls, and what stands beside them."""
        seconds = self.pgolf(*steps)
        first, both = self.peer(peer, inputs)
        for what, cost, mine, bare, theirs in (
            ("forward", forward, seconds[0], library[0], first),
            ("backward", backward, seconds[1], library[1], both - first),
        ):
            self.show(Row(f"{name}, {what}", *cost, mine, bare, theirs))

    def show(self, row: Row) -> None:
        self.rows.append(row)
        print(f"{row.name}: {row.seconds * 1e6:,.1f} µs", flush=True)

    # ---- The model's operations

    def embed(self) -> None:
        n, e, N, d = self.c.bigram_vocab_size, self.c.bigram_dim, self.N, self.d
        ids, tables = self.tokens(), (self.draw(self.V, d), self.draw(n, e), self.weight(d, e))
        gate, scale, dx = self.draw(d), np.float32(0.05), self.draw(self.B, self.T, d)
        forward, backward = self.linear(d, e)

        def natural(
            ids: torch.Tensor, emb: torch.Tensor, table: torch.Tensor, proj: torch.Tensor, gate: torch.Tensor
        ) -> torch.Tensor:
            pairs = (36313 * ids[:, 1:] ^ 27191 * ids[:, :-1]) % (n - 1)
            x = F.embedding(ids, emb) + 0.05 * F.linear(F.embedding(F.pad(pairs, (1, 0), value=n - 1), table), proj)
            x = peer_torch.rms(x)
            return torch.lerp(x, F.pad(x[:, :-1], (0, 0, 1, 0)), gate.sigmoid().to(x.dtype))

        self.add(
            "embed",
            (2.0 * N * d * e, self.S * N * d),
            (4.0 * N * d * e, self.S * N * d + 8.0 * (self.V * d + n * e)),
            (
                lambda _: ops.embed(ids, tables[0], gate, tables[1], tables[2], scale)[1],
                lambda saved: ops.embed_backward(saved, dx),
            ),
            natural,
            [self.here(ids), *map(self.here, tables), self.here(gate, master=True)],
            (self.library(forward), self.library(backward)),
        )

    def qkv(self) -> None:
        N, d, width = self.N, self.d, self.d + 2 * self.kv
        x, x0, mix = self.draw(self.B, self.T, d), self.draw(self.B, self.T, d), self.draw(2, d)
        weights = [self.weight(rows, d) for rows in (d, self.kv, self.kv)]
        rotary = peer_torch.Rotary(self.D, self.T)
        cos, sin = (table.numpy() for table in (rotary.cos, rotary.sin))
        heads = [self.draw(self.B, self.T, n, self.D) for n in (d // self.D, self.kv // self.D, self.kv // self.D)]
        rotary = rotary.to(self.device)
        forward, backward = self.linear(width, d)

        def natural(
            x: torch.Tensor, x0: torch.Tensor, mix: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            mix = mix.to(x.dtype)
            n = peer_torch.rms(mix[0] * x + mix[1] * x0)
            q, k, v = (F.linear(n, w).unflatten(-1, (-1, self.D)).transpose(1, 2) for w in (q, k, v))
            q, k = (rotary(peer_torch.rms(t)).to(x.dtype) for t in (q, k))
            return q, k, v

        self.add(
            "qkv",
            (2.0 * N * d * width, self.S * N * (2 * d + width)),
            (4.0 * N * d * width, self.S * N * (4 * d + width) + 8.0 * N * d),
            (
                lambda _: ops.qkv(ops.MixedInput(x, x0, mix), *weights, cos, sin)[1],
                lambda saved: ops.qkv_backward(saved, *heads, dm=x),
            ),
            natural,
            [self.here(x), self.here(x0), self.here(mix, master=True), *map(self.here, weights)],
            (self.library(forward), self.library(backward)),
        )

    def attention(self) -> None:
        N, d, kv = self.N, self.d, self.kv
        q, k, v = (self.draw(self.B, self.T, n // self.D, self.D) for n in (d, kv, kv))
        q, k = (x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True)) for x in (q, k))
        gain = np.full(d // self.D, 1.5, np.float32)
        leaves = [self.here(t).transpose(1, 2) for t in (q, k, v)]

        def bare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def natural(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
            return bare(q * gain.to(q.dtype)[:, None, None], k, v)

        wanted = [t.detach().requires_grad_() for t in leaves]
        upstream = torch.randn_like(bare(*wanted))
        first = self.mean(lambda: bare(*wanted))
        both = self.mean(lambda: torch.autograd.grad(bare(*wanted), wanted, upstream))
        products = 2.0 * N * self.T * d  # of the forward's two, over the half of the keys that a query sees
        self.add(
            "attention",
            (products, self.S * N * (2 * d + 2 * kv)),
            (2.5 * products, self.S * N * (4 * d + 4 * kv)),  # five: q·kᵀ must be computed again
            (lambda _: ops.attention(q, k, v, gain, normed=True)[1], lambda saved: ops.attention_backward(saved, q)),
            natural,
            [*(t.detach() for t in leaves), self.here(gain, master=True)],
            (first, both - first),
        )

    def project_residual(self) -> None:
        self.project("attention out", self.d, mixed=True)
        self.project("mlp out", self.hidden, mixed=False)

    def project(self, name: str, width: int, mixed: bool) -> None:
        N, d = self.N, self.d
        x, x0, mix = self.draw(self.B, self.T, d), self.draw(self.B, self.T, d), self.draw(2, d)
        a, w = self.draw(self.B, self.T, width), self.weight(d, width)
        # The slope of ReLU² is taken here, by PyTorch in mlp_up's backward: their sum compares like with like.
        h_scale = 0.0 if mixed else 1.0
        a = a if mixed else np.maximum(a, 0) ** 2
        there, there0, mix_there = self.here(x), self.here(x0), self.here(mix)
        residual = ops.MixedInput(x, x0, mix) if mixed else x
        forward, backward = self.linear(d, width)

        def natural(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            # The residual's own gradient is the upstream one: neither pgolf nor this computes it here.
            return (mix_there[0] * there + mix_there[1] * there0 if mixed else there) + F.linear(a, w)

        self.add(
            f"project_residual ({name})",
            (2.0 * N * d * width, self.S * N * (width + (3 if mixed else 2) * d)),
            (4.0 * N * d * width, self.S * N * (2 * width + d)),
            (
                lambda _: ops.project_residual(residual, a, w)[1],
                lambda saved: ops.project_residual_backward(saved, x, h_scale=h_scale),
            ),
            natural,
            [self.here(a), self.here(w)],
            (self.library(forward), self.library(backward)),
        )

    def mlp_up(self) -> None:
        N, d, hidden = self.N, self.d, self.hidden
        x, w, du = self.draw(self.B, self.T, d), self.weight(hidden, d), self.draw(self.B, self.T, hidden)
        forward, backward = self.linear(hidden, d)
        self.add(
            "mlp_up",
            (2.0 * N * d * hidden, self.S * N * (d + hidden)),
            (4.0 * N * d * hidden, self.S * N * (3 * d + hidden)),
            (lambda _: ops.mlp_up(x, w)[1], lambda saved: ops.mlp_up_backward(saved, du)),
            lambda x, w: F.relu(F.linear(peer_torch.rms(x), w)).square(),
            [self.here(x), self.here(w)],
            (self.library(forward), self.library(backward)),
        )

    def head(self) -> None:
        N, d, V = self.N, self.d, self.V
        x, w, targets = self.draw(self.B, self.T, d), self.weight(V, d), self.tokens()
        forward, backward = self.linear(V, d)
        labels = self.here(targets).long().flatten()

        def natural(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            logits = 30 * torch.tanh(F.linear(peer_torch.rms(x), w).float() / 30)
            return F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")

        first, both = self.peer(natural, [self.here(x), self.here(w)])
        bare = self.library(forward), self.library(backward)
        (loss,) = self.pgolf(lambda _: ops.head_loss(x, w, targets))
        (all_of_it,) = self.pgolf(lambda _: ops.head_loss_backward(x, w, targets))
        self.show(Row("head, losses", 2.0 * N * d * V, self.S * N * d, loss, bare[0], first))
        self.show(Row("head, both ways", 6.0 * N * d * V, 2.0 * self.S * N * d, all_of_it, sum(bare), both))

    # ---- The optimizer's

    def parameters(self) -> tuple[list[Array], list[Array]]:
        """The whole model's: matrices, which Muon takes, and the rest."""
        state = GPT(self.c, seed=1, device="cpu").state_dict()
        matrices = {n for n, w in state.items() if w.ndim == 2 and n.endswith("weight") and "emb" not in n}
        return [w for n, w in state.items() if n in matrices], [w for n, w in state.items() if n not in matrices]

    def grad_norm(self) -> None:
        weights = [*self.parameters()[0], *self.parameters()[1]]
        parameters = [torch.nn.Parameter(self.here(w, master=True)) for w in weights]
        for p in parameters:
            p.grad = torch.randn_like(p)
        (seconds,) = self.pgolf(lambda _: ops.grad_norm(weights, 0.3))
        peer = self.mean(lambda: torch.nn.utils.clip_grad_norm_(parameters, 0.3))
        self.show(Row("grad_norm", 0.0, 4.0 * sum(w.size for w in weights), seconds, None, peer))

    def adam(self) -> None:
        weights = self.parameters()[1]
        squares = [w * w for w in weights]
        (seconds,) = self.pgolf(lambda _: ops.adam(weights, weights, weights, squares, step=9, lr=0.01))
        parameters = [torch.nn.Parameter(self.here(w, master=True)) for w in weights]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer = torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.95), weight_decay=0.04, fused=True)
        peer = self.mean(optimizer.step)
        self.show(Row("adam", 0.0, 28.0 * sum(w.size for w in weights), seconds, None, peer))

    def newton_schulz_flop(self, shape: tuple[int, ...]) -> float:
        """Five iterations; symmetric products half."""
        r, c = sorted(shape)
        return 5.0 * (r * r * c + r**3 + 2.0 * r * r * c)

    def batched_newton_schulz(self, matrices: list[Array]) -> float:
        """Seconds of the products, batched by shape."""
        total = 0.0
        for shape, count in Counter(tuple(sorted(w.shape)) for w in matrices).items():
            x = self.here(self.draw(count, *shape, scale=shape[1] ** -0.5))

            def run(x: torch.Tensor = x) -> None:
                gram = torch.bmm(x, x.mT)
                torch.baddbmm(x, torch.baddbmm(gram, gram, gram), x)

            total += 5 * self.mean(run)
        return total

    def muon(self) -> None:
        matrices = self.parameters()[0]
        (seconds,) = self.pgolf(lambda _: ops.muon(matrices, matrices, matrices, lr=0.01))
        parameters = [torch.nn.Parameter(self.here(w, master=True)) for w in matrices]
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer = peer_torch.Muon(parameters, lr=0.02, momentum=0.95, weight_decay=0.04)
        peer = self.mean(optimizer.step)
        flop = math.fsum(self.newton_schulz_flop(w.shape) for w in matrices)
        moved = 20.0 * sum(w.size for w in matrices)
        self.show(Row("muon", flop, moved, seconds, self.batched_newton_schulz(matrices), peer))

    def newton_schulz(self) -> None:
        u = self.draw(self.hidden, self.d)
        (seconds,) = self.pgolf(lambda _: ops.newton_schulz(u))
        there = self.here(u, master=True)
        with torch.no_grad():
            peer = self.mean(lambda: peer_torch.newton_schulz(there))
        flop, bare = self.newton_schulz_flop(u.shape), self.batched_newton_schulz([u])
        self.show(Row("newton_schulz, one matrix", flop, 8.0 * u.size, seconds, bare, peer))

    # ---- Weights

    def working_copy(self) -> None:
        w, scale = self.draw(self.d, self.hidden), self.draw(self.d)
        (seconds,) = self.pgolf(lambda _: ops.working_copy(w, scale))
        call, there = self.compiled(lambda w, s: (s[:, None] * w).to(self.torch_dtype)), self.here(w, master=True)
        factors = self.here(scale, master=True)
        peer = self.mean(lambda: call(there, factors))
        self.show(Row("working_copy, one matrix", 0.0, (4.0 + self.S) * w.size, seconds, None, peer))

    def quantise(self) -> None:
        w = self.draw(self.d, self.hidden)
        (seconds,) = self.pgolf(lambda _: ops.quantize_rows(w, 15))

        def natural(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            scale = (w.abs().amax(dim=1) / 15).clamp_min(1e-12).half().clamp_min(torch.finfo(torch.float16).tiny)
            return (w / scale.float()[:, None]).round().clamp(-16, 15).to(torch.int8), scale

        call, there = self.compiled(natural), self.here(w, master=True)
        peer = self.mean(lambda: call(there))
        self.show(Row("quantise rows, one matrix", 0.0, 5.0 * w.size, seconds, None, peer))


OPERATIONS = (
    "embed", "qkv", "attention", "project_residual", "mlp_up", "head",
    "grad_norm", "adam", "muon", "newton_schulz", "working_copy", "quantise",
)  # fmt: skip


def table(rows: Sequence[Row], tflops: float, tb_per_s: float) -> str:
    """The rows as Markdown; ratios say how many times as long the other takes."""
    lines = [
        "| operation | µs | TFLOP/s | GB/s | of the limit | library, µs | ratio | PyTorch, µs | ratio |",
        "| --- |" + " ---: |" * 8,
    ]

    def beside(seconds: float | None, row: Row) -> str:
        return " | " if seconds is None else f"{seconds * 1e6:,.1f} | {seconds / row.seconds:.2f}"

    for row in rows:
        rate = f"{row.flop / row.seconds / 1e12:.3g}" if row.flop else ""
        lines.append(
            f"| {row.name} | {row.seconds * 1e6:,.1f} | {rate} | {row.bytes / row.seconds / 1e9:,.0f} | "
            f"{row.share(tflops, tb_per_s):.0%} | {beside(row.library, row)} | {beside(row.peer, row)} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(OPERATIONS), help=f"some of: {', '.join(OPERATIONS)}")
    parser.add_argument("--peer", choices=("eager", "compiled"), default="compiled", help="PyTorch's way")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="of pgolf's operations, in a row")
    common.add_common_arguments(parser)
    args = parser.parse_args(arguments)
    chosen = [name for name in args.only.split(",") if name]
    if unknown := [name for name in chosen if name not in OPERATIONS]:
        parser.error(f"--only has {', '.join(unknown)}; expected some of {', '.join(OPERATIONS)}")
    if args.quick:
        args.tokens, args.repeats, args.peer = 64, 1, "eager"
    common.resolve(args)

    result = common.new_result(args)
    work = common.WORK["base"].quick() if args.quick else common.WORK["base"]
    bench = Bench(work, args)
    with ops.on(args.device, args.dtype):
        for name in chosen:
            getattr(bench, name)()
    rates = result["machine"]["limit_tflops"], result["machine"]["copy_tb_per_s"]
    result |= {
        "tokens": bench.N,
        "peer": args.peer,
        "rows": [{**vars(row), "share_of_limit": row.share(*rates)} for row in bench.rows],
        "table": table(bench.rows, *rates),
    }
    print("\n" + result["table"])
    common.write_result(result, "ops", args.out, args.quick)


if __name__ == "__main__":
    main()
