"""Scoring as docs/spec.md §5 defines it. A window (start, length, first) scores its positions first … length − 1.

Of a token sequence with N + 1 tokens, target i (0 ≤ i < N) is token i + 1 and is predicted at position i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tests.reference.model import ReferenceGPT

Window = tuple[int, int, int]


def standard_windows(targets: int, length: int) -> list[Window]:
    """Non-overlapping windows of `length` tokens; the incomplete last one is dropped."""
    return [(start, length, 0) for start in range(0, targets - length + 1, length)]


def sliding_windows(targets: int, length: int, stride: int, tail: str) -> list[Window]:
    """Windows of at most `length` tokens, `stride` apart; `tail` is `exact` or `reference` (#180)."""
    if tail == "exact":
        return sliding_exact(targets, length, stride)
    if tail == "reference":
        return sliding_reference(targets // length * length, length, stride)
    raise ValueError(f"tail is {tail!r}; expected 'exact' or 'reference'.")


def sliding_exact(targets: int, length: int, stride: int) -> list[Window]:
    """The first window scores all its tokens, each later one those from start + T − s: every target exactly once."""
    windows = []
    start = 0
    while start == 0 or start + length - stride < targets:
        windows.append((start, min(length, targets - start), 0 if start == 0 else length - stride))
        start += stride
    return windows


def sliding_reference(targets: int, length: int, stride: int) -> list[Window]:
    """Each later window scores its last s tokens, so the shortened ones at the end score theirs again."""
    windows = []
    start = 0
    while min(length, targets - start) >= stride:
        size = min(length, targets - start)
        windows.append((start, size, 0 if start == 0 else size - stride))
        start += stride
    return windows


def target_bytes(sp: Any, tokens: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The bytes of every target of a token sequence, (N,), straight from a SentencePieceProcessor."""

    def no_text(token: int) -> bool:
        return sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token)

    ids = [int(token) for token in np.asarray(tokens)]
    counts = []
    for previous, token in pairwise(ids):
        if no_text(token):
            counts.append(0)
        elif sp.is_byte(token):
            counts.append(1)
        else:
            piece = sp.id_to_piece(token)
            text = piece.removeprefix("▁")
            space = piece != text and not no_text(previous)
            counts.append(len(text.encode()) + int(space))
    return np.array(counts, np.int64)


@dataclass
class Score:
    """The mean loss in nats, bits per byte (None without a tokenizer), and the scored targets and their bytes."""

    loss: float
    bpb: float | None
    tokens: int
    bytes: int | None


def evaluate(model: ReferenceGPT, tokens: npt.ArrayLike, windows: Sequence[Window], sp: Any | None = None) -> Score:
    """Score a token sequence window by window; sums in float64."""
    ids = np.asarray(tokens)
    counts = None if sp is None else target_bytes(sp, ids)
    nll, scored, size = 0.0, 0, 0
    for start, length, first in windows:
        end = start + length
        with torch.no_grad():
            losses = model.token_losses(ids[None, start:end], ids[None, start + 1 : end + 1])[0, first:]
        nll += losses.to(torch.float64).sum().item()
        scored += losses.numel()
        if counts is not None:
            size += int(counts[start + first : end].sum())
    if counts is None:
        return Score(nll / scored, None, scored, None)
    return Score(nll / scored, nll / math.log(2) / size, scored, size)
