"""Counting a stream of tokens piece by piece, with the same result however it is cut into blocks and shards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pgolf.data.tokenizer import ByteTable

BLOCK_TOKENS = 1 << 20
"""Tokens to count at a time: some 10 MB of temporary arrays."""


@dataclass(frozen=True)
class TokenStats:
    """Counts over consecutive tokens; `a + b` are those of a's tokens followed by b's.

    A document is a BOS and what follows it, up to the next BOS.
    """

    tokens: int = 0
    low: int | None = None
    """The smallest token id; None where there is no token."""
    high: int | None = None
    """The largest."""
    head: int = 0
    """Tokens before the first BOS."""
    lengths: Counter[int] = field(default_factory=Counter)
    """How many documents have so many tokens, BOS included; all but the last. At most √(2 · tokens) keys."""
    tail: int = 0
    """Tokens of the last document, which may go on; 0 where there is no BOS."""
    text_bytes: int | None = 0
    """UTF-8 bytes that the tokens spell (docs/spec.md §5), the first one as if behind a token that is no boundary.
    None without a byte table, or where a token is not in it."""
    starts_with_space: bool = False
    ends_at_boundary: bool = False

    @classmethod
    def of(cls, tokens: NDArray[np.uint16], bos_id: int, table: ByteTable | None = None) -> TokenStats:
        """The counts of a block of tokens, of shape (n,)."""
        if not tokens.size:
            return cls()
        high = int(tokens.max())
        if table is not None and high >= table.base_bytes.size:
            table = None
        starts = np.flatnonzero(tokens == bos_id)
        lengths, counts = np.unique(np.diff(starts), return_counts=True)
        return cls(
            tokens=tokens.size,
            low=int(tokens.min()),
            high=high,
            head=int(starts[0]) if starts.size else tokens.size,
            lengths=Counter(dict(zip(lengths.tolist(), counts.tolist(), strict=True))),
            tail=tokens.size - int(starts[-1]) if starts.size else 0,
            text_bytes=None if table is None else _text_bytes(tokens, table),
            starts_with_space=table is not None and bool(table.has_leading_space[tokens[0]]),
            ends_at_boundary=table is not None and bool(table.is_boundary[tokens[-1]]),
        )

    def __add__(self, other: TokenStats) -> TokenStats:
        if not self.tokens or not other.tokens:
            return self if self.tokens else other
        assert self.low is not None and other.low is not None
        assert self.high is not None and other.high is not None
        head, tail, lengths = self.head, other.tail, self.lengths + other.lengths
        if not self.tail:
            head = self.tokens + other.head
        elif not other.tail:
            tail = self.tail + other.tokens
        else:
            lengths[self.tail + other.head] += 1
        text_bytes = None
        if self.text_bytes is not None and other.text_bytes is not None:
            text_bytes = self.text_bytes + other.text_bytes - (self.ends_at_boundary and other.starts_with_space)
        return TokenStats(
            self.tokens + other.tokens,
            min(self.low, other.low),
            max(self.high, other.high),
            head,
            lengths,
            tail,
            text_bytes,
            self.starts_with_space,
            other.ends_at_boundary,
        )

    @property
    def documents(self) -> int:
        """Documents that begin in these tokens: the number of BOS."""
        return self.lengths.total() + (self.tail > 0)

    @property
    def mean_document(self) -> float | None:
        """Tokens per document, the last one as far as it goes; None where there is none."""
        return (self.tokens - self.head) / self.documents if self.documents else None

    @property
    def median_document(self) -> float | None:
        """The middle document's tokens, or the mean of the two in the middle; None where there is none."""
        if not self.documents:
            return None
        counts = self.lengths + Counter({self.tail: 1})
        lengths = np.array(sorted(counts))
        up_to = np.cumsum([counts[length] for length in lengths.tolist()])
        middle = np.searchsorted(up_to, [(self.documents - 1) // 2, self.documents // 2], side="right")
        return float(lengths[middle].mean())


def _text_bytes(tokens: NDArray[np.uint16], table: ByteTable) -> int:
    """Bytes of the tokens' text: every token's own, and a leading space unless a boundary precedes it."""
    counts = np.bincount(tokens, minlength=table.base_bytes.size)
    boundaries = np.flatnonzero(table.is_boundary[tokens[:-1]])
    unspaced = np.count_nonzero(table.has_leading_space[tokens[boundaries + 1]])
    return int(counts @ (table.base_bytes.astype(np.int64) + table.has_leading_space)) - int(unspaced)
