"""The published FineWeb export in a data folder: fetched, verified, and gone on with where it was stopped."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from pgolf.common.errors import FormatError
from pgolf.common.files import file_sha256
from pgolf.common.types import Progress, StrPath
from pgolf.data import manifest
from pgolf.data.hub import Hub, HubFile
from pgolf.data.inspection import count_shard
from pgolf.data.manifest import HubEntry, Manifest, ShardEntry, SplitEntry, TokenizerEntry
from pgolf.data.published import MANIFEST, Export, Split
from pgolf.data.shard_file import ShardFile
from pgolf.data.shards import shards_of
from pgolf.data.stats import TokenStats
from pgolf.data.tokenizer import Tokenizer

DEFAULT_REPO = "willdepueoai/parameter-golf"
DEFAULT_VARIANT = "sp1024"
DEFAULT_TRAIN_SHARDS = 80
"""Of 100 M tokens each: the challenge's training data."""

_PARTS = ".download"


"""Called as show(what, done, total), in bytes of all files."""


@dataclass(frozen=True)
class DownloadReport:
    """What download did."""

    path: Path
    """The data folder."""
    manifest: Manifest
    """What is in it now, as in manifest.json."""
    fetched_files: int
    """Files that came, in whole or in part, by this call; those that were there before do not count."""
    fetched_bytes: int
    seconds: float


def download(
    variant: str,
    out_dir: StrPath,
    *,
    train_shards: int = DEFAULT_TRAIN_SHARDS,
    repo: str = DEFAULT_REPO,
    revision: str | None = None,
    endpoint: str | None = None,
    progress: Progress | None = None,
) -> DownloadReport:
    """Fetch the published FineWeb export into a data folder: shards, their tokenizer, `manifest.json`.

    variant: the tokenizer's name in the export, such as "sp1024" for the one of 1,024 pieces.
    out_dir: made where it is missing. Files of the export that are there already are verified and kept; a download
        that was stopped goes on, and one with more train_shards fetches the rest (one with fewer removes none). Files
        are renamed into place when they are whole and verified, and find_data refuses the folder until all are there.
    train_shards: so many of the first training shards, or 0; validation always comes whole.
    repo, endpoint: the dataset repository, and the hub's address where it is not the usual one (HF_ENDPOINT).
    revision: a branch, tag or commit; None is the commit of what out_dir holds, else the main branch's.
    progress: is called as progress("downloading", done, total), in bytes.

    Every file is compared with the hub's size and digest, a shard also with its header, the manifest's token count
    and the tokenizer's vocabulary. Where out_dir holds all that is asked for, no network is needed.

    Raises ValueError for a variant or a number of shards that the export does not have, naming those that it has;
    FileNotFoundError for a missing repository, revision or file; FileExistsError where out_dir holds other data;
    FormatError for a file that is not what it should be; ConnectionError where the hub cannot be reached; other
    OSErrors where the disk is full or cannot be written; ImportError without the package huggingface-hub.
    """
    started = time.monotonic()
    out = Path(out_dir)
    if train_shards < 0:
        raise ValueError(f"train_shards is {train_shards}; it must be at least 0.")
    old = _recorded(out, repo, variant)
    held = None if old is None else old.hub
    if old is not None and held is not None:
        _check_train_shards(train_shards, held.train_shards, variant)
        if revision in (None, held.revision) and _is_complete(out, old, train_shards):
            return DownloadReport(out, old, 0, 0, time.monotonic() - started)
        revision = revision or held.revision
    hub = Hub(repo, endpoint)
    commit = hub.commit(revision)
    if held is not None and commit != held.revision:
        raise FileExistsError(
            f"{out}: the folder holds the commit {held.revision[:12]} of {repo}; {revision} is {commit[:12]}. "
            "Choose another folder."
        )
    export = _fetch_export(hub, commit, variant)
    _check_train_shards(train_shards, len(export.train.paths), variant)
    shards = train_shards if old is None else max(train_shards, len(old.train.shards))
    files = hub.files([export.tokenizer, *export.train.paths[:shards], *export.val.paths], commit)
    job = _Download(out, hub, commit, export, files, progress)
    made = job.run(old)
    return DownloadReport(out, made, job.fetched_files, job.fetched_bytes, time.monotonic() - started)


def _recorded(out: Path, repo: str, variant: str) -> Manifest | None:
    """The manifest of what an earlier call left; None where there is none. Other data is refused."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: this is a file; the output is a folder.")
    made = Manifest.find(out)
    if made is None and not (out / manifest.NAME).exists():
        return None
    hub = None if made is None else made.hub
    if hub is None:
        raise FileExistsError(f"{out}: the folder holds data that was not downloaded; choose another folder.")
    if (hub.repo, hub.variant) != (repo, variant):
        raise FileExistsError(f"{out}: the folder holds {hub.variant} of {hub.repo}; choose another folder.")
    return made


def _check_train_shards(wanted: int, there: int, variant: str) -> None:
    if wanted > there:
        raise ValueError(f"train_shards is {wanted}; {variant} has {there} training shards.")


def _is_complete(out: Path, made: Manifest, train_shards: int) -> bool:
    return (
        made.is_complete
        and len(made.train.shards) >= train_shards
        and (out / made.tokenizer.file).is_file()
        and all(_has_tokens(out / name, shard.tokens) for name, shard in made.shards().items())
    )


def _has_tokens(path: Path, tokens: int) -> bool:
    try:
        return ShardFile.open(path).tokens == tokens
    except (FileNotFoundError, FormatError):
        return False


def _fetch_export(hub: Hub, commit: str, variant: str) -> Export:
    (file,) = hub.files([MANIFEST], commit)
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / manifest.NAME
        hub.fetch(file, commit, part, lambda count: None)
        return Export.parse(part.read_bytes(), variant, f"{hub.repo}, {MANIFEST}")


class _Download:
    """The files of one call on their way into the folder."""

    def __init__(
        self, out: Path, hub: Hub, commit: str, export: Export, files: list[HubFile], progress: Progress | None
    ) -> None:
        self.fetched_files = self.fetched_bytes = 0
        self._out, self._hub, self._commit, self._export = out, hub, commit, export
        self._files = {file.path: file for file in files}
        self._progress = progress
        self._total = sum(file.size for file in files)
        self._done = 0

    def run(self, old: Manifest | None) -> Manifest:
        """Fetch, verify and place every file that is not there yet, in an order that keeps the folder consistent.

        manifest.json is written after every shard and lists those that are in place; while it lacks validation shards,
        find_data refuses the folder.
        """
        self._refuse_others()
        self._check_space()
        (self._out / _PARTS).mkdir(parents=True, exist_ok=True)
        tokenizer = self._place_tokenizer()
        made = old or self._empty_manifest(tokenizer)
        for split in (self._export.train, self._export.val):
            for index in range(sum(path in self._files for path in split.paths)):
                made = self._place_shard(made, split, index, tokenizer)
        shutil.rmtree(self._out / _PARTS)
        return made

    def _target(self, path: str) -> Path:
        return self._out / PurePosixPath(path).name

    def _part(self, file: HubFile) -> Path:
        return self._out / _PARTS / f"{PurePosixPath(file.path).name}.{file.digest[:16]}"

    def _refuse_others(self) -> None:
        """A shard of other data, or one that was not asked for, would become part of the data set."""
        ours = {self._target(path) for path in self._files}
        for split in ("train", "val"):
            for path in shards_of(self._out, split):
                if path not in ours:
                    raise FileExistsError(
                        f"{path}: this shard does not belong to the download of {self._export.variant} that was asked "
                        "for; choose another folder, or remove it."
                    )

    def _check_space(self) -> None:
        needed = sum(
            file.size - _size(self._part(file)) for file in self._files.values() if not self._target(file.path).exists()
        )
        there = next(folder for folder in (self._out, *self._out.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{self._out}: the download needs {needed / 1e9:,.1f} GB more; the disk has {free / 1e9:,.1f} GB free",
            )

    def _place_tokenizer(self) -> Tokenizer:
        file = self._files[self._export.tokenizer]
        source = self._verified_copy(file)
        try:
            tokenizer = Tokenizer(source)
        except FormatError as error:
            raise FormatError(f"{file.path} of {self._hub.repo} is of no use: {error}") from None
        if self._export.vocab_size not in (None, tokenizer.vocab_size):
            raise FormatError(
                f"{file.path} of {self._hub.repo} has {tokenizer.vocab_size:,} tokens; the export's manifest says "
                f"{self._export.vocab_size:,}."
            )
        os.replace(source, self._target(file.path))
        return Tokenizer(self._target(file.path))

    def _place_shard(self, made: Manifest, split: Split, index: int, tokenizer: Tokenizer) -> Manifest:
        """Put a shard into the folder and the manifest; those of the split that precede it are in place."""
        file = self._files[split.paths[index]]
        target = self._target(file.path)
        listed = made.shards().get(target.name)
        if listed is not None and _has_tokens(target, listed.tokens):
            self._advance(file.size)
            return made
        source = self._verified_copy(file, replace_it=listed is not None)
        if listed is None:
            stats = self._count(file, source, split.expected_tokens(index), tokenizer)
            before = self._target(split.paths[index - 1]) if index else None
            old: SplitEntry = getattr(made, split.name)
            new = SplitEntry(
                documents=old.documents + stats.documents,
                tokens=old.tokens + stats.tokens,
                source_bytes=None,
                text_bytes=old.text_bytes + _text_bytes_behind(before, stats, tokenizer),
                changed_documents=None,
                shards=(*old.shards, ShardEntry(target.name, stats.tokens, file.sha256 or file_sha256(source))),
            )
            made = replace(made, train=new) if split.name == "train" else replace(made, val=new)
        os.replace(source, target)
        made.write(self._out / manifest.NAME)
        return made

    def _verified_copy(self, file: HubFile, replace_it: bool = False) -> Path:
        """A whole copy of the file: the one that is in the folder, unless it is to be replaced, or one fetched now."""
        target = self._target(file.path)
        if target.exists() and not replace_it:
            if file.digest_of(target) != file.digest:
                raise FileExistsError(
                    f"{target}: this is another file than {file.path} of {self._hub.repo}; choose another folder, or "
                    "remove it."
                )
            self._advance(file.size)
            return target
        part = self._part(file)
        self._advance(_size(part))
        self._hub.fetch(file, self._commit, part, self._arrived)
        self.fetched_files += 1
        return part

    def _count(self, file: HubFile, copy: Path, expected: int | None, tokenizer: Tokenizer) -> TokenStats:
        """A shard's counts; raises FormatError where it is none, or not the one that the manifest describes."""
        try:
            stats = count_shard(ShardFile.open(copy), tokenizer.bos_id, tokenizer)
        except FormatError as error:
            raise FormatError(f"{file.path} of {self._hub.repo} is of no use: {error}") from None
        if expected not in (None, stats.tokens):
            raise FormatError(
                f"{file.path} of {self._hub.repo} has {stats.tokens:,} tokens; the export's manifest says {expected:,}."
            )
        if stats.high is not None and stats.high >= tokenizer.vocab_size:
            raise FormatError(
                f"{file.path} of {self._hub.repo} has the token {stats.high}; its tokenizer has "
                f"{tokenizer.vocab_size:,}, up to {tokenizer.vocab_size - 1}."
            )
        return stats

    def _empty_manifest(self, tokenizer: Tokenizer) -> Manifest:
        from pgolf import __version__

        repo, variant = self._hub.repo, self._export.variant
        empty = SplitEntry(0, 0, None, 0, None, ())
        return Manifest(
            pgolf=__version__,
            sources=(f"{repo} {variant} {self._commit}",),
            tokenizer=TokenizerEntry.of(tokenizer),
            train=empty,
            val=empty,
            hub=HubEntry(repo, self._commit, variant, len(self._export.train.paths), len(self._export.val.paths)),
        )

    def _arrived(self, count: int) -> None:
        self.fetched_bytes += count
        self._advance(count)

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress("downloading", self._done, self._total)


def _text_bytes_behind(before: Path | None, stats: TokenStats, tokenizer: Tokenizer) -> int:
    """The bytes of a shard's text, behind the last token of the shard that precedes it."""
    last = TokenStats()
    if before is not None:
        shard = ShardFile.open(before)
        last = TokenStats.of(shard.read(shard.tokens - 1, 1), tokenizer.bos_id, tokenizer.byte_table)
    both = last + stats
    assert both.text_bytes is not None and last.text_bytes is not None  # every token is in the table
    return both.text_bytes - last.text_bytes


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
