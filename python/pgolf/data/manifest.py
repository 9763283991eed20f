"""manifest.json: what a prepared or downloaded data folder holds, with checksums."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

from pgolf.common.errors import FormatError
from pgolf.common.files import atomic_write
from pgolf.data.tokenizer import Tokenizer

NAME = "manifest.json"
FORMAT = "pgolf-data-1"

_Entry = TypeVar("_Entry")


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
    identity: str | None = None
    """SHA-256 of pieces, types and normaliser, as `pgolf.Tokenizer.identity`; None in files of 0.1.0."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerEntry:
        """The entry of a tokenizer that lies in the folder."""
        return cls(
            tokenizer.path.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.normalizer, tokenizer.identity
        )


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
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}: this is not JSON ({error}).") from None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            return None
        try:
            return _entry(
                cls,
                pgolf=raw["pgolf"],
                sources=tuple(_strings(raw["sources"])),
                tokenizer=_entry(TokenizerEntry, **raw["tokenizer"]),
                train=_split(**raw["train"]),
                val=_split(**raw["val"]),
                hub=None if raw.get("hub") is None else _entry(HubEntry, **raw["hub"]),
            )
        except (KeyError, TypeError) as error:
            # What a damaged file holds may be long.
            reason = str(error)[:500]
            raise FormatError(f"{path}: the manifest's fields are not those that pgolf writes ({reason}).") from None


def _split(shards: list[dict[str, Any]], **counts: Any) -> SplitEntry:
    return _entry(SplitEntry, shards=tuple(_entry(ShardEntry, **shard) for shard in shards), **counts)


def _entry(cls: type[_Entry], **values: Any) -> _Entry:
    """An entry of the manifest; raises TypeError, naming the field, where a value cannot be that field's."""
    entry = cls(**values)
    for name, kind in _TYPES[cls].items():
        value = getattr(entry, name)
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not right or (isinstance(value, int) and value < 0) or (name == "file" and not _is_file_name(value)):
            raise TypeError(f"{name} is {value!r}")
    return entry


def _strings(values: Any) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"sources is {values!r}")
    return values


def _is_file_name(name: str) -> bool:
    """Whether this is the name of a file in the manifest's own folder, on any system."""
    if name in ("", "..") or not name.isprintable():
        return False
    return Path(name).name == name and "\\" not in name and len(name.encode()) <= 255


# The class of each field's values; tuples without their elements' type, which isinstance does not take.
_TYPES: dict[type[Any], dict[str, Any]] = {
    cls: {name: tuple if get_origin(kind) is tuple else kind for name, kind in get_type_hints(cls).items()}
    for cls in (ShardEntry, SplitEntry, TokenizerEntry, HubEntry, Manifest)
}
