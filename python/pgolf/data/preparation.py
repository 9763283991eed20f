"""Text in, a data folder out: shards, tokenizer and manifest."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pgolf.common.files import naming
from pgolf.common.machine import usable_cores
from pgolf.common.types import StrPath
from pgolf.data.corpus import builtin_corpus
from pgolf.data.documents import FIELD, CorpusReader, FileReader, RawDocument, Reader
from pgolf.data.encode import CHUNK_BYTES, EncodedChunk, chunks, encode
from pgolf.data.manifest import Manifest, SplitEntry, TokenizerEntry
from pgolf.data.progress import Progress, ProgressCallback, progress_bar
from pgolf.data.publish import check_out_dir, partial_folder, publish
from pgolf.data.shard_file import MAX_TOKEN
from pgolf.data.shard_writer import ShardWriter
from pgolf.data.tokenizer import Tokenizer
from pgolf.data.train_tokenizer import NORMALIZATIONS, SMALLEST_VOCAB, train_tokenizer

DEFAULT_VOCAB_SIZE = 1024
DEFAULT_VAL_FRACTION = 0.05
SINGLE_TEXT_DOCUMENTS = 20
"""Into about so many a single short text is split: one of them is DEFAULT_VAL_FRACTION."""
TOKENIZER_SAMPLE_BYTES = 32_000_000
"""A tokenizer is trained on about this much text at most, spread evenly over the training documents."""


@dataclass(frozen=True)
class PrepareReport:
    """What prepare did."""

    path: Path
    """The data folder."""
    manifest: Manifest
    """Its counts and checksums, as in manifest.json."""
    seconds: float
    warning: str | None
    """A sentence where the tokens do not spell the text exactly; else None."""
    notes: tuple[str, ...] = ()
    """Sentences about how the sources were read, where that may surprise."""


def prepare(
    sources: StrPath | Sequence[StrPath],
    out_dir: StrPath,
    *,
    builtin: bool = False,
    field: str = FIELD,
    tokenizer: StrPath | None = None,
    vocab_size: int | None = None,
    normalization: str | None = None,
    val_docs: int | None = None,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    progress: bool | ProgressCallback = False,
) -> PrepareReport:
    """Turn text into a data folder: `pgolf_train_*.bin`, `pgolf_val_*.bin`, a tokenizer, `manifest.json`.

    sources: text, JSON Lines and JSON files, plain, `.gz` or `.zst`, and folders of them (FileReader says what a
        document is); empty with `builtin`. A single text of less than SINGLE_TEXT_DOCUMENTS documents is split more
        finely, at blank lines.
    out_dir: made where it is missing. What an earlier prepare wrote there is replaced, when everything new is complete;
        until then nothing is touched, and a run that is stopped leaves nothing that looks whole.
    builtin: use the built-in corpus, which has its own validation split (pgolf.data.corpus).
    field: the field of a JSON object that holds its text.
    tokenizer: a SentencePiece model to use and copy; None trains one on the training documents.
    vocab_size: of the tokenizer to train; None is 1,024. With `tokenizer` it must be that one's.
    normalization: "nmt_nfkc" or "identity", for the tokenizer to train; None is nmt_nfkc. With `tokenizer` likewise.
    val_docs: the first so many documents are validation, the others training; None is 5 % of them, at least one.
    shard_tokens: tokens in a shard; the last one of a split has what is left.
    workers: processes that encode; None is one for every CPU. The output is the same for any number. They do not run
        the caller's script, which needs no `__main__` guard.
    progress: True shows a bar on standard error; a function is called with Progress records.

    Every document becomes BOS and its tokens, in the order of the sources. Memory stays bounded by the tokenizer's
    sample and two chunks a worker (or the longest document).

    Raises ValueError for impossible arguments and too few documents, FileNotFoundError for missing files,
    FileExistsError where out_dir holds data that prepare did not write, FormatError for broken sources, naming file
    and line.
    """
    started = time.monotonic()
    out = Path(out_dir)
    _check_counts(val_docs=val_docs, shard_tokens=shard_tokens, workers=workers)
    reader, val_docs = _open_sources(sources, builtin, field, val_docs, out)
    split = _split_single_text(reader, val_docs)
    given = None if tokenizer is None else _given_tokenizer(Path(tokenizer), vocab_size, normalization)
    settings = None if given is not None else _training_settings(vocab_size, normalization)
    check_out_dir(out, given)
    with contextlib.ExitStack() as stack:
        report = stack.enter_context(progress_bar()) if progress is True else progress or _no_progress
        partial = stack.enter_context(partial_folder(out))
        sample: list[RawDocument] = []
        if settings is not None or val_docs is None:
            val_docs, sample = _survey(reader, val_docs, report)
        if settings is not None:
            model = partial / f"pgolf_{settings.vocab_size}_bpe.model"
            report(Progress("training the tokenizer", 0, 1, 0))
            train_tokenizer(
                (document.text() for document in sample), model, settings.vocab_size, settings.normalization
            )
            report(Progress("training the tokenizer", 1, 1, 0))
        elif given is not None:
            model = partial / given.path.name
            with naming(model), model.open("wb") as file:
                file.write(given.path.read_bytes())
        splits = _encode_splits(reader, val_docs, model, partial, shard_tokens, workers or usable_cores(), report)
        made = _manifest(reader, Tokenizer(model), splits)
        publish(partial, out, made)
    notes = (*reader.notes, *([_split_note(made)] if split else []))
    return PrepareReport(out, made, time.monotonic() - started, _warning(made, was_given=given is not None), notes)


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1.")


def _open_sources(
    sources: StrPath | Sequence[StrPath], builtin: bool, field: str, val_docs: int | None, out: Path
) -> tuple[Reader, int | None]:
    paths = [Path(path) for path in ([sources] if isinstance(sources, (str, os.PathLike)) else sources)]
    if builtin == bool(paths):
        raise ValueError("prepare takes either source files or the built-in corpus; give one of the two.")
    if not builtin:
        return FileReader(paths, field, leave_out=out), val_docs
    if val_docs is not None:
        raise ValueError(f"val_docs is {val_docs:,}; the built-in corpus has a validation split of its own.")
    if field != FIELD:
        raise ValueError(f"field is {field!r}; the built-in corpus is text, without fields.")
    corpus = CorpusReader(builtin_corpus())
    return corpus, corpus.val_docs


def _split_single_text(reader: Reader, val_docs: int | None) -> bool:
    """Whether the sources are a single short text, which then becomes enough documents for two splits."""
    least = (val_docs or 1) + 1
    return isinstance(reader, FileReader) and reader.split_single_text(max(SINGLE_TEXT_DOCUMENTS, least), least)


def _split_note(made: Manifest) -> str:
    count = made.train.documents + made.val.documents
    return (
        f"{made.sources[0]} is a single text. It was split into {count:,} documents at blank lines, or where these are "
        f"too few at the ends of lines; validation has the first {made.val.documents:,} of them."
    )


@dataclass(frozen=True)
class _TrainingSettings:
    vocab_size: int
    normalization: str


def _training_settings(vocab_size: int | None, normalization: str | None) -> _TrainingSettings:
    settings = _TrainingSettings(
        DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size,
        NORMALIZATIONS[0] if normalization is None else normalization,
    )
    if not SMALLEST_VOCAB <= settings.vocab_size <= MAX_TOKEN + 1:
        raise ValueError(f"vocab_size is {vocab_size}; it must be from {SMALLEST_VOCAB} to {MAX_TOKEN + 1:,}.")
    if settings.normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization is {normalization!r}; it must be one of {', '.join(NORMALIZATIONS)}.")
    return settings


def _given_tokenizer(path: Path, vocab_size: int | None, normalization: str | None) -> Tokenizer:
    tokenizer = Tokenizer(path)
    if not path.name.isprintable():
        raise ValueError(f"{path}: manifest.json holds only names of printable UTF-8; give the tokenizer such a name.")
    if tokenizer.bos_id < 0:
        raise ValueError(f"{path}: the tokenizer has no BOS token, with which every document starts.")
    if tokenizer.vocab_size > MAX_TOKEN + 1:
        raise ValueError(f"{path}: the tokenizer has {tokenizer.vocab_size:,} tokens; shards hold {MAX_TOKEN + 1:,}.")
    if vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(f"vocab_size is {vocab_size:,}; the tokenizer {path} has {tokenizer.vocab_size:,} tokens.")
    if normalization not in (None, tokenizer.normalizer):
        raise ValueError(f"normalization is {normalization!r}; the tokenizer {path} has {tokenizer.normalizer!r}.")
    return tokenizer


def _survey(reader: Reader, val_docs: int | None, report: ProgressCallback) -> tuple[int, list[RawDocument]]:
    """Count the documents, to choose val_docs where it is None, and sample training text for the tokenizer.

    The sample is every k-th document, k the smallest power of two that brings it below TOKENIZER_SAMPLE_BYTES: whenever
    it grows beyond that, every other document is dropped and k doubles.
    """
    sample: list[tuple[int, RawDocument]] = []
    count = sample_bytes = text_bytes = shown = 0
    every = 1
    for index, document in enumerate(reader.documents()):
        count += 1
        text_bytes += len(document.raw)
        # The last of each k, not the first: documents near the end of the sources are never validation.
        if index % every == every - 1 and index >= (val_docs or 0):
            sample.append((index, document))
            sample_bytes += len(document.raw)
        while sample_bytes > TOKENIZER_SAMPLE_BYTES and len(sample) > 1:
            every *= 2
            sample = [(kept, document) for kept, document in sample if kept % every == every - 1]
            sample_bytes = sum(len(document.raw) for _, document in sample)
        if text_bytes - shown >= CHUNK_BYTES:
            shown = text_bytes
            report(Progress("reading", reader.read_bytes, reader.total_bytes, text_bytes))
    report(Progress("reading", reader.total_bytes, reader.total_bytes, text_bytes))
    if val_docs is None:
        val_docs = max(1, round(DEFAULT_VAL_FRACTION * count))
    _check_documents(count, val_docs)
    return val_docs, [document for index, document in sample if index >= val_docs]


def _check_documents(count: int, val_docs: int) -> None:
    if count <= val_docs:
        fewer = f", or fewer documents for validation: val_docs={count - 1}" if count > 1 else ""
        raise ValueError(
            f"the sources hold {count:,} documents; with the first {val_docs:,} for validation at least "
            f"{val_docs + 1:,} are needed. Give more text{fewer}."
        )


class _Split:
    """The counts and shards of a split as they grow."""

    def __init__(self, writer: ShardWriter) -> None:
        self.writer = writer
        self.documents = self.tokens = self.source_bytes = self.text_bytes = self.changed_documents = 0

    def add(self, chunk: EncodedChunk) -> None:
        self.writer.write(chunk.tokens)
        self.tokens += chunk.tokens.size
        self.documents += chunk.documents
        self.source_bytes += chunk.source_bytes
        self.text_bytes += chunk.text_bytes
        self.changed_documents += chunk.changed_documents

    def entry(self) -> SplitEntry:
        return SplitEntry(
            self.documents,
            self.tokens,
            self.source_bytes,
            self.text_bytes,
            self.changed_documents,
            self.writer.entries(),
        )


def _encode_splits(
    reader: Reader,
    val_docs: int,
    model: Path,
    folder: Path,
    shard_tokens: int,
    workers: int,
    report: ProgressCallback,
) -> dict[str, SplitEntry]:
    """Encode the first val_docs documents and the others into shards of their own."""

    def tagged_chunks() -> Iterator[tuple[tuple[str, int], list[RawDocument]]]:
        documents = reader.documents()
        for split, part in (("val", itertools.islice(documents, val_docs)), ("train", documents)):
            for chunk in chunks(part):
                yield (split, reader.read_bytes), chunk

    with contextlib.ExitStack() as stack:
        splits = {
            name: _Split(stack.enter_context(ShardWriter(folder, name, shard_tokens))) for name in ("val", "train")
        }
        encoded = stack.enter_context(contextlib.closing(encode(tagged_chunks(), model, workers)))
        for (split, read_bytes), chunk in encoded:
            splits[split].add(chunk)
            text_bytes = sum(split.source_bytes for split in splits.values())
            report(Progress("encoding", read_bytes, reader.total_bytes, text_bytes))
        _check_documents(sum(split.documents for split in splits.values()), val_docs)
    return {name: split.entry() for name, split in splits.items()}


def _manifest(reader: Reader, tokenizer: Tokenizer, splits: dict[str, SplitEntry]) -> Manifest:
    from pgolf import __version__

    return Manifest(
        pgolf=__version__,
        sources=reader.names,
        tokenizer=TokenizerEntry.of(tokenizer),
        train=splits["train"],
        val=splits["val"],
    )


def _warning(made: Manifest, was_given: bool) -> str | None:
    splits = (made.train, made.val)
    changed = sum(split.changed_documents or 0 for split in splits)
    if not changed:
        return None
    source, text = sum(split.source_bytes or 0 for split in splits), sum(split.text_bytes for split in splits)
    sentence = (
        f"The tokens spell {changed:,} of {sum(split.documents for split in splits):,} documents differently: "
        f"{made.tokenizer.normalization} normalisation made {text:,} bytes of {source:,}, and scores will be per byte "
        "of the normalised text."
    )
    if made.tokenizer.normalization == "identity":
        return sentence
    how = "without --tokenizer and with" if was_given else "with"
    return f"{sentence} To keep every byte, prepare {how} --normalization identity."


def _no_progress(progress: Progress) -> None:
    pass
