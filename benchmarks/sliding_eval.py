"""Sliding evaluation beside PyTorch's, from the same weights: windows/s, ratios, and how far the scores are apart.

    python benchmarks/sliding_eval.py                                  # pgolf and the natural model, eager and compiled
    python benchmarks/sliding_eval.py --model runs/a/model.pgolf --data data/books     # a trained one, on its own text
    python benchmarks/sliding_eval.py --quick --device cpu             # does it run?

Every program scores the same windows, T 2048 and stride 64 of the base recipe. Beside it stands pgolf in float32: what
the others' losses are compared with. benchmarks/README.md says more.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import numpy as np

if TYPE_CHECKING:
    from pgolf.model import GPT


@dataclass(frozen=True)
class Case:
    """tokens: a stream of uint16 that makes `windows` windows. bytes_per_token: of its targets."""

    model: GPT
    weights: dict[str, np.ndarray]
    tokens: np.ndarray
    bytes_per_token: float
    length: int
    stride: int
    batch: int
    windows: int

    def bits_per_byte(self, loss: float) -> float:
        return loss / math.log(2) / self.bytes_per_token


def random_weights(model: GPT) -> dict[str, np.ndarray]:
    """As a trained model's in size: what starts as zeros would hide every error behind it, and small logits all."""
    rng = np.random.default_rng(5)
    state = model.state_dict()
    for name, value in state.items():
        noise = np.asarray(rng.standard_normal(value.shape), np.float32)
        if name == "tok_emb.weight":
            state[name] = value * np.float32(0.1 / value.std())  # logits of a standard deviation of 0.1·√d
        elif value.ndim == 2 and not value.any():
            state[name] = noise * np.float32(0.5 / math.sqrt(value.shape[1]))
        elif value.ndim < 2 or not value.std(axis=1).any():
            state[name] = np.asarray(value + np.float32(0.05) * noise)
    return state


def random_case(args: argparse.Namespace) -> Case:
    from pgolf.model import GPT

    work = common.WORK["base"].quick() if args.quick else common.WORK["base"]
    model = GPT(work.config, seed=1, device=args.device, dtype=args.dtype)
    weights = random_weights(model)
    model.load_state_dict(weights)
    stride = 8 if args.quick else args.stride
    count = work.length + stride * (args.windows - 1) + 1
    tokens = np.random.default_rng(1).integers(2, work.config.vocab_size, count).astype(np.uint16)
    return Case(model, weights, tokens, 1.0, work.length, stride, args.batch, args.windows)


def trained_case(args: argparse.Namespace) -> Case:
    import pgolf
    from pgolf.scoring.evaluation import ValidationData

    model = pgolf.load(args.model, device=args.device, dtype=args.dtype)
    length = model.train_seq_len or 2048
    count = length + args.stride * (args.windows - 1) + 1
    data = ValidationData.load(args.data, vocab_size=model.config.vocab_size)
    if len(data.tokens) < count or data.target_bytes is None:
        raise ValueError(
            f"{args.data} holds {len(data.tokens):,} validation tokens; {args.windows:,} windows need {count:,}, "
            "and their bytes a tokenizer beside them."
        )
    per_token = float(np.mean(data.target_bytes[: count - 1]))
    tokens = np.asarray(data.tokens[:count])
    return Case(model, model.state_dict(), tokens, per_token, length, args.stride, args.batch, args.windows)


def pgolf_loss(case: Case, model: GPT, tokens: np.ndarray) -> float:
    import pgolf

    return pgolf.evaluate(model, tokens, method="sliding", seq_len=case.length, stride=case.stride, tail="exact").loss


def peer_loss(case: Case, args: argparse.Namespace, compiled: bool) -> Callable[[np.ndarray], float]:
    import peer_torch
    import torch

    peer = peer_torch.gpt_like(case.model.config, case.length)
    peer.load_state_dict({name: torch.from_numpy(value) for name, value in case.weights.items()})
    peer = peer.to(args.device).eval()
    faster = torch.compile(peer, dynamic=False) if compiled else None
    dtype = common.autocast_dtype(args.dtype)

    def loss(tokens: np.ndarray) -> float:
        stream = torch.from_numpy(tokens.astype(np.int64)).to(args.device)
        with torch.autocast(args.device.partition(":")[0], dtype, enabled=dtype is not None):
            return peer_torch.sliding_loss(peer, stream, case.length, case.stride, case.batch, faster)

    return loss


def measure(who: str, loss: Callable[[np.ndarray], float], case: Case, args: argparse.Namespace) -> dict[str, Any]:
    few = case.tokens[: case.length + case.stride * case.batch + 1]  # the first window and one batch: all shapes
    start = time.perf_counter()
    loss(few)
    warm = time.perf_counter() - start
    losses: list[float] = []
    seconds = common.each_second(lambda: losses.append(loss(case.tokens)), args.device, args.repeats)
    rate = case.windows / statistics.median(seconds)
    print(f"{who}: {rate:,.0f} windows/s, loss {losses[0]:.6f}", flush=True)
    return {"windows_per_second": rate, "loss": losses[0], "first_call_seconds": warm}


def reference_loss(case: Case, args: argparse.Namespace) -> float:
    """pgolf in float32, on the same device."""
    from pgolf.model import GPT

    exact = GPT(case.model.config, seed=None, device=args.device, dtype="float32")
    exact.load_state_dict(case.weights)
    return pgolf_loss(case, exact, case.tokens)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an artifact; without one, random weights and tokens")
    parser.add_argument("--data", type=Path, help="for the artifact: a folder with validation shards and a tokenizer")
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="windows that a peer takes at once, the recipes' 32")
    parser.add_argument("--windows", type=int, help="default: 2,049, the first one and whole batches")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default="eager,compiled", help="some of these, or none")
    common.add_common_arguments(parser)
    args = parser.parse_args(arguments)
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    if args.quick:
        args.batch, args.repeats = 4, 1
    args.windows = args.windows or 64 * args.batch + 1
    if args.windows < 2 or (args.windows - 1) % args.batch:
        parser.error(f"--windows is {args.windows}; expected 1 and a multiple of --batch, {args.batch}")
    peers = [kind for kind in args.peers.split(",") if kind]
    if unknown := set(peers) - {"eager", "compiled"}:
        parser.error(f"--peers has {', '.join(unknown)}; expected eager, compiled or both")
    common.resolve(args)

    result = common.new_result(args)
    case = random_case(args) if args.model is None else trained_case(args)
    programs = {"pgolf": measure("pgolf", lambda tokens: pgolf_loss(case, case.model, tokens), case, args)}
    for kind in peers:
        programs[kind] = measure(kind, peer_loss(case, args, kind == "compiled"), case, args)
        programs[kind]["ratio"] = programs["pgolf"]["windows_per_second"] / programs[kind]["windows_per_second"]
        print(f"pgolf is {programs[kind]['ratio']:.2f} times as fast as {kind} PyTorch", flush=True)
    exact = reference_loss(case, args)
    unit = "bits per byte" if args.model is not None else "bits per token"
    print(f"float32: loss {exact:.6f}, {case.bits_per_byte(exact):.6f} {unit}; away from it, in {unit}:")
    for who, program in programs.items():
        program["away_from_float32"] = abs(case.bits_per_byte(program["loss"]) - case.bits_per_byte(exact))
        print(f"  {who}: {program['away_from_float32']:.1e}", flush=True)
    result |= {
        "windows": {"length": case.length, "stride": case.stride, "count": case.windows, "peer_batch": case.batch},
        "model": "random weights" if args.model is None else args.model.name,
        "unit": unit,
        "float32_loss": exact,
        "programs": programs,
    }
    common.write_result(result, "sliding_eval", args.out, args.quick)


if __name__ == "__main__":
    main()
