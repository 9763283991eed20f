"""Counting a stream of tokens piece by piece: what any cutting of it into blocks and shards gives alike."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pgolf.tokenizer import ByteTable

BLOCK_TOKENS = 1 << 20
"""Tokens to count at a time: some 20 MB of temporary arrays."""


@dataclass(frozen=True)
class TokenStats:
    """Counts over consecutive tokens; `a + b` are those of a's tokens followed by b's.

    A document is a BOS and what follows it up to the next one. Its lengths are kept as a histogram, which has at most
    √(2 · tokens) distinct keys however the documents are cut.
    """

    tokens: int = 0
    low: int | None = None
    """The smallest token id; None where there is no token."""
    high: int | None = None
    """The largest."""
    head: int = 0
    """Tokens before the first BOS."""
    lengths: dict[int, int] = field(default_factory=dict)
    """Documents that another one follows: how many have so many tokens, the BOS included."""
    tail: int = 0
    """Tokens of the last document, which may go on; 0 where there is no BOS."""
    text_bytes: int | None = 0
    """UTF-8 bytes that the tokens spell (docs/spec.md §5), behind a token that is no boundary; None where no byte
    table was given or one of the tokens is not in it."""
    starts_with_space: bool = False
    ends_at_boundary: bool = False

    @classmethod
    def of(cls, tokens: NDArray[np.uint16], bos_id: int, table: ByteTable | None = None) -> TokenStats:
        """The counts of a block of tokens, of shape (n,), with temporary arrays of some 20 bytes a token."""
        if not tokens.size:
            return cls()
        low, high = int(tokens.min()), int(tokens.max())
        starts = np.flatnonzero(tokens == bos_id)
        lengths = dict(enumerate_counts(np.diff(starts)))
        known = table is not None and high < table.base_bytes.size
        return cls(
            tokens=tokens.size,
            low=low,
            high=high,
            head=int(starts[0]) if starts.size else tokens.size,
            lengths=lengths,
            tail=tokens.size - int(starts[-1]) if starts.size else 0,
            text_bytes=_text_bytes(tokens, table) if table is not None and known else None,
            starts_with_space=known and bool(table.has_leading_space[tokens[0]]),
            ends_at_boundary=known and bool(table.is_boundary[tokens[-1]]),
        )
