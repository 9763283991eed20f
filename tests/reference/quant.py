"""Quantisation, pruning and policies of docs/spec.md §4: NumPy float32, true division, round half even."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt

from tests.reference.shapes import CONTROL

F32 = npt.NDArray[np.float32]

CLIPS = {"int5": 15, "int6": 31}
SMALLEST_NORMAL_FP16 = np.float16(2.0**-14)
ROW_QUANTILE = 0.9999984  # 99.99984 %
PRUNED_ABOVE = 65_536  # elements


def quantile(values: npt.NDArray[np.floating], q: float) -> np.float32:
    """Position q(n−1) in float64, linear interpolation, rounded to float32."""
    ordered = np.sort(np.asarray(values, np.float64).ravel())
    position = q * (ordered.size - 1)
    below = int(np.floor(position))
    above = min(below + 1, ordered.size - 1)
    return np.float32(ordered[below] + (position - below) * (ordered[above] - ordered[below]))


def quantize_rows(w: F32, clip: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """intN per row of w (rows, cols): the integers and one fp16 scale a row."""
    amax = np.abs(w).max(axis=1, initial=np.float32(0))
    sigma = np.maximum(amax / np.float32(clip), np.float32(1e-12)).astype(np.float16)
    sigma = np.maximum(sigma, SMALLEST_NORMAL_FP16)
    q = np.clip(np.round(w / sigma.astype(np.float32)[:, None]), -clip - 1, clip)
    return q.astype(np.int8), sigma


def quantize_rows_int8(w: F32) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """int8 per row as the recipes do it (`quantile_floor`): division by the float32 scale, which is stored as fp16."""
    clip = np.array([quantile(np.abs(row), ROW_QUANTILE) for row in w], np.float32)
    sigma = np.maximum(clip / np.float32(127), np.float32(1) / np.float32(127))
    clipped = np.clip(w, -clip[:, None], clip[:, None])
    q = np.clip(np.round(clipped / sigma[:, None]), -127, 127)
    return q.astype(np.int8), sigma.astype(np.float16)


def quantize_rows_rms(w: F32, steps: float) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """One step for all rows, `steps` of them to the root mean square, unless a row would need more than 127."""
    squares = np.add.accumulate(w.astype(np.float64).ravel() ** 2)  # in order
    step = np.float32(np.sqrt(squares[-1] / w.size) / steps)
    amax = np.abs(w).max(axis=1)
    sigma = np.maximum(np.maximum(step, amax / np.float32(127)).astype(np.float16), SMALLEST_NORMAL_FP16)
    q = np.clip(np.round(w / sigma.astype(np.float32)[:, None]), -127, 127)
    return q.astype(np.int8), sigma


def dequantize_rows(q: npt.NDArray[np.int8], sigma: npt.NDArray[np.float16]) -> F32:
    """q·σ in float32."""
    return q.astype(np.float32) * sigma.astype(np.float32)[:, None]


def prune(w: F32, p: float) -> F32:
    """Zero the entries whose magnitude is strictly below the p-quantile of the magnitudes."""
    return np.where(np.abs(w) < quantile(np.abs(w), p), np.float32(0), w)


def resolve(
    name: str, elements: int, policy: Sequence[tuple[str, str]], small_numel: int, control: Sequence[str] = CONTROL
) -> str:
    """The encoding of a tensor: small → fp16, control → fp32, else the first pattern that matches the full name."""
    if elements <= small_numel:
        return "fp16"
    if any(word in name for word in control):
        return "fp32"
    for pattern, encoding in policy:
        if fnmatchcase(name, pattern):
            return encoding
    raise ValueError(f"No pattern of the policy matches {name}.")


def roundtrip(w: F32, encoding: str) -> F32:
    """What loading gives back for w; a vector counts as one row."""
    if encoding == "fp32":
        return w.copy()
    if encoding == "fp16":
        return w.astype(np.float16).astype(np.float32)
    rows = w.reshape(-1, w.shape[-1]) if w.ndim > 0 else w.reshape(1, 1)
    if encoding.startswith("rms:"):
        q, sigma = quantize_rows_rms(rows, float(encoding[4:]))
    else:
        q, sigma = quantize_rows_int8(rows) if encoding == "int8" else quantize_rows(rows, CLIPS[encoding])
    return dequantize_rows(q, sigma).reshape(w.shape)


def prune_state(state: Mapping[str, F32], p: float | None) -> dict[str, F32]:
    """Pruning of every 2-D tensor with more than 65,536 elements; p None or 0 prunes nothing."""
    return {name: prune(w, p) if p and w.ndim == 2 and w.size > PRUNED_ABOVE else w for name, w in state.items()}


def quantize_state(
    state: Mapping[str, npt.NDArray[np.floating]],
    policy: Sequence[tuple[str, str]],
    small_numel: int,
    prune: float | None = None,
    control: Sequence[str] = CONTROL,
) -> tuple[dict[str, F32], dict[str, str]]:
    """Prune, encode and decode a whole state dict: the float32 state that loading gives, and each tensor's encoding."""
    pruned = prune_state({name: np.asarray(w, np.float32) for name, w in state.items()}, prune)
    encodings = {name: resolve(name, w.size, policy, small_numel, control) for name, w in pruned.items()}
    return {name: roundtrip(w, encodings[name]) for name, w in pruned.items()}, encodings
