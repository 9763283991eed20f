"""What is in a data folder, or in one shard: read block by block, so that any size takes the same memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf.common.errors import FormatError
from pgolf.common.files import file_sha256
from pgolf.common.types import StrPath
from pgolf.data import manifest
from pgolf.data.declared import declaration_of
from pgolf.data.folder import find_data, find_tokenizer
from pgolf.data.manifest import Manifest
from pgolf.data.shard_file import ShardFile
from pgolf.data.shards import is_sidecar
from pgolf.data.stats import BLOCK_TOKENS, TokenStats
from pgolf.data.tokenizer import Tokenizer

SAMPLE_TOKENS = 64
"""A sample shows so many tokens of its document at most."""


@dataclass(frozen=True)
class Counts:
    """Counts over the tokens of a shard or a split."""

    tokens: int
    documents: int | None
    """Documents that begin here: the number of BOS tokens; None where no BOS token is known."""
    text_bytes: int | None
    """UTF-8 bytes that the tokens spell; None without a tokenizer that has all of them."""
    min_id: int | None
    """The smallest token id; None where no token could be read."""
    max_id: int | None
    mean_document: float | None
    """Tokens per document, BOS included, a last one that is cut as far as it goes; None where there is none."""
    median_document: float | None

    @classmethod
    def of(cls, stats: TokenStats, bos_id: int) -> Counts:
        """The counts that a report shows, of tokens whose documents begin with `bos_id`; −1: unknown."""
        return cls(
            stats.tokens,
            stats.documents if bos_id >= 0 else None,
            stats.text_bytes if stats.tokens else None,
            stats.low,
            stats.high,
            stats.mean_document,
            stats.median_document,
        )


@dataclass(frozen=True)
class ShardReport:
    """One shard."""

    file: str
    bytes: int
    counts: Counts
    sha256: str | None
    """The digest of the file's bytes where it was asked for; else None."""
    samples: tuple[str, ...]
    """The beginnings of the first documents that begin in the shard, decoded; none without a tokenizer."""
    problem: str | None
    """A sentence where the shard is not what it should be; else None."""


@dataclass(frozen=True)
class DataReport:
    """A data folder, or one shard."""

    path: Path
    tokenizer: Path | None
    vocab_size: int | None
    """The tokenizer's; None where there is none."""
    manifest: Manifest | None
    shards: dict[str, tuple[ShardReport, ...]]
    """By split, "train" and "val"; for one shard "shard"."""
    totals: dict[str, Counts]
    """Each split as one stream: documents that go on in the next shard are whole here."""
    problems: tuple[str, ...]
    """A sentence for everything that is not what it should be; empty where all is well."""

    def to_dict(self) -> dict[str, Any]:
        """The report as values for JSON."""
        values = asdict(self)
        return {**values, "path": str(self.path), "tokenizer": None if self.tokenizer is None else str(self.tokenizer)}


def inspect_data(
    path: StrPath, tokenizer: StrPath | Tokenizer | None = None, samples: int = 1, *, verify: bool = False
) -> DataReport:
    """Read a data folder, or one shard, from end to end and count what is in it.

    tokenizer: for decoded samples, bytes of text and the vocabulary; None is the folder's own, where it has one.
    samples: documents to decode from every shard, at most SAMPLE_TOKENS tokens of each.
    verify: compare every file with its checksum in manifest.json.

    A broken shard, one that the tokenizer or the manifest contradicts, or one that changes while it is read, is a
    problem in the report and no error, so that the others are still seen.

    Raises FileNotFoundError where there is no such folder or shard, no shard in the folder, or no tokenizer at the
    given path; ValueError for a negative `samples`, and where `verify` finds no manifest; FormatError where the
    manifest or the tokenizer cannot be read.
    """
    path = Path(path)
    if samples < 0:
        raise ValueError(f"samples is {samples}; it must be at least 0.")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such data folder or shard.")
    splits: dict[str, tuple[Path, ...]]
    if path.is_file():
        if is_sidecar(path):
            raise ValueError(f"{path}: this is a byte sidecar: it holds the bytes of the tokens of another shard.")
        folder, made, splits = path.parent, Manifest.find(path.parent), {"shard": (path,)}
        declaration = declaration_of(folder, made)
        found = find_tokenizer(folder, made)
    else:
        data = find_data(path, splits=())
        folder, made, found, declaration = path, data.manifest, data.tokenizer, data.declaration
        splits = {name: shards for name, shards in (("train", data.train), ("val", data.val)) if shards}
        if not splits:
            raise FileNotFoundError(f"{path}: the folder holds no *_train_*.bin and no *_val_*.bin shard.")
    if verify and made is None:
        raise ValueError(f"{folder}: there is no {manifest.NAME} of pgolf's with checksums to verify the shards by.")
    opened = tokenizer if isinstance(tokenizer, Tokenizer) else _open(tokenizer or found)
    declared = None if declaration is None else declaration.tokenizer
    bos_id = opened.bos_id if opened is not None else -1
    if opened is None and declared is not None and declared.bos_id is not None:
        bos_id = declared.bos_id
    inspection = _Inspection(opened, bos_id, made, samples, verify)
    reports: dict[str, tuple[ShardReport, ...]] = {}
    totals = {}
    for name, paths in splits.items():
        seen = [inspection.shard(shard) for shard in paths]
        reports[name] = tuple(report for report, _ in seen)
        totals[name] = Counts.of(sum((stats for _, stats in seen), TokenStats()), bos_id)
    problems = [report.problem for group in reports.values() for report in group if report.problem is not None]
    if verify and made is not None and opened is not None and opened.sha256 != made.tokenizer.sha256:
        problems.append(
            f"{opened.path}: the tokenizer's SHA-256 is {opened.sha256}; {manifest.NAME} says {made.tokenizer.sha256}."
        )
    elif (
        opened is not None and declared is not None and declaration is not None and declared.describes(opened) is False
    ):
        problems.append(f"{opened.path}: this is not the tokenizer that {declaration.source} names, {declared.name()}.")
    return DataReport(
        path,
        None if opened is None else opened.path,
        None if opened is None else opened.vocab_size,
        made,
        reports,
        totals,
        tuple(problems),
    )


def count_shard(shard: ShardFile, bos_id: int, tokenizer: Tokenizer | None = None) -> TokenStats:
    """The counts of one shard, block by block. Raises FormatError where the file changes meanwhile."""
    table = None if tokenizer is None else tokenizer.byte_table
    return sum(
        (
            TokenStats.of(shard.read(start, BLOCK_TOKENS), bos_id, table)
            for start in range(0, shard.tokens, BLOCK_TOKENS)
        ),
        TokenStats(),
    )


class _Inspection:
    """What is asked of every shard."""

    def __init__(
        self, tokenizer: Tokenizer | None, bos_id: int, made: Manifest | None, samples: int, verify: bool
    ) -> None:
        self.tokenizer, self.bos_id = tokenizer, bos_id
        self.listed = {} if made is None else made.shards()
        self.samples = samples
        self.verify = verify

    def shard(self, path: Path) -> tuple[ShardReport, TokenStats]:
        """A shard's report and counts; with a problem the counts may be those of no token."""
        stats = TokenStats()
        samples: tuple[str, ...] = ()
        sha256 = problem = None
        size = path.stat().st_size
        try:
            shard = ShardFile.open(path)
            stats = count_shard(shard, self.bos_id, self.tokenizer)
            sha256 = file_sha256(path) if self.verify else None
            problem = self._problem(path, stats, sha256)
            samples = self._samples(shard) if problem is None else ()
        except FormatError as error:
            problem = str(error)
        return ShardReport(path.name, size, Counts.of(stats, self.bos_id), sha256, samples, problem), stats

    def _problem(self, path: Path, stats: TokenStats, sha256: str | None) -> str | None:
        """What contradicts the tokenizer or the manifest."""
        listed = self.listed.get(path.name)
        if self.tokenizer is not None and stats.high is not None and stats.high >= self.tokenizer.vocab_size:
            return (
                f"{path}: the largest token is {stats.high}; the tokenizer {self.tokenizer.path} has "
                f"{self.tokenizer.vocab_size:,} tokens, up to {self.tokenizer.vocab_size - 1}."
            )
        if listed is not None and listed.tokens != stats.tokens:
            return f"{path}: the shard has {stats.tokens:,} tokens; {manifest.NAME} says {listed.tokens:,}."
        if self.verify and listed is None:
            return f"{path}: {manifest.NAME} does not list this shard."
        if sha256 is not None and listed is not None and listed.sha256 != sha256:
            return f"{path}: the shard's SHA-256 is {sha256}; {manifest.NAME} says {listed.sha256}."
        return None

    def _samples(self, shard: ShardFile) -> tuple[str, ...]:
        """The first documents that begin in the shard; where none does, what it begins with."""
        if self.tokenizer is None or not self.samples:
            return ()
        starts: list[int] = []
        for block in range(0, shard.tokens, BLOCK_TOKENS):
            found = np.flatnonzero(shard.read(block, BLOCK_TOKENS) == self.bos_id)
            starts += (block + found[: self.samples - len(starts)]).tolist()
            if len(starts) == self.samples:
                break
        texts = []
        for start in starts or [0]:
            tokens = shard.read(start, SAMPLE_TOKENS)
            following = np.flatnonzero(tokens[1:] == self.bos_id)
            texts.append(self.tokenizer.decode(tokens[: following[0] + 1] if following.size else tokens))
        return tuple(texts)


def _open(path: StrPath | None) -> Tokenizer | None:
    return None if path is None else Tokenizer(path)
