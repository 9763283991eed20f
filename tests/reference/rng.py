"""Random numbers and initial weights, docs/spec.md §1: Philox4x32-10 keyed (seed, CRC-32 of the name, element)."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.reference.shapes import parameter_shapes

MASK = np.uint64(0xFFFFFFFF)


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Ten rounds of Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    The four counter words are arrays or numbers below 2^32 that broadcast together; the result is four uint64 arrays
    that hold 32-bit words.
    """
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & MASK,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & MASK,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def unit_pairs(
    seed: int, name: str, count: int, document: int = 0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The u and v in [0, 1) of a tensor's first `count` elements, float64; document: of adapters (§5)."""
    i = np.arange(count, dtype=np.uint64)
    counter = (i & MASK, i >> np.uint64(32), zlib.crc32(name.encode()), document)
    x0, x1, x2, x3 = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))

    def unit(high: np.ndarray, low: np.ndarray) -> npt.NDArray[np.float64]:
        return (((high << np.uint64(32)) | low) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    return unit(x0, x1), unit(x2, x3)


def normal64(seed: int, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Standard normal values before rounding, float64."""
    u, v = unit_pairs(seed, name, math.prod(shape))
    return (np.sqrt(-2.0 * np.log(1.0 - u)) * np.cos(2.0 * np.pi * v)).reshape(shape)


def normal(seed: int, name: str, shape: tuple[int, ...], std: float = 1.0) -> npt.NDArray[np.float32]:
    """The named tensor drawn from normal(0, std): float64, rounded once to float32."""
    return (std * normal64(seed, name, shape)).astype(np.float32)


def uniform(seed: int, name: str, shape: tuple[int, ...], bound: float, document: int = 0) -> npt.NDArray[np.float32]:
    """The named tensor drawn uniformly from [-bound, bound): float64, rounded once to float32."""
    u, _ = unit_pairs(seed, name, math.prod(shape), document)
    return ((2.0 * u - 1.0) * bound).reshape(shape).astype(np.float32)


def orthogonal(seed: int, name: str, shape: tuple[int, int], gain: float = 1.0) -> npt.NDArray[np.float32]:
    """Q of the named standard normal matrix, R's diagonal made positive, times `gain`; rounded once to float32.

    That Q is unique, so how the factorisation is computed shows only in the last bits of float64.
    """
    matrix = normal64(seed, name, shape)
    wide = shape[0] < shape[1]
    q, r = np.linalg.qr(matrix.T if wide else matrix)
    q = q * np.sign(np.diag(r))
    return (gain * (q.T if wide else q)).astype(np.float32)


def init_state(cfg: Any, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """The initial weights of every parameter of §1."""
    return {name: init_tensor(cfg, seed, name, shape) for name, shape in parameter_shapes(cfg).items()}


def init_tensor(cfg: Any, seed: int, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """One row of the table of §1."""
    if name == "tok_emb.weight":
        return normal(seed, name, shape, cfg.tied_embed_init_std if cfg.tie_embeddings else 1.0)
    if name == "bigram.scale":
        return np.full(shape, 0.05, np.float32)
    if name == "skip_weights" or name.endswith(("attn_scale", "mlp_scale")):
        return np.ones(shape, np.float32)
    if name.endswith("resid_mix"):
        return np.stack([np.ones(shape[1], np.float32), np.zeros(shape[1], np.float32)])
    if name.endswith("q_gain"):
        return np.full(shape, cfg.qk_gain_init, np.float32)
    if name == "bigram.proj.weight":
        if min(shape) < 64:
            return np.zeros(shape, np.float32)
        return orthogonal(seed, name, (shape[0], shape[1]), 1.0 / math.sqrt(2 * cfg.num_layers))
    if name.endswith(("c_q.weight", "c_k.weight", "c_v.weight", "fc.weight")):
        if min(shape) < 64:
            return uniform(seed, name, shape, 1.0 / math.sqrt(shape[1]))
        return orthogonal(seed, name, (shape[0], shape[1]))
    return np.zeros(shape, np.float32)  # bigram.embed, smear.gate, every block's proj, lm_head
