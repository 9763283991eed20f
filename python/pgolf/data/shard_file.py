"""One token shard: the file format of docs/spec.md §6, and reading it while other programs may touch it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pgolf.common.errors import FormatError

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
MAX_TOKEN = 2**16 - 1


def shard_header(count: int) -> bytes:
    """The 1,024 bytes that precede `count` tokens: 256 little-endian int32 (magic, version, count, 0 ...)."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, count
    return header.tobytes()


@dataclass(frozen=True)
class ShardFile:
    """A shard as it was when it was opened.

    It holds no descriptor and no map: a read opens the file anew. So a set of many shards takes none of the process's
    descriptors, threads and forked processes share no position, and a file cut short under a reader is an error, where
    touching a map of it would end the process.
    """

    path: Path
    tokens: int
    bytes: int
    mtime_ns: int

    @classmethod
    def open(cls, path: Path) -> ShardFile:
        """Read and check a shard's header.

        Raises FileNotFoundError where there is no such file, and FormatError, naming the file, what was found and what
        was expected, where it is not exactly one header followed by as many tokens as the header says.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such shard file.")
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            raw = file.read(HEADER_BYTES)
        count = _token_count(path, raw, state.st_size)
        return cls(path, count, state.st_size, state.st_mtime_ns)

    def read_into(self, start: int, out: NDArray[np.uint16]) -> None:
        """Fill `out`, a contiguous uint16 array of shape (n,), with the tokens from `start`; start + n ≤ tokens.

        Raises FormatError where the file was removed, cut, replaced or written to since it was opened.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(HEADER_BYTES + TOKEN_BYTES * start)
                whole = _read_all(file, out.view(np.uint8))
                # After the read, so that a change during it shows too.
                state = os.fstat(file.fileno())
        except (FileNotFoundError, NotADirectoryError):
            raise FormatError(f"{self.path}: the shard was removed while it was in use.") from None
        # Not the inode: network file systems may number one file anew whenever it is opened.
        if state.st_size != self.bytes:
            raise FormatError(
                f"{self.path}: the shard changed while it was in use: it had {self.bytes:,} bytes and has "
                f"{state.st_size:,} now."
            )
        if state.st_mtime_ns != self.mtime_ns or not whole:
            raise FormatError(
                f"{self.path}: the shard changed while it was in use: it was written to, or another file took its "
                "place, since it was opened."
            )
        if sys.byteorder == "big":
            out.byteswap(inplace=True)

    def read(self, start: int, count: int) -> NDArray[np.uint16]:
        """`count` tokens from `start`, fewer where the shard ends, as an owned array; raises read_into's errors."""
        out = np.empty(max(min(count, self.tokens - start), 0), dtype=np.uint16)
        self.read_into(start, out)
        return out


def _token_count(path: Path, raw: bytes, size: int) -> int:
    """The number of tokens in a header of a file of `size` bytes; raises FormatError where it is not a shard's."""
    if len(raw) < HEADER_BYTES:
        raise FormatError(
            f"{path}: the file has {size:,} bytes; a shard starts with a header of {HEADER_BYTES:,} bytes."
        )
    header = np.frombuffer(raw, dtype="<i4")
    magic, version, count = (int(value) for value in header[:3])
    if magic != MAGIC:
        raise FormatError(f"{path}: the first header field (magic) is {magic}; a token shard has {MAGIC}.")
    if version != VERSION:
        raise FormatError(f"{path}: the shard's version is {version}; pgolf reads version {VERSION}.")
    if count < 1:
        raise FormatError(f"{path}: the header says {count} tokens; a shard holds at least one.")
    reserved = np.flatnonzero(header[3:])
    if reserved.size:
        field = 3 + int(reserved[0])
        raise FormatError(f"{path}: header field {field} is {header[field]}; fields 3 to 255 of version 1 are 0.")
    expected = HEADER_BYTES + TOKEN_BYTES * count
    if size != expected:
        raise FormatError(
            f"{path}: the file has {size:,} bytes; its header says {count:,} tokens, which makes {expected:,} bytes."
        )
    return count


def _read_all(file: FileIO, out: NDArray[np.uint8]) -> bool:
    """Fill `out`; False where the file ends before it is full. One system call reads 2 GiB at most."""
    filled = 0
    while filled < out.size:
        count = file.readinto(out[filled:].data)
        if not count:
            return False
        filled += count
    return True
