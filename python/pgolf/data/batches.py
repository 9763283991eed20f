"""The batches of docs/spec.md §6: which tokens a step sees, in which order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pgolf.data.shards import ShardSet


class BatchStream:
    """Steps of sequences cut from a token stream.

    A step takes `grad_accum_steps` spans of n + 1 tokens, n = train_batch_tokens / grad_accum_steps, one behind the
    other and without overlap, wrapping around at the end of the data. A span's first n tokens are inputs, its last n
    their targets; both are cut into sequences of `seq_len` tokens, numbered 0..S-1 over the spans in order.

    `train_batch_tokens` must be a multiple of grad_accum_steps · seq_len.

    Raises ValueError where it is not, and where the data is too short for one sequence and its last target.
    """

    def __init__(self, shards: ShardSet, train_batch_tokens: int, grad_accum_steps: int, seq_len: int) -> None:
        for name, value in (
            ("train_batch_tokens", train_batch_tokens),
            ("grad_accum_steps", grad_accum_steps),
            ("train_seq_len", seq_len),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if train_batch_tokens % (grad_accum_steps * seq_len):
            raise ValueError(
                f"train_batch_tokens is {train_batch_tokens:,}; it must be a multiple of grad_accum_steps · "
                f"train_seq_len = {grad_accum_steps} · {seq_len:,} = {grad_accum_steps * seq_len:,}."
            )
        if seq_len + 1 > len(shards):
            raise ValueError(
                f"train_seq_len is {seq_len:,}, which needs {seq_len + 1:,} tokens; "
                f"the training data ({shards.paths[0].parent}) holds {len(shards):,}."
            )
        self._shards = shards
        self._seq_len = seq_len
        self._spans = grad_accum_steps
        self._span_tokens = train_batch_tokens // grad_accum_steps + 1
        self._position = 0

    @property
    def position(self) -> int:
        """Where in the data the next step starts: a token index in 0..len(data)-1. Setting it resumes a stream."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"the stream's position is {value!r}; an integer is expected.")
        if not 0 <= value < len(self._shards):
            raise ValueError(f"the stream's position is {value:,}; the data holds {len(self._shards):,} tokens.")
        self._position = value

    def next(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The next step's inputs and targets: two owned int32 arrays of shape (S, seq_len).

        Raises FormatError where a token is not in the vocabulary; the position then stays where it was.
        """
        count = self._spans * self._span_tokens
        spans = self._shards.read(self._position, count).astype(np.int32).reshape(self._spans, self._span_tokens)
        self._position = (self._position + count) % len(self._shards)
        ids = np.ascontiguousarray(spans[:, :-1]).reshape(-1, self._seq_len)
        targets = np.ascontiguousarray(spans[:, 1:]).reshape(-1, self._seq_len)
        return ids, targets
