"""manifest.json: what a prepared or downloaded data folder holds, with checksums."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pgolf.data.files import atomic_write
from pgolf.errors import FormatError

NAME = "manifest.json"
FORMAT = "pgolf-data-1"


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its file name in the folder, its tokens, its SHA-256."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class SplitEntry:
    """The counts of one split."""

    documents: int
    tokens: int
    source_bytes: int | None
    """UTF-8 bytes of the documents as they were given; None where the tokens came without them."""
    text_bytes: int
    """UTF-8 bytes of the documents as their tokens spell them: after normalisation."""
    changed_documents: int | None
    """Documents that their tokens do not spell exactly; None where the tokens came without them."""
    shards: tuple[ShardEntry, ...]


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer: its file name in the folder, its SHA-256, what it is."""

    file: str
    sha256: str
    vocab_size: int
    normalization: str


@dataclass(frozen=True)
class HubEntry:
    """Where a downloaded folder came from."""

    repo: str
    revision: str
    """The commit."""
    variant: str
    train_shards: int
    """Shards that the export has, whether downloaded or not."""
    val_shards: int


@dataclass(frozen=True)
class Manifest:
    """The whole of manifest.json."""

    pgolf: str
    """The version of pgolf that wrote it."""
    sources: tuple[str, ...]
    tokenizer: TokenizerEntry
    train: SplitEntry
    val: SplitEntry
    hub: HubEntry | None = None
    """Where the shards were downloaded from; None where they were prepared here."""

    def shards(self) -> dict[str, ShardEntry]:
        """Every shard by its file name, training first."""
        return {shard.file: shard for split in (self.train, self.val) for shard in split.shards}

    def write(self, path: Path) -> None:
        """Write the manifest as JSON; an existing file is replaced whole."""
        with atomic_write(path) as file:
            file.write(json.dumps({"format": FORMAT, **asdict(self)}, indent=2).encode() + b"\n")

    @property
    def is_complete(self) -> bool:
        """False while a download has not brought every validation shard, which come last."""
        return self.hub is None or len(self.val.shards) == self.hub.val_shards

    @classmethod
    def find(cls, folder: Path) -> Manifest | None:
        """The manifest of a data folder; None where there is none, or one that another program wrote.

        Raises FormatError, naming the file, where pgolf's manifest is damaged.
        """
        path = folder / NAME
        if not path.is_file():
            return None
        try:
            raw = json.loads(path.read_bytes())
        except ValueError as error:
            raise FormatError(f"{path}: this is not JSON ({error}).") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            return None
        try:
            return cls(
                pgolf=raw["pgolf"],
                sources=tuple(raw["sources"]),
                tokenizer=TokenizerEntry(**raw["tokenizer"]),
                train=_split(**raw["train"]),
                val=_split(**raw["val"]),
                hub=None if raw.get("hub") is None else HubEntry(**raw["hub"]),
            )
        except (KeyError, TypeError) as error:
            raise FormatError(f"{path}: the manifest's fields are not those that pgolf writes ({error}).") from None


def _split(shards: list[dict[str, Any]], **counts: Any) -> SplitEntry:
    return SplitEntry(shards=tuple(ShardEntry(**shard) for shard in shards), **counts)
