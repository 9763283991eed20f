"""Token shards: writing and reading them, alone and as one stream (docs/spec.md §6)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgolf import _moved
from pgolf.common.errors import FormatError
from pgolf.common.files import atomic_write
from pgolf.common.types import StrPath
from pgolf.data.shard_file import HEADER_BYTES, MAX_TOKEN, ShardFile, shard_header

FINGERPRINT_TOKENS = 4096

_SIDECAR = re.compile(r"(.*_(?:train|val))_bytes(_.*\.bin)")


def is_sidecar(path: Path) -> bool:
    """Whether a file has the name of a byte sidecar, `*_val_bytes_*.bin`: in a shard's format the bytes that each token
    of `*_val_*.bin` stands for, never tokens."""
    return _SIDECAR.fullmatch(path.name) is not None


def sidecar_of(shard: Path) -> Path:
    """The name that a shard's byte sidecar has: `x_val_bytes_000000.bin` of `x_val_000000.bin`."""
    return shard.with_name(re.sub(r"_(train|val)_", r"_\1_bytes_", shard.name, count=1))


def shards_of(folder: Path, split: str) -> tuple[Path, ...]:
    """The shards of a split, "train" or "val", in the order of their names; byte sidecars are not shards."""
    return tuple(path for path in sorted(folder.glob(f"*_{split}_*.bin")) if not is_sidecar(path))


def read_shard(path: StrPath) -> NDArray[np.uint16]:
    """Map a shard's tokens into memory.

    Returns a read-only uint16 array of shape (tokens,), backed by the file: nothing is loaded until it is read.

    Raises FileNotFoundError where there is no such file, and FormatError, naming the file, what was found and what was
    expected, where it is not exactly one header followed by as many tokens as the header says.
    """
    shard = ShardFile.open(Path(path))
    # A plain array over the map: slices then cost no np.memmap bookkeeping.
    return np.asarray(np.memmap(shard.path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(shard.tokens,)))


def write_shard(path: StrPath, tokens: Any) -> None:
    """Write a shard; an existing file is replaced whole, and an interrupted write leaves it as it was.

    `tokens` is a 1-D array of any integer dtype with at least one element and values 0..65535.

    Raises TypeError for other dtypes, ValueError for other shapes and values.
    """
    array = np.asarray(tokens)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{path}: tokens have dtype {array.dtype}; a shard needs integers.")
    if array.ndim != 1:
        raise ValueError(f"{path}: tokens have shape {array.shape}; a shard needs one dimension.")
    if not 1 <= array.size < 2**31:
        raise ValueError(f"{path}: there are {array.size:,} tokens; a shard holds 1 to 2,147,483,647.")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > MAX_TOKEN:
        raise ValueError(f"{path}: tokens range from {low} to {high}; a shard holds values from 0 to {MAX_TOKEN}.")
    with atomic_write(Path(path)) as file:
        file.write(shard_header(array.size))
        file.write(np.ascontiguousarray(array, dtype="<u2").data)


class ShardSet:
    """Several shards, in the order of their file names, as one stream of tokens that wraps around.

    Tokens are loaded when they are read and not before, and every read is checked: against the vocabulary, and for
    files that changed since the set was opened.

    `paths`: one or more shard files. `vocab_size`: tokens at or above it are refused; None accepts all of uint16.

    Raises ValueError where no path is given, and read_shard's errors.
    """

    def __init__(self, paths: Iterable[StrPath], vocab_size: int | None = None) -> None:
        self.paths = sorted((Path(path) for path in paths), key=lambda path: (path.name, str(path)))
        if not self.paths:
            raise ValueError("a shard set needs at least one shard file; none was given.")
        for path in filter(is_sidecar, self.paths):
            raise ValueError(f"{path}: this is a byte sidecar, which holds the bytes of tokens and no tokens.")
        self.vocab_size = vocab_size
        self._shards = [ShardFile.open(path) for path in self.paths]
        self._starts = np.cumsum([0] + [shard.tokens for shard in self._shards])
        self._sha256 = self._digest()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"ShardSet({len(self.paths)} shards from {self.paths[0].name}, {len(self):,} tokens)"

    def read(self, start: int, count: int) -> NDArray[np.uint16]:
        """`count` tokens from stream position `start` (≥ 0, taken modulo the length), as an owned uint16 array.

        Raises ValueError for a negative start or count, and FormatError where a token is not in the vocabulary or a
        shard was removed, cut, replaced or written to since the set was opened.
        """
        if start < 0 or count < 0:
            raise ValueError(f"start is {start} and count is {count}; both must be at least 0.")
        out = np.empty(count, dtype=np.uint16)
        position = start % len(self)
        filled = 0
        while filled < count:
            index = int(np.searchsorted(self._starts, position, side="right")) - 1
            offset = position - int(self._starts[index])
            shard = self._shards[index]
            part = out[filled : filled + shard.tokens - offset]
            shard.read_into(offset, part)
            self._check(index, offset, part)
            filled += part.size
            position = (position + part.size) % len(self)
        return out

    def tokens_by_name(self) -> dict[str, int]:
        """The tokens of every shard, by its file name."""
        return {shard.path.name: shard.tokens for shard in self._shards}

    def fingerprint(self) -> dict[str, Any]:
        """What tells this data from other data, to store with a run: {"shards", "tokens", "sha256"}, for JSON.

        The digest covers every shard's name, bytes and tokens, and the FINGERPRINT_TOKENS at either end of it, since
        exports of one text by two tokenizers may agree in all the rest. A copied or touched file has the same one. It
        was taken when the set was opened, so that a run whose data is gone can still be stored.
        """
        return {"shards": len(self._shards), "tokens": len(self), "sha256": self._sha256}

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for shard in self._shards:
            digest.update(json.dumps([shard.path.name, shard.bytes, shard.tokens]).encode())
            for start in (0, max(shard.tokens - FINGERPRINT_TOKENS, 0)):
                digest.update(shard.read(start, FINGERPRINT_TOKENS).astype("<u2").tobytes())
        return digest.hexdigest()

    def _check(self, index: int, offset: int, part: NDArray[np.uint16]) -> None:
        if self.vocab_size is None or int(part.max()) < self.vocab_size:
            return
        first = int(np.argmax(part >= self.vocab_size))
        raise FormatError(
            f"{self.paths[index]}: token {offset + first:,} is {part[first]}; "
            f"a vocabulary of {self.vocab_size:,} ends at {self.vocab_size - 1}."
        )


def read_sidecars(shards: Sequence[Path]) -> NDArray[np.uint16] | None:
    """The bytes that each token of some shards stands for, by their byte sidecars; None where they have none.

    Returns an owned array of shape (tokens,). Raises FormatError where some shards have a sidecar and others none, or
    one has another length than its shard.
    """
    sidecars = [sidecar_of(shard) for shard in shards]
    there = [path.is_file() for path in sidecars]
    if not any(there):
        return None
    if not all(there):
        raise FormatError(
            f"{sidecars[there.index(False)]}: this byte sidecar is missing, although "
            f"{sidecars[there.index(True)].name} is there; bytes are counted by sidecars for all shards or for none."
        )
    counts = []
    for shard, path in zip(map(ShardFile.open, shards), map(ShardFile.open, sidecars), strict=True):
        if shard.tokens != path.tokens:
            raise FormatError(
                f"{path.path}: the byte sidecar counts {path.tokens:,} tokens; its shard has {shard.tokens:,}."
            )
        counts.append(path.read(0, path.tokens))
    return np.concatenate(counts)


def __getattr__(name: str) -> Any:
    return _moved.name_of("data.shards", name)
