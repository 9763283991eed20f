"""Test-time training: which chunks of which documents go together, and their scores (docs/spec.md §5).

Every document has low-rank adapters of its own. A document is cut into chunks of targets; a chunk is scored in a window
that ends with it, and then, unless it is the document's last, the adapters take one Adam step on its mean loss. One
forward pass does both: the native code writes a window's losses before it trains, so that no target is scored by
numbers that have seen it.

Documents are scored in batches. Windows are padded to shapes that depend on the chunk's place in its document alone,
and batches to one number of rows, so that a document's scores have the same bits in every batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pgolf.scoring.windows import IntArray, check_positive

if TYPE_CHECKING:
    from pgolf.model import GPT

BETA1, BETA2, EPS = 0.9, 0.95, 1e-10

_ROWS = 8  # a batch has a multiple of these rows, …
_TILE = 64  # … a window a multiple of these positions: every row then lies alike in the tiles of matrix products
_CPU_TOKENS = 16_384  # of a pass on the CPU, whose scores do not depend on how many documents it takes
_AHEAD = 1  # windows that are computed while the one before is summed up


@dataclass(frozen=True)
class Settings:
    """The [eval] table's ttt_ keys.

    rank: of the adapters. lr: Adam's rate. chunk: targets scored, then trained on, together. context: tokens of a
    window, at least a chunk. batch: documents at once. seed: 0 … 2⁶⁴ − 1, which with a document's index decides its
    adapters.
    """

    rank: int = 8
    lr: float = 0.01
    chunk: int = 256
    context: int = 1024
    batch: int = 64
    seed: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any], seed: int = 0) -> Settings:
        """From the ttt_ keys that are given; others are left alone."""
        names = {
            "rank": "ttt_lora_rank",
            "lr": "ttt_lora_lr",
            "chunk": "ttt_chunk_size",
            "context": "ttt_eval_seq_len",
            "batch": "ttt_batch_size",
        }
        return cls(**{name: values[key] for name, key in names.items() if values.get(key) is not None}, seed=seed)

    def __post_init__(self) -> None:
        check_positive(
            ttt_lora_rank=self.rank,
            ttt_chunk_size=self.chunk,
            ttt_eval_seq_len=self.context,
            ttt_batch_size=self.batch,
        )
        if self.chunk > self.context:
            raise ValueError(
                f"ttt_chunk_size is {self.chunk}; expected at most ttt_eval_seq_len = {self.context}, the context "
                "that a chunk is scored in."
            )
        if not 0 <= self.lr < float("inf"):
            raise ValueError(f"ttt_lora_lr is {self.lr}; expected a number from 0.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)):
            raise TypeError(f"ttt_seed is {self.seed!r}; expected an integer.")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"ttt_seed is {self.seed}; expected 0 to 2**64 - 1.")


@dataclass(frozen=True)
class Documents:
    """D documents of a stream, each with at least one target.

    index: (D,) int64, the document's number in the stream. start: (D,) int64, its first token. targets: (D,) int64; the
    last is the next document's BOS token, or the stream's last token.
    """

    index: IntArray
    start: IntArray
    targets: IntArray

    @classmethod
    def of(cls, starts: IntArray, n_targets: int) -> Documents:
        """starts: where documents begin, as from audit.document_starts, in a stream of n_targets + 1 tokens."""
        targets = np.diff(np.append(starts, n_targets))
        kept = np.flatnonzero(targets > 0)  # all but a BOS token that ends the stream
        return cls(kept, starts[kept], targets[kept])

    def chunks(self, size: int) -> IntArray:
        """(D,) int64: chunks of each document."""
        return -(-self.targets // size)


@dataclass(frozen=True)
class Window:
    """The window of a chunk's place in its document: the c-th chunk's, for every document.

    context: tokens that it has where the chunk is whole. length: the same, padded. first: position from which the head
    computes; the chunk's targets lie behind it.
    """

    context: int
    length: int
    first: int

    @classmethod
    def of(cls, chunk: int, settings: Settings) -> Window:
        context = min((chunk + 1) * settings.chunk, settings.context)
        return cls(context, _up(context, _TILE), (context - settings.chunk) // _TILE * _TILE)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Part:
    """One pass: the c-th chunk of every document of a batch that has one.

    documents: (n,) int64 positions in Documents, whose rows of the batch are `rows`. start: (n,) int64, each window's
    first token in the stream. scored: (n, 2) int64, the positions of the chunk in the window: from, to. trains: (n,)
    whether the document has a chunk after this one.
    """

    chunk: int
    window: Window
    rows: IntArray
    documents: IntArray
    start: IntArray
    scored: IntArray
    trains: npt.NDArray[np.bool_]


def plan(documents: Documents, settings: Settings, batch: int) -> Iterator[Part]:
    """Every chunk of every document once: batches of documents in order of their number of chunks, chunk by chunk."""
    count = documents.chunks(settings.chunk)
    order = np.argsort(count, kind="stable")
    for begin in range(0, order.size, batch):
        members = order[begin : begin + batch]
        for chunk in range(int(count[members].max())):
            rows = np.flatnonzero(count[members] > chunk)
            here = members[rows]
            end = np.minimum((chunk + 1) * settings.chunk, documents.targets[here])
            start = np.maximum(end - settings.context, 0)
            scored = np.stack([chunk * settings.chunk - start, end - start], axis=1)
            window = Window.of(chunk, settings)
            yield Part(chunk, window, rows, here, documents.start[here] + start, scored, count[here] > chunk + 1)


def score(
    model: GPT,
    tokens: npt.NDArray[Any],
    documents: Documents,
    settings: Settings,
    progress: Callable[[int, int, int], object] | None = None,
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
    """Score documents of a stream by test-time training.

    tokens: (N + 1,) integers below the model's vocabulary. progress: called after every pass with chunks done, chunks
    in all, and targets scored.

    Returns the losses of all targets in nats, (N,) float32 (float64 for a float64 model), NaN for those of no document;
    and how often each was scored, (N,) int32.
    """
    from pgolf import _C  # here, because `import pgolf` imports this file

    count = documents.chunks(settings.chunk)
    losses = np.full(tokens.size - 1, np.nan, np.float64 if model.dtype == "float64" else np.float32)
    times = np.zeros(tokens.size - 1, dtype=np.int32)
    windows = list(dict.fromkeys(Window.of(chunk, settings) for chunk in range(int(count.max()))))
    shapes = list(dict.fromkeys((window.length, window.first) for window in windows))
    rows = _rows(model, settings, documents, max(length for length, _ in shapes))
    native = model._native
    adapters = _C.DocumentAdapters(native, rows, settings.rank, shapes, settings.seed, settings.lr, BETA1, BETA2, EPS)
    waiting: deque[tuple[Part, int]] = deque()
    done = scored = 0

    def land() -> None:
        nonlocal done, scored
        part, ticket = waiting.popleft()
        first = part.window.first
        found = native.wait_losses(ticket, rows, part.window.length - first)
        for row, start, (begin, end) in zip(part.rows, part.start, part.scored, strict=True):
            losses[start + begin : start + end] = found[row, begin - first : end - first]
            times[start + begin : start + end] += 1
        done += part.rows.size
        scored += int((part.scored[:, 1] - part.scored[:, 0]).sum())
        if progress is not None:
            progress(done, int(count.sum()), scored)

    for part in plan(documents, settings, min(settings.batch, rows)):
        if part.chunk == 0:
            adapters.begin(_in_rows(rows, part, documents.index[part.documents], -1))
        ids, targets = _gather(tokens, part, rows)
        steps = np.where(part.trains, part.chunk + 1, 0)
        ticket = adapters.window(
            ids, targets, _in_rows(rows, part, part.scored, 0), _in_rows(rows, part, steps, 0), part.window.first
        )
        waiting.append((part, ticket))
        if len(waiting) > _AHEAD:
            land()
    while waiting:
        land()
    return losses, times


def _rows(model: GPT, settings: Settings, documents: Documents, longest: int) -> int:
    """Rows of every pass. A GPU takes the batch as it is said: how its products round may depend on their height."""
    rows = settings.batch
    if model.device == "cpu":
        rows = max(min(rows, documents.start.size, _CPU_TOKENS // longest // _ROWS * _ROWS), 1)
    return _up(rows, _ROWS)


def _in_rows(rows: int, part: Part, values: npt.NDArray[Any], other: int) -> npt.NDArray[np.int32]:
    """(rows, …) int32: the part's values in its rows, `other` elsewhere."""
    out = np.full((rows, *values.shape[1:]), other, np.int32)
    out[part.rows] = values
    return out


def _gather(tokens: npt.NDArray[Any], part: Part, rows: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Inputs and targets of a pass, (rows, length); 0 beyond a window's end, which nothing before it sees."""
    positions = np.arange(part.window.length)
    inside = positions < part.scored[:, 1:]
    at = np.where(inside, part.start[:, None] + positions, 0)
    ids, targets = (np.zeros((rows, part.window.length), np.int32) for _ in range(2))
    ids[part.rows] = np.where(inside, tokens[at], 0)
    targets[part.rows] = np.where(inside, tokens[at + 1], 0)
    return ids, targets
