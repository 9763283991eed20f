"""Documents to tokens, in one process or several, always in order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pgolf.data.documents import RawDocument
from pgolf.tokenizer import Tokenizer

CHUNK_BYTES = 2 * 1024 * 1024
"""Text that one process encodes at a time."""

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class EncodedChunk:
    """Consecutive documents as tokens, each behind a BOS."""

    tokens: NDArray[np.uint16]
    documents: int
    source_bytes: int
    """UTF-8 bytes of the documents."""
    text_bytes: int
    """UTF-8 bytes of the text that the tokens spell."""
    changed_documents: int
    """Documents that their tokens do not spell exactly."""


def chunks(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    """Documents in lists of about CHUNK_BYTES each."""
    chunk: list[RawDocument] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.raw)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode_chunk(tokenizer: Tokenizer, documents: Sequence[RawDocument]) -> EncodedChunk:
    """Encode documents and compare what the tokens spell with the text. Raises FormatError for broken documents."""
    tokens: list[int] = []
    source_bytes = text_bytes = changed = 0
    for document in documents:
        text = document.text()
        ids = tokenizer.encode(text)
        tokens.append(tokenizer.bos_id)
        tokens += ids
        spelled = tokenizer.decode(ids)
        source_bytes += len(text.encode())
        text_bytes += len(spelled.encode())
        changed += spelled != text
    return EncodedChunk(np.array(tokens, dtype=np.uint16), len(documents), source_bytes, text_bytes, changed)


def encode(
    tagged_chunks: Iterator[tuple[Tag, list[RawDocument]]], tokenizer: Path, workers: int
) -> Generator[tuple[Tag, EncodedChunk], None, None]:
    """Encode chunks over `workers` processes, in order and with the same result for any number of them.

    A chunk's tag comes back with its tokens. At most two chunks a worker are held at a time. A single chunk, or a
    single worker, needs no process of its own.
    """
    first = list(itertools.islice(tagged_chunks, 2))
    tagged_chunks = itertools.chain(first, tagged_chunks)
    if workers == 1 or len(first) < 2:
        opened = Tokenizer(tokenizer)
        for tag, chunk in tagged_chunks:
            yield tag, encode_chunk(opened, chunk)
        return
    pool = ProcessPoolExecutor(
        # Not fork: the native backend and the progress bar have threads, which do not survive one.
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer,),
    )
    try:
        waiting: deque[tuple[Tag, Future[EncodedChunk]]] = deque()
        for tag, chunk in tagged_chunks:
            waiting.append((tag, pool.submit(_encode_in_worker, chunk)))
            if len(waiting) >= 2 * workers:
                yield _finished(waiting)
        while waiting:
            yield _finished(waiting)
    except BrokenProcessPool:
        raise RuntimeError(
            "A process that encodes text ended before its work was done. In a script, call prepare below "
            "`if __name__ == '__main__':`, or with workers=1."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(waiting: deque[tuple[Tag, Future[EncodedChunk]]]) -> tuple[Tag, EncodedChunk]:
    tag, future = waiting.popleft()
    return tag, future.result()


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Path) -> None:
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = Tokenizer(tokenizer)


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers to stop."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(documents: Sequence[RawDocument]) -> EncodedChunk:
    return encode_chunk(_worker_tokenizer, documents)
