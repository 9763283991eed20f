"""Token shards: writing and reading them, alone, as one stream, and as a data folder (docs/spec.md §6)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from pgolf.data.declared import Declaration, Record, check_split, declaration_of
from pgolf.data.files import atomic_write
from pgolf.data.manifest import Manifest
from pgolf.data.shard_file import HEADER_BYTES, MAX_TOKEN, ShardFile, shard_header
from pgolf.errors import FormatError

StrPath = Union[str, "os.PathLike[str]"]

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


@dataclass(frozen=True)
class DataFolder:
    """What find_data found.

    train, val: shard paths in name order. tokenizer: its path. manifest: pgolf's. declaration: who says what the folder
    holds. Each is None where there is none.
    """

    path: Path
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    tokenizer: Path | None
    manifest: Manifest | None
    declaration: Declaration | None = None


def find_data(data: StrPath, splits: tuple[str, ...] = ("train", "val"), record: Record | None = None) -> DataFolder:
    """Look at a data folder: `*_train_*.bin` and `*_val_*.bin` shards, a tokenizer, who declares what it holds.

    The tokenizer is the folder's only `*.model`, else the one that its manifest names, else None. `record`: what a run
    or an artifact has recorded of the data; it declares a folder without a manifest.

    The splits of `splits` must be those that are declared, by the tokens in the shards' headers: each file of pgolf's
    manifest and no other, the files and tokens that the community's counts, the shards that a run recorded.

    Raises FileNotFoundError where the folder is missing, a split of `splits` has no shard or lacks one that is
    declared, or a download is not complete; NotADirectoryError where `data` is a file; FormatError where the manifest
    cannot be read or a split is not what is declared.
    """
    folder = Path(data)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such data folder.")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: this is a file; a data folder with shards is expected.")
    manifest = Manifest.find(folder)
    if splits and manifest is not None and not manifest.is_complete:
        raise FileNotFoundError(
            f"{folder}: the download of this data folder was stopped before its end; the same `pgolf data download` "
            "goes on with it."
        )
    shards = {split: shards_of(folder, split) for split in ("train", "val")}
    if manifest is not None:
        for split in splits or ("train", "val"):
            for shard in getattr(manifest, split).shards:
                if not (folder / shard.file).is_file():
                    raise FileNotFoundError(f"{folder}: manifest.json lists the shard {shard.file}, which is missing.")
    for split in splits:
        if not shards[split]:
            raise FileNotFoundError(f"{folder}: the data folder holds no *_{split}_*.bin shard.")
    declaration = declaration_of(folder, manifest, record)
    if declaration is not None:
        for split in splits:
            check_split(declaration, split, shards[split])
    return DataFolder(folder, shards["train"], shards["val"], _tokenizer_of(folder, declaration), manifest, declaration)


def find_tokenizer(folder: Path, manifest: Manifest | None) -> Path | None:
    """The folder's only `*.model`, else the one that the manifest names, else None."""
    return _tokenizer_of(folder, declaration_of(folder, manifest))


def _tokenizer_of(folder: Path, declaration: Declaration | None) -> Path | None:
    models = sorted(folder.glob("*.model"))
    if len(models) == 1:
        return models[0]
    declared = None if declaration is None else declaration.tokenizer
    named = None if declared is None else declared.path
    return named if named is not None and named.is_file() else None


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


def load_tokens(data: Any, split: str = "val", vocab_size: int | None = None) -> NDArray[np.uint16] | NDArray[np.int32]:
    """All tokens of a data set in one array, for evaluation.

    `data`: a data folder (its `split` is read), one shard's path, or a 1-D integer array. A byte sidecar is refused.
    Returns an owned contiguous array of shape (tokens,): uint16 from files, int32 from arrays.

    Raises TypeError and ValueError for arrays of another dtype, shape or range, and the errors of find_data and
    read_shard.
    """
    if isinstance(data, (str, os.PathLike)):
        path = Path(data)
        paths = [path] if path.is_file() else getattr(find_data(path, splits=(split,)), split)
        shards = ShardSet(paths, vocab_size)
        return shards.read(0, len(shards))
    array = np.asarray(data)
    if array.dtype.kind not in "iu" and array.size:  # an empty list has no dtype of its own
        raise TypeError(f"token ids have dtype {array.dtype}; integers are expected.")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"token ids have shape {array.shape}; one dimension with at least one token is expected.")
    limit = 2**31 if vocab_size is None else vocab_size
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= limit:
        raise ValueError(f"token ids range from {low} to {high}; 0 to {limit - 1} is expected.")
    return np.array(array, dtype=np.int32, order="C")
