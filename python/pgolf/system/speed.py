"""How fast steps are beside what the machine can do: the arithmetic of a token, and the rate of a matrix product.

The limit is that of one large product of normal numbers: 8192×8192×8192 in the GPU's 16-bit dtype through cuBLASLt, or
about 4096×512×512 float32 on the CPU's threads. It is measured once a machine (a third of a second, no
part of the training time) and kept in a folder of the user's; `pgolf doctor --measure` measures it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from pgolf import _C
from pgolf.common.files import atomic_write
from pgolf.common.machine import processor
from pgolf.config import ModelConfig
from pgolf.model import resolve_device

_SECONDS = 0.2  # of products, after half as long of warm-up
_VALUES = 2_097_143  # a prime: no two rows of a matrix filled with them are alike
_GPU_SIDE = 8192
_CPU_ROWS, _CPU_SIDE, _CPU_CHUNK = 4096, 512, 512  # the backend gives each thread 512 rows at a time


def flop_per_token(config: ModelConfig, seq_len: int, looping: bool = True) -> float:
    """The arithmetic that a training step cannot do without, in FLOP for each of its tokens.

    Forward: 2·r·c for each r×c matrix of a block and of the head, 2·T·d for causal attention (q·kᵀ and p·v over the
    half of the keys that a query sees on average); backward twice that. Not counted: what is computed a second time,
    norms, RoPE, softmax, softcap, the bigram term (its projection could be done once a bucket), the optimizer.

    Args:
        config: the [model] table.
        seq_len: T, tokens of a sequence.
        looping: whether the model's layers run with their loops.
    """
    d, kv = config.model_dim, config.num_kv_heads * (config.model_dim // config.num_heads)
    matrices = d * (d + 2 * kv) + d * d + 2 * d * config.mlp_hidden
    block = 2 * matrices + 2 * seq_len * d
    layers = config.virtual_layers if looping else config.num_layers
    return 3.0 * (layers * block + 2 * d * config.vocab_size)


@dataclass(frozen=True)
class Limit:
    """What a machine reaches at most.

    flops: of the product, FLOP/s. product: which one. date: when it was measured, ISO 8601.
    """

    flops: float
    product: str
    date: str

    def __str__(self) -> str:
        return f"{rate_text(self.flops)} ({self.product})"


def rate_text(flops: float) -> str:
    """FLOP/s as people read them: 680 TFLOP/s, 25.1 GFLOP/s."""
    return f"{flops / 1e12:.3g} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:.3g} GFLOP/s"


def known_limit(device: str) -> Limit | None:
    """The limit that was measured on this machine before; None where none was, or it cannot be read.

    Args:
        device: "cpu", "cuda" or "cuda:<number>", one that can be used.
    """
    machine = _machine(device)
    try:
        stored = json.loads(_path(machine).read_bytes())
        limit = Limit(**stored["limit"])
        if stored["machine"] == machine and math.isfinite(limit.flops) and limit.flops > 0:
            return limit
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):  # whatever is wrong, it is measured again
        pass
    return None


def measure_limit(device: str) -> Limit:
    """Measures the limit and keeps it for `known_limit`, where the user's folder can be written.

    Args:
        device: as `known_limit`.

    Raises:
        DeviceError: the device cannot be used, or has no room for three matrices of 128 MiB.
    """
    place, number = resolve_device(device)
    if place == "cpu":
        dtype, threads = "float32", _C.get_num_threads()
        rows = _CPU_CHUNK * threads * max(1, round(_CPU_ROWS / _CPU_CHUNK / threads))  # no thread waits for another
        shape = (rows, _CPU_SIDE, _CPU_SIDE)
    else:
        dtype, shape = _C.cuda_dtype(number), (_GPU_SIDE, _GPU_SIDE, _GPU_SIDE)
    values = np.random.default_rng(0).standard_normal(_VALUES, dtype=np.float32)
    flops = _C.Ops(number, dtype).product_rate(*shape, values, _SECONDS)
    product = f"{'×'.join(map(str, shape))} {dtype}"
    limit = Limit(flops, product, datetime.now(timezone.utc).isoformat(timespec="seconds"))
    machine = _machine(device)
    with contextlib.suppress(OSError, RuntimeError):  # no folder that can be written: it is measured again next time
        path = _path(machine)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(json.dumps({"machine": machine, "limit": asdict(limit)}, indent=2).encode() + b"\n")
    return limit


def peak_rss() -> int | None:
    """Bytes: the largest resident set that this process has had; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _machine(device: str) -> dict[str, Any]:
    """All that the limit depends on and that can be read."""
    place, number = resolve_device(device)
    if place == "cpu":
        what = {"processor": processor(), "isa": _C.cpu_isa(), "threads": _C.get_num_threads()}
    else:
        status = _C.cuda_status()
        gpu, (_, cublaslt) = status.devices[number], status.cublaslt
        what = {"gpu": gpu.name, "number": number, "driver": status.driver, "cublaslt": cublaslt}
    return {"host": platform.node(), **what}


def _path(machine: dict[str, Any]) -> Path:
    name = hashlib.sha256(repr(sorted(machine.items())).encode()).hexdigest()[:16]
    return _cache_folder() / "limits" / f"{name}.json"


def _cache_folder() -> Path:
    """PGOLF_CACHE, else where the system keeps what programs can make again."""
    if named := os.environ.get("PGOLF_CACHE"):
        return Path(named)
    if named := os.environ.get("XDG_CACHE_HOME" if os.name != "nt" else "LOCALAPPDATA"):
        return Path(named) / "pgolf"
    return Path.home() / ".cache" / "pgolf"
