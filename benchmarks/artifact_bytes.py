"""What comes after quantisation, in bytes: layouts, zstd's parameters, the entropy of the integers, and our streams.

    python benchmarks/artifact_bytes.py runs/a/model.pgolf
    python benchmarks/artifact_bytes.py weights.npz --out results.json     # float weights by name, the base policy
    python benchmarks/artifact_bytes.py weights.npz --only 'blocks.4.*'    # a part, for level 22 takes its time

Then, for three matrices, what pruning, clips and other scales of rows do to the squared error at equal bytes.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

import pgolf
from pgolf.artifacts.artifact import decode_tensor, encode_state, encode_tensor
from pgolf.artifacts.container import EncodedTensor, compress, encode_streams, pack, pack_content, unpack
from pgolf.artifacts.quantize import prune_weights, quantize_rows
from pgolf.config import Config
from pgolf.report.inspection import entropy_bits

Tensors = dict[str, EncodedTensor]
Array = npt.NDArray[Any]


# ---- Layouts: one stream of bytes for all tensors


def plain(tensors: Tensors) -> bytes:
    return b"".join(tensors[name].payload() for name in sorted(tensors))


def transposed(tensors: Tensors) -> bytes:
    return b"".join(
        t.payload() if t.scale is None else np.ascontiguousarray(t.values.T).tobytes() + t.scale.tobytes()
        for _, t in sorted(tensors.items())
    )


def rows_by_scale(tensors: Tensors) -> bytes:
    """Rows in the order of their scales, which a decoder could undo by 2 bytes a row; they are not counted."""
    return b"".join(
        t.payload() if t.scale is None else t.values[np.argsort(t.scale, kind="stable")].tobytes() + t.scale.tobytes()
        for _, t in sorted(tensors.items())
    )


def grouped(tensors: Tensors) -> bytes:
    """Integers of one encoding together, then all scales, then floats in two byte planes."""
    parts: dict[str, list[bytes]] = {}
    for _, tensor in sorted(tensors.items()):
        if tensor.scale is not None:
            parts.setdefault(f"0 {tensor.encoding}", []).append(tensor.values.tobytes())
            parts.setdefault("1 scales", []).append(planes(tensor.scale))
        else:
            parts.setdefault("2 floats", []).append(planes(tensor.values))
    return b"".join(b"".join(parts[key]) for key in sorted(parts))


def planes(values: Array) -> bytes:
    return np.ascontiguousarray(values.reshape(-1, 1).view(np.uint8).T).tobytes()


def bit_packed(tensors: Tensors) -> bytes:
    """As few bits to an integer as its tensor's range needs, without gaps."""
    parts = []
    for _, tensor in sorted(tensors.items()):
        if tensor.scale is None:
            parts.append(tensor.payload())
            continue
        low = int(tensor.values.min())
        bits = max(int(np.ptp(tensor.values)).bit_length(), 1)
        numbers = (tensor.values.ravel().astype(np.int64) - low).astype(np.uint8)
        parts.append(np.packbits(np.unpackbits(numbers[:, None], axis=1)[:, 8 - bits :]).tobytes())
        parts.append(tensor.scale.tobytes())
    return b"".join(parts)


def zstd(**parameters: Any) -> Callable[[bytes], bytes]:
    def run(data: bytes) -> bytes:
        made = zstandard.ZstdCompressionParameters.from_level(22, source_size=len(data), **parameters)
        return zstandard.ZstdCompressor(compression_params=made).compress(data)

    return run


VARIANTS: list[tuple[str, Callable[[Tensors], bytes], Callable[[bytes], bytes]]] = [
    ("long distance matching", plain, zstd(enable_ldm=True)),
    ("target length 4,096", plain, zstd(target_length=4096)),
    ("least match 7, search log 12", plain, zstd(min_match=7, search_log=12)),
    ("level 1: hardly more than Huffman's code", plain, zstandard.ZstdCompressor(level=1).compress),
    ("transposed", transposed, compress),
    ("rows ordered by scale", rows_by_scale, compress),
    ("grouped by encoding, floats in byte planes", grouped, compress),
    ("the same, level 1", grouped, zstandard.ZstdCompressor(level=1).compress),
    ("bit-packed", bit_packed, compress),
    (
        "grouped, lzma with lc = lp = pb = 0",
        grouped,
        lambda data: lzma.compress(
            data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 0, "pb": 0}]
        ),
    ),
]


def study_bytes(header: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    integers = {name: t for name, t in tensors.items() if t.scale is not None}
    raw = sum(len(t.payload()) for t in tensors.values())
    entropy = sum(entropy_bits(t.values) * t.values.size / 8 for t in integers.values())
    version_1 = 32 + len(compress(pack_content(header, tensors)))
    sizes: dict[str, int] = {}

    def row(name: str, size: int) -> None:
        sizes[name] = size
        print(f"{name:45s} {size:12,d} {100 * (size / version_1 - 1):+7.2f} %", flush=True)

    row("version 1: plain, zstd-22", version_1)
    for name, layout, run in VARIANTS:
        row(name, 32 + len(run(layout(tensors))))
    row("a frame for each tensor", 32 + sum(len(compress(t.payload())) for t in tensors.values()))
    began = time.perf_counter()
    streams = encode_streams(tensors)
    encode_seconds = time.perf_counter() - began
    data = pack(header, tensors, streams)
    began = time.perf_counter()
    unpack(data)
    decode_seconds = time.perf_counter() - began
    row("version 2", len(data))
    coded = sum(len(streams[name]) for name in integers)
    scales = sum(2 * len(t.scale) for t in integers.values() if t.scale is not None)
    print(
        f"integers: {sum(t.values.size for t in integers.values()):,}; their order-0 entropy, each tensor by itself: "
        f"{entropy:,.0f} bytes; their streams: {coded:,}, with {scales:,} bytes of scales in them\n"
        f"version 2: encoded in {encode_seconds:.2f} s, read in {decode_seconds:.2f} s, "
        f"{pgolf.get_num_threads()} threads"
    )
    return {
        "raw": raw,
        "entropy": round(entropy),
        "integer_streams": coded,
        "scale_bytes": scales,
        "bytes": sizes,
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
        "threads": pgolf.get_num_threads(),
    }


# ---- Other quantisers, at equal bytes


def size_and_error(w: Array, tensor: EncodedTensor) -> tuple[int, float]:
    error = float(np.sum((decode_tensor(tensor).astype(np.float64) - w) ** 2))
    return len(encode_streams({"w": tensor})["w"]), error


def clipped(w: Array, clip: int) -> EncodedTensor:
    """Each row with the scale, of 33 from half of max|row|/clip to all of it, that has the least squared error."""
    best: list[Array] = []
    for share in np.linspace(0.5, 1, 33):
        scale = np.maximum(np.abs(w).max(1) * np.float32(share / clip), np.float32(2**-14)).astype(np.float16)
        q = np.clip(np.rint(w / scale.astype(np.float32)[:, None]), -clip - 1, clip).astype(np.int8)
        error = np.sum((q * scale.astype(np.float64)[:, None] - w) ** 2, 1)
        if not best:
            best = [error, q, scale]
        better = error < best[0]
        for kept, new in zip(best, (error, q, scale), strict=True):
            kept[better] = new[better]
    return EncodedTensor("int8", best[1], best[2])


def study_quantisers(state: dict[str, Array], names: Iterable[str]) -> dict[str, dict[str, float]]:
    """The squared error beside that of rows scaled by their largest magnitude, at equal bytes."""
    found: dict[str, dict[str, float]] = {}
    for name in names:
        w = state[name]
        rows = [EncodedTensor("int8", *quantize_rows(w, bits=8, clip=c)) for c in (3, 5, 7, 10, 15, 22, 31, 44, 63)]
        sizes, errors = zip(*(size_and_error(w, tensor) for tensor in rows), strict=True)
        logs = np.log(errors)

        def beside(tensor: EncodedTensor, w: Array = w, sizes: Any = sizes, logs: Array = logs) -> float:
            size, error = size_and_error(w, tensor)
            return error / float(np.exp(np.interp(size, sizes, logs)))

        found[name] = {
            "int5, 10 % pruned": beside(encode_tensor(prune_weights(w, 0.1), "int5")),
            "int5, 20 % pruned": beside(encode_tensor(prune_weights(w, 0.2), "int5")),
            "int5, best clip of each row": beside(clipped(w, 15)),
            "int6, best clip of each row": beside(clipped(w, 31)),
            "rms:2": beside(encode_tensor(w, "rms:2")),
            "rms:4": beside(encode_tensor(w, "rms:4")),
            "rms:8": beside(encode_tensor(w, "rms:8")),
        }
        print(name, ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in found[name].items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="an artifact, or an .npz of float weights")
    parser.add_argument("--policy", default="base", help="the recipe that quantises an .npz")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="the tensors to look at, as fnmatch")
    parser.add_argument("--out", type=Path, help="where the JSON result goes")
    args = parser.parse_args()
    quantisers: dict[str, dict[str, float]] = {}
    if args.weights.suffix == ".npz":
        state = {name: w.astype(np.float32) for name, w in np.load(args.weights).items() if fnmatch(name, args.only)}
        _, tensors = encode_state(state, Config.from_recipe(args.policy).export)
        names = [
            name for name in state if name.split(".", 2)[-1] in ("mlp.fc.weight", "mlp.proj.weight", "attn.c_v.weight")
        ]
        quantisers = study_quantisers(state, names[len(names) // 6 * 3 :][:3])
        header: dict[str, Any] = {}
    else:
        header, tensors = unpack(args.weights)
        tensors = {name: tensor for name, tensor in tensors.items() if fnmatch(name, args.only)}
    result = study_bytes(header, tensors) | {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "pgolf": pgolf.__version__,
        "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
        "error_at_equal_bytes": quantisers,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
