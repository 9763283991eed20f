"""Training steps and sliding evaluation on one GPU, beside PyTorch: ms, tokens/s, ratios, memory, start-up.

    python benchmarks/train_step.py                        # pgolf alone: about a minute
    python benchmarks/train_step.py --peer compiled        # and the natural PyTorch model under torch.compile
    python benchmarks/train_step.py --work base,small --steps 5 --out result.json

benchmarks/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pgolf
from pgolf import _C
from pgolf.config import ModelConfig
from pgolf.model import GPT

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {
    "lr": [0.02, 0.03, 0.02, 0.008],
    "weight_decay": [0.04, 0.04, 0.04, 0.0],
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "momentum": 0.95,
    "clip": 0.3,
}


@dataclass(frozen=True)
class Work:
    """A training step: model, sequence length, sequences of a step and of a micro-batch."""

    model: dict[str, Any]
    length: int
    sequences: int
    micro: int

    @property
    def tokens(self) -> int:
        return self.length * self.sequences

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(**self.model)


BASE = {"num_layers": 10, "bigram_vocab_size": 10_240}
WORK = {
    "base": Work(BASE, 2048, 384, 48),
    "small": Work(BASE, 2048, 64, 64),
    "pr289": Work({"num_layers": 11, "bigram_vocab_size": 2048}, 1024, 512, 96),
    "d640": Work({**BASE, "model_dim": 640, "num_heads": 10, "num_kv_heads": 5}, 2048, 96, 32),
    "V8192": Work({**BASE, "vocab_size": 8192}, 2048, 96, 32),
}


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Of `repeats` calls, each between two events."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def machine() -> dict[str, Any]:
    """What the numbers refer to: GPU, driver, copy rate (read + write) and rate of an 8192³ bfloat16 product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    median_ms(lambda: torch.mm(a, b, out=out), 50)
    tflops = 2 * 8192**3 / median_ms(lambda: torch.mm(a, b, out=out), 150) / 1e9
    large = torch.empty(2**30, device="cuda", dtype=torch.uint8)
    other = torch.empty_like(large)
    median_ms(lambda: other.copy_(large), 5)
    copy = 2 * large.numel() / median_ms(lambda: other.copy_(large), 30) / 1e9
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    ).stdout.split()[0]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "product_tflops": round(tflops, 1),
        "copy_tb_per_s": round(copy, 3),
    }


def flop_per_token(work: Work) -> float:
    """Forward and backward, causal attention counted once; the arithmetic that a step cannot do without."""
    c = work.config
    d, kv = c.model_dim, c.num_kv_heads * (c.model_dim // c.num_heads)
    layer = 2 * d * (d + 2 * kv + d + 2 * c.mlp_hidden) + 2 * work.length * d
    return 3 * (c.num_layers * layer + 2 * d * c.vocab_size)


def batch_of(work: Work, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    stream = np.random.default_rng(seed).integers(0, work.config.vocab_size, (work.sequences, work.length + 1))
    return np.ascontiguousarray(stream[:, :-1], np.int32), np.ascontiguousarray(stream[:, 1:], np.int32)


def used_mib() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**20


def measure_pgolf(work: Work, steps: int, dtype: str) -> dict[str, Any]:
    before = used_mib()
    model = GPT(work.config, seed=1, device="cuda", dtype=dtype)
    optimizer = _C.Optimizer(model._native, 5)
    ids, targets = batch_of(work)
    scale = 1 / ids.size
    optimizer.warm_up(sorted({work.micro, work.sequences % work.micro} - {0}), work.length, scale, False, True)

    def step() -> int:
        model._native.begin_step(False)
        for first in range(0, work.sequences, work.micro):
            part = slice(first, first + work.micro)
            model._native.micro_step(ids[part], targets[part], scale)
        model._native.end_step()
        return int(optimizer.step(SETTINGS))

    for _ in range(2):
        optimizer.wait(step())
    times = []
    tickets = [step()]
    last = None
    for _ in range(steps + 1):
        tickets.append(step())
        optimizer.wait(tickets.pop(0))
        now = time.perf_counter()
        if last is not None:
            times.append((now - last) * 1e3)
        last = now
    loss, _, finite, _ = optimizer.wait(tickets.pop())
    assert finite
    return {"ms": statistics.median(times), "least": min(times), "mib": used_mib() - before, "loss": loss * scale}


def measure_peer(work: Work, steps: int, compiled: bool, micro: int) -> dict[str, Any]:
    import peer_torch

    c = work.config
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.enable_flash_sdp(False)
    before = used_mib()
    model = peer_torch.GPT(
        vocab_size=c.vocab_size,
        model_dim=c.model_dim,
        num_layers=c.num_layers,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        hidden=c.mlp_hidden,
        seq_len=work.length,
        bigram_vocab_size=c.bigram_vocab_size,
        bigram_dim=c.bigram_dim,
    ).cuda()
    training = peer_torch.Training(model, compiled, dtype=torch.bfloat16)
    ids, targets = (torch.tensor(a, device="cuda").long() for a in batch_of(work))

    def step() -> None:
        training.step_in_parts([(ids[i : i + micro], targets[i : i + micro]) for i in range(0, work.sequences, micro)])

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    times = [median_ms(step, 1) for _ in range(steps)]
    return {"ms": statistics.median(times), "least": min(times), "mib": used_mib() - before}


def sliding(work: Work, dtype: str, windows: int = 2048) -> float:
    """Windows of T tokens, stride 64, a second."""
    model = GPT(work.config, seed=1, device="cuda", dtype=dtype)
    rng = np.random.default_rng(1)
    tokens = rng.integers(2, work.config.vocab_size, work.length + 64 * (windows - 1) + 1).astype(np.uint16)
    best = 0.0
    for count in (64, windows, windows):
        part = tokens[: work.length + 64 * (count - 1) + 1]
        score = pgolf.evaluate(model, part, method="sliding", seq_len=work.length, stride=64)
        best = max(best, score.windows / score.seconds) if count == windows else best
    return best


START = """
import time; start = time.perf_counter()
import pgolf; from pgolf import _C; imported = time.perf_counter()
_C.cuda_status(); found = time.perf_counter()
import numpy as np
from pgolf.config import ModelConfig
from pgolf.model import GPT
model = GPT(ModelConfig(num_layers=10, bigram_vocab_size=10240), seed=1, device="cuda", dtype="bfloat16")
made = time.perf_counter()
optimizer = _C.Optimizer(model._native, 5)
optimizer.warm_up([48], 2048, 1e-6, False, True); warm = time.perf_counter()
ids = np.zeros((48, 2048), np.int32)
model._native.begin_step(False); model._native.micro_step(ids, ids, 1e-6); model._native.end_step()
optimizer.wait(optimizer.step(%r)); stepped = time.perf_counter()
print(*(b - a for a, b in zip((start, imported, found, made, warm), (imported, found, made, warm, stepped))))
"""


def start_up() -> dict[str, float]:
    """Seconds from an interpreter to the first optimizer step of the base model, in the second process that tries."""
    names = ("import", "driver and libraries", "initial weights", "warm-up and recording", "first step")
    for _ in range(2):
        ran = subprocess.run([sys.executable, "-c", START % SETTINGS], capture_output=True, text=True, check=True)
    return {name: round(float(value), 3) for name, value in zip(names, ran.stdout.split(), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", default="base,small,pr289", help=f"from: {', '.join(WORK)}")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer", choices=("eager", "compiled"))
    parser.add_argument("--peer-work", default="base")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "dtype": args.dtype,
        "work": {},
    }
    limit = result["machine"]["product_tflops"] * 1e12
    print(json.dumps(result["machine"]), flush=True)
    for name in filter(None, args.work.split(",")):
        work = WORK[name]
        found = result["work"][name] = {"pgolf": measure_pgolf(work, args.steps, args.dtype)}
        ms = found["pgolf"]["ms"]
        found["pgolf"]["tokens_per_second"] = work.tokens / ms * 1e3
        found["pgolf"]["share_of_limit"] = flop_per_token(work) * work.tokens / (ms / 1e3) / limit
        print(
            f"{name}: {ms:.1f} ms, {work.tokens / ms / 1e3:.3f} M tokens/s, "
            f"{100 * found['pgolf']['share_of_limit']:.1f} % of the limit, {found['pgolf']['mib']:,.0f} MiB",
            flush=True,
        )
        if args.peer and name in args.peer_work.split(","):
            peer = found[args.peer] = measure_peer(work, args.steps, args.peer == "compiled", work.micro)
            print(f"{name}: {args.peer} PyTorch {peer['ms']:.1f} ms; pgolf is {peer['ms'] / ms:.2f} times as fast")
    result["sliding_windows_per_second"] = sliding(WORK["base"], args.dtype)
    print(f"sliding evaluation: {result['sliding_windows_per_second']:,.0f} windows/s", flush=True)
    result["start_up"] = start_up()
    print(f"start to first step: {sum(result['start_up'].values()):.2f} s", result["start_up"], flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def commit() -> str:
    """What was built; dev/gpu.sh knows it where there is no repository."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return os.environ.get("PGOLF_COMMIT") or found.stdout.strip()


if __name__ == "__main__":
    main()
