"""Evaluation window plans: which tokens are read together and which of them are scored (docs/spec.md §5).

A stream of ``n`` + 1 tokens has ``n`` targets; target ``i`` is token ``i + 1``, predicted from token ``i`` and those
before it in its window. A window of ``m`` targets that starts at ``s`` reads tokens ``s`` … ``s + m − 1`` and predicts
targets ``s`` … ``s + m − 1``, which are tokens ``s + 1`` … ``s + m``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

TAILS = ("exact", "reference")

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """A plan of W windows, in the order in which they are scored.

    start: (W,) int64, the window's first target in the stream.
    length: (W,) int64, targets in the window, at least 1.
    first_scored: (W,) int64, position in the window (0 … length − 1) from which targets are scored, up to its end.
    """

    start: IntArray
    length: IntArray
    first_scored: IntArray

    def __len__(self) -> int:
        return int(self.start.size)

    @property
    def scored(self) -> IntArray:
        """(W,) int64: targets that each window scores."""
        return self.length - self.first_scored


def standard_windows(n_targets: int, seq_len: int) -> Windows:
    """Non-overlapping windows of seq_len targets, each scored whole; an incomplete last window is dropped.

    Raises ValueError if there is no whole window, or an argument is below 1.
    """
    check_positive(n_targets=n_targets, seq_len=seq_len)
    if n_targets < seq_len:
        raise ValueError(_too_short(n_targets, seq_len, "standard windows"))
    start = np.arange(n_targets // seq_len, dtype=np.int64) * seq_len
    return Windows(start, np.full_like(start, seq_len), np.zeros_like(start))


def sliding_windows(n_targets: int, seq_len: int, stride: int, tail: str = "exact") -> Windows:
    """Overlapping windows of seq_len targets: the first scores them all, each later one those that are new in it.

    A window starts every ``stride`` targets; the stride need not divide seq_len. The tail says how the stream ends:

    - ``"exact"``: a window starts at ``k·stride`` if k = 0 or ``k·stride + seq_len − stride < n_targets``. It ends at
      the stream's end at the latest and scores from ``start + seq_len − stride`` on: every target exactly once.
    - ``"reference"``: as openai/parameter-golf #180. The stream is first cut to a multiple of seq_len. A window starts
      at ``k·stride`` while at least ``stride`` targets remain, is cut off at the end, and scores its last ``stride``
      targets, so that the stream's last ``stride`` targets are scored again by each of the shortened windows. Where
      stride does not divide seq_len, up to ``stride − 1`` targets before the cut can stay unscored.

    Raises ValueError unless 1 ≤ stride ≤ seq_len and the tail is one of the two; with ``"reference"`` also if there is
    no whole window.
    """
    check_positive(n_targets=n_targets, seq_len=seq_len, stride=stride)
    if stride > seq_len:
        raise ValueError(
            f"stride is {stride}; expected at most the window's length, {seq_len}, or targets would be left out."
        )
    if tail == "exact":
        later = -(-max(n_targets - seq_len, 0) // stride)
    elif tail == "reference":
        if n_targets < seq_len:
            raise ValueError(_too_short(n_targets, seq_len, "the reference tail"))
        n_targets -= n_targets % seq_len
        later = n_targets // stride - 1
    else:
        raise ValueError(f"tail is {tail!r}; expected one of {', '.join(map(repr, TAILS))}.")
    start = np.arange(1 + later, dtype=np.int64) * stride
    length = np.minimum(seq_len, n_targets - start)
    first_scored = length - stride if tail == "reference" else np.full_like(start, seq_len - stride)
    first_scored[0] = 0
    return Windows(start, length, first_scored)


def _too_short(n_targets: int, seq_len: int, what: str) -> str:
    return (
        f"The data has {n_targets:,} targets (tokens − 1); {what} of seq_len {seq_len:,} need at least {seq_len:,}. "
        f"Use a smaller seq_len, more data, or sliding windows with the exact tail."
    )


def check_positive(**values: Any) -> None:
    """Raises TypeError for a named value that is not an integer, ValueError for one below 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} is {value!r}; expected an integer.")
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1.")
