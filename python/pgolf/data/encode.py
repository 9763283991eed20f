"""Documents to tokens, in one process or several, always in order."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pgolf.data.documents import RawDocument
from pgolf.data.tokenizer import Tokenizer

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
    if workers == 1 or len(first) < 2 or not sys.executable:
        opened = Tokenizer(tokenizer)
        for tag, chunk in tagged_chunks:
            yield tag, encode_chunk(opened, chunk)
        return
    with _Processes(tokenizer, workers) as processes:
        waiting: deque[tuple[Tag, Future[EncodedChunk]]] = deque()
        for tag, chunk in tagged_chunks:
            waiting.append((tag, processes.submit(chunk)))
            if len(waiting) >= 2 * workers:
                yield _finished(waiting)
        while waiting:
            yield _finished(waiting)


def _finished(waiting: deque[tuple[Tag, Future[EncodedChunk]]]) -> tuple[Tag, EncodedChunk]:
    tag, future = waiting.popleft()
    return tag, future.result()


# SentencePiece holds the interpreter's lock while it encodes, so that threads would not help; and multiprocessing runs
# the caller's script again in every process, so that a script without a `__main__` guard would start over without end.
_COMMAND = "import sys; sys.path[:] = {path!a}; from pgolf.data.encode import serve; serve({tokenizer!a})"
_READY = b"pgolf encodes from here on\n"


class _Processes:
    """Python processes that encode chunks: each started when it is needed, all ended together, whatever they do."""

    def __init__(self, tokenizer: Path, most: int) -> None:
        self._threads = ThreadPoolExecutor(most, "pgolf encode")  # each waits for one process
        self._command = _COMMAND.format(
            path=[os.fspath(entry) or os.getcwd() for entry in sys.path], tokenizer=os.fspath(tokenizer)
        )
        self._lock = threading.Lock()
        self._all: list[subprocess.Popen[bytes]] = []
        self._idle: list[subprocess.Popen[bytes]] = []
        self._ended = False

    def submit(self, documents: Sequence[RawDocument]) -> Future[EncodedChunk]:
        """What encode_chunk returns or raises in a process."""
        return self._threads.submit(self._encode, documents)

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._ended = True
        for process in self._all:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._all:
            with contextlib.suppress(BrokenPipeError):  # of a chunk that was on its way
                process.communicate()

    def _encode(self, documents: Sequence[RawDocument]) -> EncodedChunk:
        process = self._take()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump(documents, process.stdin)
            process.stdin.flush()
            answer: EncodedChunk | Exception = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise ChildProcessError(
                f"A process that encodes text ended before its work was done (exit code {process.wait()}). Where the "
                "memory was not enough, fewer need less: workers=1."
            ) from None
        with self._lock:
            self._idle.append(process)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _take(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._ended:
                raise RuntimeError("Encoding has ended.")
            if self._idle:
                return self._idle.pop()
            process = subprocess.Popen(
                [sys.executable, "-c", self._command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is the parent's to answer
            )
            self._all.append(process)
        assert process.stdout is not None
        while line := process.stdout.readline():  # past what a site's own start-up may print
            if line == _READY:
                break
        return process


def serve(tokenizer: str) -> None:
    """What a process of encode's does: chunks from standard input, tokens to standard output, until the input ends.

    It ends with its parent, whose death closes both.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for systems without sessions
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints here prints elsewhere
    opened = Tokenizer(tokenizer)
    answers.write(_READY)
    answers.flush()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            documents = pickle.load(sys.stdin.buffer)
            answer: EncodedChunk | Exception
            try:
                answer = encode_chunk(opened, documents)
            except Exception as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()
