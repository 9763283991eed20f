"""What a data set is declared to hold, by whom, and whether that is what lies there (docs/spec.md §6).

The first of these that speaks of a folder declares it: pgolf's `manifest.json`; the community's, in the folder or up to
three above it; the record that a run or an artifact keeps of the data that it was validated on. A score is of the
declared validation split as a whole or it is refused: a shard that was cut, copied or replaced changes bits per byte
without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pgolf.common.errors import FormatError
from pgolf.data.manifest import NAME, Manifest, SplitEntry
from pgolf.data.shard_file import ShardFile
from pgolf.data.shards import ShardSet, shards_of

if TYPE_CHECKING:
    from pgolf.data.tokenizer import Tokenizer

PGOLF, COMMUNITY, RUN, ARTIFACT = "pgolf", "community", "run", "artifact"
"""Who declares: `Score.audit.declared_by`."""

_FOLDERS_ABOVE = 3
"""The community's scripts keep `manifest.json` two above the shards, beside `datasets/` and `tokenizers/`."""


@dataclass(frozen=True)
class Split:
    """One split as it is declared; None for what is not said.

    shards: tokens of each file, by name. files, tokens, documents: of all. shard_tokens: of every shard but the last.
    text_bytes: UTF-8 bytes that the tokens spell. source_bytes: of the original text. sha256: the fingerprint of the
    shards (`pgolf.data.shards.ShardSet.fingerprint`). partial: the folder may hold the first shards alone.
    """

    shards: Mapping[str, int] | None = None
    files: int | None = None
    tokens: int | None = None
    documents: int | None = None
    shard_tokens: int | None = None
    text_bytes: int | None = None
    source_bytes: int | None = None
    sha256: str | None = None
    partial: bool = False


@dataclass(frozen=True)
class DeclaredTokenizer:
    """A tokenizer as it is declared; None for what is not said.

    identity: as `pgolf.Tokenizer.identity`. sha256: of the model's file. path: where that file is, or should be.
    """

    identity: str | None = None
    sha256: str | None = None
    path: Path | None = None
    vocab_size: int | None = None
    bos_id: int | None = None

    def describes(self, tokenizer: Tokenizer) -> bool | None:
        """Whether this is the declared tokenizer; None where too little is said to tell."""
        for said, found in ((self.vocab_size, tokenizer.vocab_size), (self.bos_id, tokenizer.bos_id)):
            if said is not None and said != found:
                return False
        if self.sha256 == tokenizer.sha256:
            return True
        identity = self.identity or self._identity_of_file()
        if identity is not None:
            return identity == tokenizer.identity
        if self.sha256 is not None:
            return False
        return None if self.path is None else self.path.name == tokenizer.path.name

    def _identity_of_file(self) -> str | None:
        """That of the declared file, where it is there and is the declared one."""
        from pgolf.data.tokenizer import Tokenizer

        if self.path is None or not self.path.is_file():
            return None
        try:
            there = Tokenizer(self.path)
        except FormatError:
            return None
        return there.identity if self.sha256 in (None, there.sha256) else None

    def name(self) -> str:
        """How a sentence calls it."""
        if self.path is not None:
            return self.path.name
        return f"the one with the identity {self.identity[:12]}…" if self.identity else "another one"


@dataclass(frozen=True)
class Declaration:
    """Who declares, where that stands (for sentences), the splits "train" and "val", and the tokenizer."""

    by: str
    source: str
    splits: Mapping[str, Split]
    tokenizer: DeclaredTokenizer | None = None

    def split(self, name: str) -> Split:
        """A split; one that is not declared says nothing."""
        return self.splits.get(name, Split())


@dataclass(frozen=True)
class Record:
    """What a run or an artifact keeps of its validation data and its tokenizer, to be found again by a score.

    by: RUN or ARTIFACT. source: the file, for sentences. tokenizer: {"identity", "vocab_size", "bos_id"}. validation:
    a `Split`'s fields. byte_basis: "decoded" or "sidecar". All may be None, as in files of versions before there were
    records.
    """

    by: str
    source: str
    tokenizer: Mapping[str, Any] | None = None
    validation: Mapping[str, Any] | None = None
    byte_basis: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """What is kept, without who keeps it."""
        return {"tokenizer": self.tokenizer, "validation": self.validation, "byte_basis": self.byte_basis}

    @classmethod
    def of(cls, by: str, source: str, values: Mapping[str, Any]) -> Record:
        """Read what `to_dict` wrote; other keys are left alone. Raises FormatError, naming the source."""
        tokenizer, validation = values.get("tokenizer"), values.get("validation")
        record = cls(by, source, tokenizer, validation, values.get("byte_basis"))
        for name, value in (("tokenizer", tokenizer), ("validation", validation)):
            if value is not None and not isinstance(value, Mapping):
                raise FormatError(f"{source}: {name} is {value!r:.100}; an object or null was expected.")
        try:
            record.declared_tokenizer(), record.split()
        except (TypeError, ValueError) as error:
            raise FormatError(f"{source}: its record of the data cannot be read ({error}).") from None
        return record

    def declared_tokenizer(self) -> DeclaredTokenizer | None:
        if self.tokenizer is None:
            return None
        known = _known(self.tokenizer, {"identity": str, "vocab_size": int, "bos_id": int})
        return DeclaredTokenizer(**known) if known else None

    def split(self) -> Split | None:
        """The validation split; None where it is not known."""
        if self.validation is None:
            return None
        kinds = dict.fromkeys(("files", "tokens", "documents", "text_bytes", "source_bytes"), int)
        known = _known(self.validation, {"shards": dict, "sha256": str, **kinds})
        shards = known.get("shards")
        if shards is not None:
            _known(shards, dict.fromkeys(shards, int))
        return Split(**known)


def _known(values: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """The values under the known keys, without nulls. Raises ValueError for one of another kind."""
    found = {name: values[name] for name in kinds if values.get(name) is not None}
    for name, value in found.items():
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r:.100}")
    return found


def declaration_of(folder: Path, manifest: Manifest | None, record: Record | None = None) -> Declaration | None:
    """Who declares a data folder, or None. `manifest`: pgolf's in that folder; `record`: of the run or the artifact."""
    if manifest is not None:
        return _of_pgolf(folder, manifest)
    return _of_community(folder) or (None if record is None else _of_record(folder, record))


def _of_pgolf(folder: Path, manifest: Manifest) -> Declaration:
    named = manifest.tokenizer
    return Declaration(
        PGOLF,
        str(folder / NAME),
        {"train": _of_entry(manifest.train), "val": _of_entry(manifest.val)},
        DeclaredTokenizer(named.identity, named.sha256, folder / named.file, named.vocab_size),
    )


def _of_entry(entry: SplitEntry) -> Split:
    return Split(
        shards={shard.file: shard.tokens for shard in entry.shards},
        files=len(entry.shards),
        tokens=entry.tokens,
        documents=entry.documents,
        text_bytes=entry.text_bytes,
        source_bytes=entry.source_bytes,
    )


def _of_community(folder: Path) -> Declaration | None:
    """The manifest that the public preparation scripts write: its `datasets` list names this folder."""
    absolute = folder.absolute()
    for place in (absolute, *list(absolute.parents)[:_FOLDERS_ABOVE]):
        path = place / NAME
        try:
            values = json.loads(path.read_bytes())
            entry, named = _entry_of(values, absolute.name, alone=place == absolute)
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            continue  # none, or another program's
        model = named.get("model_path")
        stats, shard_tokens = entry["stats"], values.get("shard_size")
        val, train = (
            Split(
                files=_count(stats.get(f"files_{split}")),
                tokens=_count(stats.get(f"tokens_{split}")),
                documents=_count(stats.get(f"docs_{split}")),
                shard_tokens=_count(shard_tokens),
                partial=split == "train",
            )
            for split in ("val", "train")
        )
        if val.documents is None:
            val = replace(val, documents=_count(values.get("num_val_docs")))
        tokenizer = DeclaredTokenizer(
            path=None if not isinstance(model, str) else place / PurePosixPath(model),
            vocab_size=_count(entry.get("vocab_size")),
            bos_id=_count(entry.get("bos_id")),
        )
        return Declaration(COMMUNITY, str(path), {"val": val, "train": train}, tokenizer)
    return None


def _entry_of(values: Any, name: str, alone: bool) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The entry of a data set's folder and that of its tokenizer; raises KeyError and the like where there is none."""
    entries = values["datasets"]
    found = [entry for entry in entries if name in (entry.get("name"), PurePosixPath(str(entry.get("path"))).name)]
    if not found and alone and len(entries) == 1:
        found = entries  # the folder was given another name, and its manifest came with it
    (entry,) = found
    if not isinstance(entry["stats"], Mapping):
        raise TypeError("stats")
    tokenizers = {each["name"]: each for each in values.get("tokenizers", [])}
    return entry, tokenizers.get(entry.get("tokenizer_name"), {})


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _of_record(folder: Path, record: Record) -> Declaration | None:
    """The record of a run or an artifact, where this folder's validation shards have the names that it has.

    Shards of other names are other data, of which it says nothing.
    """
    split = record.split()
    if split is None:
        return None
    there = shards_of(folder, "val")
    if split.shards is None:
        if not there or split.sha256 != ShardSet(there).fingerprint()["sha256"]:
            return None
    elif split.shards.keys().isdisjoint(path.name for path in there):
        return None
    return Declaration(record.by, record.source, {"val": split}, record.declared_tokenizer())


def check_split(declaration: Declaration, name: str, paths: Sequence[Path]) -> None:
    """Compare the shards of a split with what is declared, by the tokens in their headers.

    Raises FileNotFoundError for a shard that is missing, FormatError for one that is not declared or has another number
    of tokens, or where their sum is another one; each names the file and who declares.
    """
    split = declaration.split(name)
    for sentence in _differences(declaration.source, name, split, paths):
        raise FormatError(sentence)
    recorded = None if split.shards is None else split.sha256
    if recorded is not None and ShardSet(paths).fingerprint()["sha256"] != recorded:
        raise FormatError(
            f"{paths[0].parent}: the {name} shards have the names and the tokens that {declaration.source} has "
            f"recorded, but other content. {_OTHER_DATA}"
        )


_OTHER_DATA = (
    "To score other data, give it a manifest.json (`pgolf data prepare` and `pgolf data download` write one), or name "
    "a single shard."
)


def _differences(source: str, name: str, split: Split, paths: Sequence[Path]) -> Iterator[str]:
    found = {path: ShardFile.open(path).tokens for path in paths}
    remedy = "" if split.sha256 is None else f" {_OTHER_DATA}"
    if split.shards is not None:
        names = {path.name for path in found}
        for missing in (shard for shard in split.shards if shard not in names):
            folder = paths[0].parent if paths else "the data folder"
            raise FileNotFoundError(f"{folder}: {source} lists the {name} shard {missing}, which is missing.{remedy}")
        for path, tokens in found.items():
            if path.name not in split.shards:
                yield f"{path}: {source} does not list this {name} shard; remove it, or prepare the data again.{remedy}"
            elif tokens != split.shards[path.name]:
                said = split.shards[path.name]
                yield f"{path}: the shard has {tokens:,} tokens; {source} says {said:,}.{remedy}"
        return
    if split.files is not None and (len(found) > split.files or (len(found) < split.files and not split.partial)):
        yield f"{paths[0].parent}: there are {len(found):,} {name} shards; {source} says {split.files:,}."
    if split.shard_tokens is not None and split.files is not None:
        for index, (path, tokens) in enumerate(found.items()):
            last = index == split.files - 1
            if tokens != split.shard_tokens and not last:
                yield f"{path}: the shard has {tokens:,} tokens; {source} says {split.shard_tokens:,}."
    total = sum(found.values())
    if split.tokens is not None and total != split.tokens and (len(found) == split.files or not split.partial):
        yield (f"{paths[0].parent}: the {name} shards hold {total:,} tokens in all; {source} says {split.tokens:,}.")


def check_tokenizer(tokenizer: Tokenizer, said: Mapping[str, DeclaredTokenizer | None]) -> bool | None:
    """Whether a tokenizer is the one that each of `said`, by the name of the file that says so, declares.

    None where none declares enough to tell.

    Raises ValueError for another tokenizer, naming both and who declares.
    """
    bound: bool | None = None
    for source, declared in said.items():
        known = None if declared is None else declared.describes(tokenizer)
        if known is False:
            assert declared is not None
            raise ValueError(
                f"The tokenizer {tokenizer.path} is not the one of {source}, which names {declared.name()}: "
                f"{_difference(tokenizer, declared)}. Bytes counted by another tokenizer are not the text's. Give the "
                "right one, or score with this one all the same, which the score says (any_tokenizer=True, "
                "--any-tokenizer)."
            )
        bound = known if bound is None else bound
    return bound


def _difference(tokenizer: Tokenizer, declared: DeclaredTokenizer) -> str:
    if declared.vocab_size not in (None, tokenizer.vocab_size):
        return f"it has {tokenizer.vocab_size:,} pieces, the other {declared.vocab_size:,}"
    if declared.bos_id not in (None, tokenizer.bos_id):
        return f"its documents begin with the id {tokenizer.bos_id}, the other's with {declared.bos_id}"
    identity = declared.identity or declared._identity_of_file()
    if identity is None and declared.sha256 is not None:
        return f"its file has the SHA-256 {tokenizer.sha256[:12]}…, the other's {declared.sha256[:12]}…"
    if identity is None:
        return "it has another name"
    return f"pieces, types and normaliser have the SHA-256 {tokenizer.identity[:12]}…, the other's {identity[:12]}…"


def record_of_split(split: Split) -> dict[str, Any]:
    """A split as a Record's `validation` keeps it, without what is not known."""
    values = {name: value for name, value in asdict(split).items() if value is not None}
    for name in ("partial", "shard_tokens"):
        values.pop(name, None)
    return values
