"""The public scripts' bundle of docs/formats.md, written and read with PyTorch alone."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zstandard

from tests.reference.quant import quantize_rows, quantize_rows_int8
from tests.reference.shapes import is_control

F32 = npt.NDArray[np.float32]
CLIPS = {"int5": 15, "int6": 31}
SMALL = 40
"""Elements that make a tensor small, here; 8,192 or 65,536 in the scripts."""


def write_bundle(state: Mapping[str, F32], encodings: Mapping[str, str], compression: str = "zstd") -> bytes:
    """A .ptz file of a state dict; ``encodings``: int5, int6, int8 or fp16 for what is neither small nor control."""
    w: dict[str, torch.Tensor] = {}
    m: dict[str, Any] = {}
    for name, value in state.items():
        tensor = torch.from_numpy(value)
        if value.size <= SMALL:
            w[name], m[name] = tensor.half(), "passthrough"
        elif is_control(name):
            w[name], m[name] = tensor.clone(), "passthrough_ctrl"
        elif encodings[name] == "fp16":
            w[name], m[name] = tensor.half(), "passthrough_fp16"
        else:
            clip = CLIPS.get(encodings[name])
            q, scale = quantize_rows_int8(value) if clip is None else quantize_rows(value, clip)
            w[f"{name}.q"], w[f"{name}.scale"] = torch.from_numpy(q), torch.from_numpy(scale)
            m[name] = {"type": encodings[name]}
    return compressed(torch_bytes({"w": w, "m": m}), compression)


def read_bundle(data: bytes) -> dict[str, torch.Tensor]:
    """The float32 state dict of a bundle, as a script restores it."""
    is_zstd = data[:4] == bytes([0x28, 0xB5, 0x2F, 0xFD])
    content = zstandard.ZstdDecompressor().decompress(data) if is_zstd else zlib.decompress(data)
    bundle = torch.load(io.BytesIO(content), weights_only=True)
    state = {}
    for name, meaning in bundle["m"].items():
        if meaning in ("passthrough", "passthrough_ctrl"):
            state[name] = bundle["w"][name].float()
        else:
            q, scale = bundle["w"][f"{name}.q"], bundle["w"][f"{name}.scale"]
            state[name] = q.float() * scale.float()[:, None]
    return state


def torch_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def compressed(data: bytes, compression: str) -> bytes:
    return zlib.compress(data, 9) if compression == "zlib" else zstandard.ZstdCompressor(level=3).compress(data)
