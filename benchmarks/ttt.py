"""Test-time training beside PyTorch: documents/s, tokens/s, ratios, with the same weights on the same documents.

    python benchmarks/ttt.py                       # pgolf, compiled and eager PyTorch on one GPU: some minutes
    python benchmarks/ttt.py --data data/books --out result.json
    python benchmarks/ttt.py --quick --device cpu  # does it run?

benchmarks/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import peer_torch
import peer_ttt
import torch

from pgolf import ops
from pgolf.config import ModelConfig
from pgolf.data.folder import load_tokens
from pgolf.model import GPT
from pgolf.scoring.audit import document_starts
from pgolf.scoring.ttt import Documents, Part, Settings, plan, score

BOS = 1  # of the books' tokenizer, and of the public ones
QUICK = {"num_layers": 2, "model_dim": 64, "num_heads": 2, "num_kv_heads": 1, "bigram_vocab_size": 64, "bigram_dim": 16}
# Of the mean loss of all targets, and of a document's.
AGREEMENT = {"float32": (1e-5, 1e-4), "bfloat16": (2e-3, 2e-2)}


def documents_of(args: argparse.Namespace, config: ModelConfig) -> np.ndarray:
    """A stream: the folder's validation documents, or random ones as long as the books' (2,155 tokens on average)."""
    if args.data:
        tokens = load_tokens(args.data, split="val", vocab_size=config.vocab_size)
        ends = np.append(document_starts(tokens, BOS), tokens.size)
        return np.asarray(tokens[: ends[min(args.documents, ends.size - 1)]])
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(7.4, 0.75, args.documents), 2, 20_000).astype(int)
    lengths = np.maximum(lengths // 8, 2) if args.quick else lengths
    parts = [np.concatenate([[BOS], rng.zipf(1.3, n - 1) % (config.vocab_size - 2) + 2]) for n in lengths]
    return np.concatenate(parts).astype(np.uint16)


def weights_of(model: GPT) -> dict[str, np.ndarray]:
    """As trained weights are, no matrix zero."""
    rng = np.random.default_rng(1)
    return {
        name: value if value.any() else rng.normal(0, 0.02, value.shape).astype(value.dtype)
        for name, value in model.state_dict().items()
    }


def first_adapters(
    config: ModelConfig, documents: Documents, settings: Settings, device: str
) -> Callable[[np.ndarray], list[torch.Tensor]]:
    """The a's that pgolf draws, of each block's q and v, then of the head; ready on the device for every batch."""
    blocks = [f"blocks.{i}.attn.{name}" for i in range(config.num_layers) for name in ("c_q", "c_v")]

    shape = (settings.batch, settings.rank, config.model_dim)
    size, bound = settings.rank * config.model_dim, config.model_dim**-0.5
    zeros = np.zeros((settings.batch, size), np.float32)

    def draw(rows: np.ndarray) -> list[torch.Tensor]:
        found = []
        for name in [*blocks, "lm_head"]:
            ways: dict[str, Any] = {"names": [f"{name}.lora_a"], "a_size": size, "bound": bound, "seed": settings.seed}
            numbers = ops.adapters_begin(zeros, zeros, zeros, rows, **ways)
            found.append(torch.from_numpy(numbers.w.reshape(shape)).to(device))
        return found

    parts = (part for part in plan(documents, settings, settings.batch) if part.chunk == 0)
    batches = {row.tobytes(): draw(row) for row in (rows_of(part, documents, settings.batch) for part in parts)}
    return lambda rows: batches.get(rows.tobytes()) or draw(rows)


def rows_of(part: Part, documents: Documents, rows: int) -> np.ndarray:
    """(rows,) the document of each row, −1 where there is none."""
    numbers = np.full(rows, -1)
    numbers[part.rows] = documents.index[part.documents]
    return numbers


def peer_losses(peer: peer_ttt.Peer, tokens: np.ndarray, documents: Documents, settings: Settings) -> np.ndarray:
    """All losses, (N,) float32, by the plan that pgolf follows too."""
    stream = torch.from_numpy(tokens.astype(np.int64)).to(peer.device)
    out = torch.zeros(tokens.size - 1, device=peer.device)
    for part in plan(documents, settings, settings.batch):
        if part.chunk == 0:
            peer.begin(rows_of(part, documents, peer.rows))
        ids, targets, at, weights = gather(stream, part, peer.rows)
        losses = peer.window(ids, targets, weights if part.trains.any() else None, part.window.first)
        scored = at[:, part.window.first :] >= 0
        out[at[:, part.window.first :][scored]] = losses[scored]
    return out.cpu().numpy()


def gather(
    stream: torch.Tensor, part: Part, rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets, each scored position's target in the stream (−1 elsewhere), and weights of the positions."""
    length, first = part.window.length, part.window.first
    positions = np.arange(length)
    inside = positions < part.scored[:, 1:]
    at = np.where(inside, part.start[:, None] + positions, 0)
    source = np.zeros((rows, length), np.int64)
    source[part.rows] = at
    scored = inside & (positions >= part.scored[:, :1])
    goals = np.full((rows, length), -1)
    goals[part.rows] = np.where(scored, at, -1)
    counts = part.scored[:, 1] - part.scored[:, 0]
    weights = np.zeros((rows, length - first), np.float32)
    weights[part.rows] = np.where(part.trains[:, None], scored[:, first:] / counts[:, None], 0)
    index, goal, factor = (torch.from_numpy(a).to(stream.device) for a in (source, goals, weights))
    return stream[index], stream[index + 1], goal, factor


def first_of_each_window(documents: Documents, settings: Settings) -> Documents:
    """A batch that sees every length of window, with and without training: for compilation."""
    order = np.argsort(documents.targets)[-settings.batch :]
    most = settings.context + 2 * settings.chunk
    return Documents(documents.index[order], documents.start[order], np.minimum(documents.targets[order], most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder with validation shards")
    parser.add_argument("--documents", type=int, default=512)
    parser.add_argument("--peers", default="natural,eager", help="from: natural, eager")
    parser.add_argument("--repeats", type=int, default=3)
    common.add_common_arguments(parser)
    args = parser.parse_args()
    common.resolve(args)
    device = args.device
    settings = Settings()
    if args.quick:
        args.documents, args.repeats = 6, 1
        settings = Settings(rank=4, chunk=32, context=128, batch=8)

    config = ModelConfig(**QUICK) if args.quick else common.WORK["pr289"].config
    model = GPT(config, seed=1, device=device, dtype=args.dtype)
    state = weights_of(model)
    model.load_state_dict(state)
    tokens = documents_of(args, config)
    starts = document_starts(tokens, BOS)
    documents = Documents.of(starts, tokens.size - 1)
    result: dict[str, Any] = {
        **common.new_result(args),
        "documents": int(documents.start.size),
        "targets": int(documents.targets.sum()),
        "chunks": int(documents.chunks(settings.chunk).sum()),
        "programs": {},
    }
    print(", ".join(f"{result[key]:,} {key}" for key in ("documents", "targets", "chunks")), flush=True)

    def measure(name: str, run: Callable[[], np.ndarray], warm_up: Callable[[], object]) -> np.ndarray:
        began = time.perf_counter()
        warm_up()
        common.synchronize(device)
        prepared, found = time.perf_counter() - began, []
        times = common.each_second(lambda: found.append(run()), device, args.repeats)
        losses, seconds = found[-1], float(np.median(times))
        result["programs"][name] = {
            "seconds": times,
            "warm_up_seconds": prepared,
            "documents_per_second": result["documents"] / seconds,
            "tokens_per_second": result["targets"] / seconds,
            "loss": float(losses.mean(dtype=np.float64)),
        }
        print(
            f"{name}: {seconds:.2f} s, {result['documents'] / seconds:,.0f} documents/s, "
            f"{result['targets'] / seconds:,.0f} tokens/s, loss {losses.mean(dtype=np.float64):.5f}",
            flush=True,
        )
        return losses

    warm = first_of_each_window(documents, settings)
    found = measure(
        "pgolf",
        lambda: score(model, tokens, documents, settings)[0],
        lambda: score(model, tokens, warm, settings),
    )
    names = [name for name in args.peers.split(",") if name]
    for name in names:
        peer_model = peer_torch.GPT(
            vocab_size=config.vocab_size,
            model_dim=config.model_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            hidden=config.mlp_hidden,
            seq_len=settings.context,
            bigram_vocab_size=config.bigram_vocab_size,
            bigram_dim=config.bigram_dim,
        )
        peer_model.load_state_dict({key: torch.from_numpy(np.asarray(value)) for key, value in state.items()})
        peer = peer_ttt.Peer(
            peer_model.to(device),
            settings.batch,
            settings.rank,
            settings.lr,
            first_adapters(config, documents, settings, device),
            natural=name == "natural",
            dtype=common.autocast_dtype(args.dtype),
        )
        losses = measure(
            name,
            lambda peer=peer: peer_losses(peer, tokens, documents, settings),
            lambda peer=peer: peer_losses(peer, tokens, warm, settings),
        )
        check_agreement(found, losses, documents, args.dtype, name)
        ratio = result["programs"][name]["seconds"], result["programs"]["pgolf"]["seconds"]
        result["programs"][name]["pgolf_is_faster"] = float(np.median(ratio[0]) / np.median(ratio[1]))
        print(f"pgolf is {result['programs'][name]['pgolf_is_faster']:.2f} times as fast as {name}", flush=True)
    common.write_result(result, "ttt", args.out, args.quick)


def check_agreement(a: np.ndarray, b: np.ndarray, documents: Documents, dtype: str, name: str) -> None:
    of_all, of_each = AGREEMENT[dtype]
    both = [np.add.reduceat(x.astype(np.float64), documents.start) / documents.targets for x in (a, b)]
    mean, worst = abs(a.mean(dtype=np.float64) - b.mean(dtype=np.float64)), np.abs(both[0] - both[1]).max()
    print(f"{name}: mean losses differ by {mean:.1e}, a document's by at most {worst:.1e}", flush=True)
    if mean > of_all or worst > of_each:
        sys.exit(f"{name} does not compute the same: at most {of_all} and {of_each} were expected.")


if __name__ == "__main__":
    main()
