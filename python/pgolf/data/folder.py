"""A data folder: its shards, checked against what declares them, and its tokenizer (docs/spec.md §6)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pgolf.common.types import StrPath
from pgolf.data.declared import Declaration, Record, check_split, declaration_of
from pgolf.data.manifest import Manifest
from pgolf.data.shards import ShardSet, shards_of


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
