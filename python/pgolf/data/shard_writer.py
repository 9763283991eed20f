"""Writing a split as shards while its tokens are still being made."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pgolf.common.files import file_sha256, naming
from pgolf.data.manifest import ShardEntry
from pgolf.data.shard_file import HEADER_BYTES, shard_header


class ShardWriter:
    """Appends tokens to `pgolf_{split}_000000.bin`, `..._000001.bin` and so on, `shard_tokens` tokens to a file.

    A shard's header is written when its last token is: until then the file is not a shard. Use it as a context manager.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int) -> None:
        self._folder = folder
        self._split = split
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._paths: list[Path] = []
        self._counts: list[int] = []

    def write(self, tokens: NDArray[np.uint16]) -> None:
        """Append tokens, of shape (n,)."""
        data = tokens.astype("<u2", copy=False)
        while data.size:
            file = self._file or self._open()
            part = data[: self._shard_tokens - self._counts[-1]]
            with naming(self._paths[-1]):
                file.write(part.tobytes())
            self._counts[-1] += part.size
            data = data[part.size :]
            if self._counts[-1] == self._shard_tokens:
                self._finish(file)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        try:
            if kind is None:
                self._finish(self._file)
        finally:
            if self._file is not None:
                with contextlib.suppress(OSError):  # of what a full disk did not take, which has been said
                    self._file.close()

    def entries(self) -> tuple[ShardEntry, ...]:
        """The finished shards, for the manifest."""
        return tuple(
            ShardEntry(path.name, count, file_sha256(path))
            for path, count in zip(self._paths, self._counts, strict=True)
        )

    def _open(self) -> BinaryIO:
        self._paths.append(self._folder / f"pgolf_{self._split}_{len(self._paths):06d}.bin")
        self._counts.append(0)
        self._file = self._paths[-1].open("wb")
        with naming(self._paths[-1]):
            self._file.write(bytes(HEADER_BYTES))
        return self._file

    def _finish(self, file: BinaryIO) -> None:
        with naming(self._paths[-1]):
            file.seek(0)
            file.write(shard_header(self._counts[-1]))
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._file = None
