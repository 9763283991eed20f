"""What the benchmarks share: training steps, the machine and its rates, timing, results.

Nothing heavy is imported before it is needed: cpu_step.py's processes import this file too, and their memory is
measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from pgolf.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Work:
    """A training step: model, sequence length, sequences of a step and of pgolf's micro-batches.

    peer_micro: sequences of a peer's micro-batches, each measured; they divide the step.
    """

    model: dict[str, Any]
    length: int
    sequences: int
    micro: int
    peer_micro: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.length * self.sequences

    @property
    def config(self) -> ModelConfig:
        from pgolf.config import ModelConfig

        return ModelConfig(**self.model)

    def quick(self) -> Work:
        """The same on a model and a step that a CPU does in milliseconds."""
        small = {"vocab_size": 64, "num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1}
        model = {**self.model, **small, "bigram_vocab_size": 32, "bigram_dim": 8}
        return replace(self, model=model, length=32, sequences=8, micro=3, peer_micro=(4, 2)[: len(self.peer_micro)])


BASE = {"num_layers": 10, "bigram_vocab_size": 10_240}
# The public scripts cut a step into 8 micro-batches, whatever its size.
WORK = {
    "base": Work(BASE, 2048, 384, 48, (48,)),
    "small": Work(BASE, 2048, 64, 64, (64, 8)),
    "pr289": Work({"num_layers": 11, "bigram_vocab_size": 2048}, 1024, 512, 96, (64,)),
    "d640": Work({**BASE, "model_dim": 640, "num_heads": 10, "num_kv_heads": 5}, 2048, 96, 32, (32,)),
    "V8192": Work({**BASE, "vocab_size": 8192}, 2048, 96, 32, (32,)),
}


def batch_of(work: Work, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of a step, (sequences, length) int32: the arithmetic does not depend on what they are."""
    import numpy as np

    stream = np.random.default_rng(seed).integers(0, work.config.vocab_size, (work.sequences, work.length + 1))
    return np.ascontiguousarray(stream[:, :-1], np.int32), np.ascontiguousarray(stream[:, 1:], np.int32)


@functools.cache
def settings() -> dict[str, Any]:
    """What a native optimizer step needs, at the base recipe's full rates."""
    from pgolf.config import Config
    from pgolf.training.trainer import step_settings

    return step_settings(Config.from_recipe("base"))


# ---- The machine


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def git_state() -> dict[str, Any]:
    """What was built; dev/gpu.sh says it where there is no repository."""
    if given := os.environ.get("PGOLF_COMMIT"):
        return {"commit": given, "modified": None}

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return run.stdout.strip()

    return {"commit": git("rev-parse", "HEAD") or None, "modified": bool(git("status", "--porcelain", "-uno"))}


def cpu_machine() -> dict[str, Any]:
    from pgolf.common.machine import processor

    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def machine(device: str, quick: bool = False) -> dict[str, Any]:
    """What the numbers refer to, and the rates that they are compared with, measured now.

    limit_tflops: pgolf.system.speed's, which `% of the limit` means; product_tflops: PyTorch's, of the same product.
    copy_tb_per_s: read and written. quick: without PyTorch's, on less.
    """
    import torch

    from pgolf import _C
    from pgolf.system import speed

    limit = speed.measure_limit(device)
    found = {"limit_tflops": limit.flops / 1e12, "limit_product": limit.product, "torch": torch.__version__}
    if device == "cpu":
        found = {**cpu_machine(), **found}
    else:
        status = _C.cuda_status()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()[0],
            "cublaslt": status.cublaslt[1],
            "cudnn": torch.backends.cudnn.version(),
        }
        a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        found["product_tflops"] = 2 * 8192**3 / mean_seconds(lambda: torch.mm(a, b, out=out), device) / 1e12
    large = torch.empty(2**22 if quick else 2**30, device=device, dtype=torch.uint8)
    other = torch.empty_like(large)
    found["copy_tb_per_s"] = 2 * large.numel() / mean_seconds(lambda: other.copy_(large), device) / 1e12
    print(json.dumps(found), flush=True)
    return found


# ---- Timing


def synchronize(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def each_second(call: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, waited for one by one: of what takes milliseconds."""
    samples = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        samples.append(time.perf_counter() - start)
    return samples


def mean_seconds(call: Callable[[], object], device: str, least: float = 0.2) -> float:
    """Seconds of a call among many that are not waited for one by one: of what takes microseconds.

    The median over samples of 10 ms, for `least` seconds after half as long of warm-up: as pgolf measures its limit.
    """

    def run(times: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / times

    one, began = run(1), time.perf_counter()
    while time.perf_counter() - began < least / 2:
        one = run(1)
    times, samples, began = max(1, int(0.01 / one)), [], time.perf_counter()
    while not samples or time.perf_counter() - began < least:
        samples.append(run(times))
    return statistics.median(samples)


# ---- The command line and the result


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda; default: the GPU where there is one")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--quick", action="store_true", help="does it run? Tiny shapes; its numbers mean nothing")
    parser.add_argument("--out", type=Path, help="the JSON file; default: benchmarks/results/NAME/DATE-COMMIT.json")


def resolve(args: argparse.Namespace) -> None:
    """Fills in device and dtype; PyTorch may use cuDNN's attention, its best, and TF32."""
    import torch

    from pgolf.model import resolve_device, resolve_dtype

    args.device = resolve_device(args.device)[0]
    args.dtype = resolve_dtype(args.dtype, args.device)
    torch.manual_seed(0)
    if args.device != "cpu":
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_flash_sdp(False)


def autocast_dtype(dtype: str) -> Any:
    """What a peer's products are computed in; None: float32, without autocast."""
    import torch

    return None if dtype == "float32" else getattr(torch, dtype)


def new_result(args: argparse.Namespace) -> dict[str, Any]:
    return {"date": now(), **git_state(), "machine": machine(args.device, args.quick), "dtype": args.dtype}


def write_result(result: dict[str, Any], name: str, out: Path | None, quick: bool) -> None:
    """Where `out` says, else among the results; a quick run's are nowhere but there."""
    if out is None:
        if quick:
            return
        stem = f"{result['date'][:10]}-{(result['commit'] or 'unknown')[:7]}"
        out = ROOT / "benchmarks" / "results" / name / f"{stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {out}")
