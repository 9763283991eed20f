"""Scoring a model: mean loss and bits per byte, in total and per document (docs/spec.md §5)."""

from __future__ import annotations

import itertools
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from pgolf.common.errors import FormatError, NonFiniteError
from pgolf.common.types import StrPath
from pgolf.scoring.audit import (
    Audit,
    Duplicates,
    TextCount,
    check_bytes,
    check_scores,
    defined_scores,
    document_starts,
    find_duplicates,
    per_document,
)
from pgolf.scoring.ttt import Settings
from pgolf.scoring.windows import IntArray, Windows, check_positive, sliding_windows, standard_windows

if TYPE_CHECKING:
    from pgolf.data.declared import Declaration, Record
    from pgolf.data.folder import DataFolder
    from pgolf.data.tokenizer import Tokenizer

METHODS = ("standard", "sliding", "ttt")
BASES = {"decoded": "the text that the tokens decode to", "sidecar": "the original text that a byte sidecar counts"}
"""Whose bytes a score can be counted over: `Score.byte_basis`, and what it means."""
AUDITS = ("sample", "full")

_BATCHES_AHEAD = 1  # one is computed while the next is gathered

BATCH_TOKENS = 65_536
"""Tokens per batch where batch_seqs is not given: the recipes' 32 windows of 2,048."""


class Model(Protocol):
    """What evaluate needs of a model; pgolf.GPT has it."""

    @property
    def config(self) -> Any:
        """Has vocab_size and bos_id."""

    @property
    def train_seq_len(self) -> int | None: ...

    def window_losses(self, ids: npt.NDArray[Any], targets: npt.NDArray[Any], first: int) -> npt.ArrayLike:
        """Losses in nats, (B, T − first), of positions first … T − 1; ids and targets are (B, T)."""


@dataclass(frozen=True)
class DocumentScores:
    """Sums over each validation document, in order; D documents.

    Documents begin at BOS tokens, the first at the stream's beginning. A target belongs to the document whose token it
    is: a BOS token is the first target of the document that it begins. The stream's first token is no target.

    nll: (D,) float64, nats. tokens: (D,) int64, scored targets. bytes: (D,) int64, or None without a tokenizer.
    """

    nll: npt.NDArray[np.float64]
    tokens: IntArray
    bytes: IntArray | None


@dataclass(frozen=True)
class Score:
    """The result of ``evaluate``.

    loss: mean over the scored tokens, nats. bpb: bits per byte, (Σ nll / ln 2) / Σ bytes; None without a tokenizer.
    tokens, bytes: scored (with the reference tail, some count more than once). seconds: wall time of the whole call.
    method, seq_len, stride, tail, windows: how it was scored; stride and tail are those of sliding windows, else None.
    documents: None where they are unknown, as no BOS token is known.
    byte_basis: whose bytes were counted: "decoded", the text that the tokens decode to, or "sidecar", the original text
        by a byte sidecar; None where bytes are not known. Scores of two bases cannot be compared.
    source_bytes: UTF-8 bytes of the whole split's original text; None where nobody says.
    """

    loss: float
    bpb: float | None
    tokens: int
    bytes: int | None
    seconds: float
    method: str
    seq_len: int
    stride: int | None
    tail: str | None
    windows: int
    documents: DocumentScores | None
    audit: Audit
    byte_basis: str | None = None
    source_bytes: int | None = None


@dataclass(frozen=True)
class ValidationData:
    """A validation stream that has been read and whose bytes have been audited, to be scored any number of times.

    tokens: (N + 1,) integers. starts: (D,) int64, where documents begin; [0] where bos_id is −1, unknown. target_bytes:
    (N,) int32, the bytes of tokens[1:], or None without tokenizer and sidecar. duplicates: None where there are no
    training shards beside the data, or documents are unknown. byte_basis: as a Score's. text, source_bytes,
    declared_by, tokenizer, tokenizer_bound: as an Audit's. record: what a run keeps of it, to recognise it again.
    """

    tokens: npt.NDArray[Any]
    starts: IntArray
    target_bytes: npt.NDArray[np.int32] | None
    duplicates: Duplicates | None
    vocab_size: int
    bos_id: int
    byte_basis: str | None = None
    text: TextCount | None = None
    source_bytes: int | None = None
    declared_by: str | None = None
    tokenizer: str | None = None
    tokenizer_bound: bool | None = None
    record: Record | None = None

    @classmethod
    def load(
        cls,
        data: StrPath | npt.ArrayLike,
        tokenizer: StrPath | Tokenizer | None = None,
        *,
        vocab_size: int,
        bos_id: int = -1,
        audit: str = "sample",
        record: Record | None = None,
        any_tokenizer: bool = False,
    ) -> ValidationData:
        """Read validation data and audit its bytes and its documents; the arguments are those of ``evaluate``.

        bos_id: the id that begins a document where no tokenizer says it; −1: unknown. record: what the run or the
        artifact that is to be scored has recorded of its data and tokenizer.
        """
        from pgolf.data.folder import find_data, load_tokens
        from pgolf.data.shards import read_sidecars

        if audit not in AUDITS:
            raise ValueError(f"audit is {audit!r}; expected one of {', '.join(map(repr, AUDITS))}.")
        folder = None
        shards: tuple[Path, ...] = ()
        if isinstance(data, (str, os.PathLike)):
            if os.path.isfile(data):
                shards = (Path(data),)
            else:
                folder = find_data(data, splits=("val",), record=record)
                shards = folder.val
                tokenizer = folder.tokenizer if tokenizer is None else tokenizer
        declaration = None if folder is None else folder.declaration
        opened = _open_tokenizer(tokenizer, vocab_size)
        bound = None if opened is None else _bind(opened, declaration, record, any_tokenizer)
        tokens = load_tokens(data, split="val", vocab_size=vocab_size)
        if tokens.size < 2:
            raise ValueError(f"The data has {tokens.size} token; expected at least 2, one to read and one to predict.")
        bos_id = _bos_id(opened, declaration, record, bos_id)
        starts = document_starts(tokens, bos_id)
        if declaration is not None:
            _check_documents(declaration, starts, bos_id)
        counted = sidecar = text = None
        if opened is not None:
            counted = opened.stream_bytes(tokens).astype(np.int32)
            text = check_bytes(tokens, counted, starts, opened)
            if declaration is not None and bound is not False:
                _check_text_bytes(declaration, text, opened, int(tokens[0]))
        if shards:
            sidecar = read_sidecars(shards)
        return cls(
            tokens,
            starts,
            counted if sidecar is None else sidecar[1:].astype(np.int32),
            _find_duplicates(folder, tokens, starts, bos_id, audit),
            vocab_size,
            bos_id,
            byte_basis="sidecar" if sidecar is not None else None if counted is None else "decoded",
            text=text,
            source_bytes=None if declaration is None else declaration.split("val").source_bytes,
            declared_by=None if declaration is None else declaration.by,
            tokenizer=None if opened is None else opened.identity,
            tokenizer_bound=bound,
        )


def _bind(
    tokenizer: Tokenizer, declaration: Declaration | None, record: Record | None, any_tokenizer: bool
) -> bool | None:
    """Whether the tokenizer is the one that data, run and artifact name; another one is refused, or False."""
    from pgolf.data.declared import check_tokenizer

    said = {} if declaration is None else {declaration.source: declaration.tokenizer}
    if record is not None:
        said[record.source] = record.declared_tokenizer()
    try:
        return check_tokenizer(tokenizer, said)
    except ValueError as error:
        if not any_tokenizer:
            raise
        warnings.warn(f"{error} It counts the bytes all the same, as was asked for.", stacklevel=4)
        return False


def _bos_id(tokenizer: Tokenizer | None, declaration: Declaration | None, record: Record | None, otherwise: int) -> int:
    """The id that begins a document: the tokenizer's own, else what is declared of it, else ``otherwise``."""
    if tokenizer is not None:
        return tokenizer.bos_id
    said = (
        None if declaration is None else declaration.tokenizer,
        None if record is None else record.declared_tokenizer(),
    )
    return next((each.bos_id for each in said if each is not None and each.bos_id is not None), otherwise)


def _check_documents(declaration: Declaration, starts: IntArray, bos_id: int) -> None:
    """Raises FormatError where another number of documents begins in the validation shards than is declared."""
    said = declaration.split("val").documents
    if bos_id >= 0 and said not in (None, starts.size):
        raise FormatError(
            f"{starts.size:,} documents begin in the validation shards; {declaration.source} says {said:,}."
        )


def _check_text_bytes(declaration: Declaration, text: TextCount, tokenizer: Tokenizer, first: int) -> None:
    """Raises FormatError where the text of all targets has another number of bytes than is declared."""
    said = declaration.split("val").text_bytes
    # What a download counts is what the tokens count, the first one as if inside a text: without what no target counts.
    table = tokenizer.byte_table
    by_table = text.target_bytes + int(table.base_bytes[first]) + int(table.has_leading_space[first])
    if said not in (None, text.text_bytes, by_table):
        raise FormatError(
            f"The validation tokens decode to {text.text_bytes:,} bytes of text; {declaration.source} says {said:,}. "
            "The shards or the tokenizer are not those that it describes."
        )


def _find_duplicates(
    folder: DataFolder | None, tokens: npt.NDArray[Any], starts: IntArray, bos_id: int, audit: str
) -> Duplicates | None:
    if folder is None or not folder.train or bos_id < 0:
        return None
    duplicates = find_duplicates(tokens, starts, folder.train, bos_id, full=audit == "full")
    if duplicates.found:
        warnings.warn(
            f"{duplicates.found:,} of {duplicates.looked_up:,} validation documents also stand in the "
            f"training shards of {folder.path}; their scores are not scores of unseen text.",
            stacklevel=4,
        )
    return duplicates


def evaluate(
    model: Model,
    data: StrPath | npt.ArrayLike | ValidationData,
    tokenizer: StrPath | Tokenizer | None = None,
    *,
    method: str | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    tail: str | None = None,
    batch_seqs: int | None = None,
    audit: str = "sample",
    ttt_lora_rank: int | None = None,
    ttt_lora_lr: float | None = None,
    ttt_chunk_size: int | None = None,
    ttt_eval_seq_len: int | None = None,
    ttt_batch_size: int | None = None,
    ttt_seed: int = 0,
    any_tokenizer: bool = False,
    record: Record | None = None,
    progress: Callable[[int, int, int], object] | None = None,
) -> Score:
    """Score a model on validation data and audit the score (docs/spec.md §5).

    data: a folder with ``*_val_*.bin`` shards, one shard's path, a 1-D integer array of tokens, or a ValidationData. A
        folder's validation split must be the one that its manifest, the run or the artifact declares.
    tokenizer: a SentencePiece ``.model`` path or a Tokenizer; None takes the data folder's. Without one, and without a
        byte sidecar, bpb is None. It must be the one that the data, the run or the artifact names.
    method: ``"standard"`` (windows side by side), ``"sliding"`` (overlapping; see windows.py for stride and tail) or
        ``"ttt"`` (test-time training, see ttt.py: documents apart, each with adapters that learn what has been scored;
        the model must be a pgolf.GPT, whose weights do not change).
    seq_len: tokens of context of the first two methods; None is the model's training length.
    batch_seqs: windows scored at once, for speed and memory: it changes a score by no more than rounding, since
        products of another height may round otherwise. None: about 65,536 tokens.
    audit: look up a ``"sample"`` of the validation documents among the training documents, or the ``"full"`` set (a
        ValidationData has been audited when it was read).
    ttt_*: of the third method alone: the adapters' rank and learning rate, the targets that are scored and then trained
        on together, the context in tokens, the documents at once (speed and memory; on a GPU also rounding), and the
        seed of the adapters.
    any_tokenizer: score with another tokenizer than the one that is named, with a warning; the audit says so.
    record: what the model's run has recorded of data and tokenizer; None: what the model itself knows.
    progress: called after every batch with windows (ttt: chunks) done, windows in all, and tokens scored.

    What is None of method, stride, tail, seq_len and ttt_* is as the model's artifact says that it is scored, where the
    method is the artifact's; else sliding windows, stride 64, the exact tail, and docs/spec.md's values of ttt.

    Losses are summed in float64: within each window, then over the windows; for ttt in the order of the stream.

    Raises ValueError for impossible arguments, data too short, a tokenizer of another size than the model's vocabulary
    or another one than is named, and a failed audit; FormatError for data that is not what is declared; NonFiniteError,
    naming the token, for a loss that is not a number; and the errors of reading data.
    Warns where validation documents also stand in the folder's training shards.
    """
    began = time.perf_counter()
    known: Mapping[str, Any] = getattr(model, "scoring", None) or {}
    method = method or known.get("method") or "sliding"
    _check_method(method)
    if method != known.get("method"):
        known = {}
    stride = known.get("stride") or 64 if stride is None else stride
    tail = tail or known.get("tail") or "exact"
    asked = {
        "ttt_lora_rank": ttt_lora_rank,
        "ttt_lora_lr": ttt_lora_lr,
        "ttt_chunk_size": ttt_chunk_size,
        "ttt_eval_seq_len": ttt_eval_seq_len,
        "ttt_batch_size": ttt_batch_size,
    }
    ttt = Settings.of({**known, **{name: value for name, value in asked.items() if value is not None}}, ttt_seed)
    if method == "ttt":
        seq_len = ttt.context
    elif seq_len is None:
        seq_len = known.get("seq_len") or model.train_seq_len
        if seq_len is None:
            raise ValueError("seq_len is None and the model has no training length to take; give seq_len.")
    if batch_seqs is not None:
        check_positive(batch_seqs=batch_seqs)
    vocab_size, bos_id = model.config.vocab_size, model.config.bos_id
    record = record or getattr(model, "record", None)
    if isinstance(data, ValidationData):
        if tokenizer is not None:
            raise ValueError("tokenizer is given twice: a ValidationData has been read with its own.")
        if data.vocab_size != vocab_size:
            raise ValueError(
                f"The data was read for a vocabulary of {data.vocab_size} with BOS {data.bos_id}; the model has "
                f"{vocab_size} with BOS {bos_id}."
            )
        loaded = data if any_tokenizer else _bound_to(record, data)
    else:
        loaded = ValidationData.load(
            data,
            tokenizer,
            vocab_size=vocab_size,
            bos_id=bos_id,
            audit=audit,
            record=record,
            any_tokenizer=any_tokenizer,
        )
    _warn_of_basis(record, loaded.byte_basis)

    n_targets = loaded.tokens.size - 1
    if method == "ttt":
        nll, document_nll, times, windows = _score_documents(model, loaded, ttt, progress)
    else:
        plan = plan_windows(method, n_targets, seq_len, stride, tail)
        nll, document_nll, times = _score_windows(model, loaded, plan, batch_seqs, progress)
        windows = len(plan)

    expected = defined_scores(n_targets, method, seq_len, stride, tail)
    check_scores(times, expected, loaded.starts)
    tokens = int(times.sum(dtype=np.int64))
    document_bytes = n_bytes = bpb = None
    if loaded.target_bytes is not None:
        document_bytes = per_document(times * loaded.target_bytes, loaded.starts)
        n_bytes = int(document_bytes.sum())
        if n_bytes == 0:
            raise ValueError("The scored tokens stand for no text at all, so that there are no bits per byte.")
        bpb = nll / math.log(2) / n_bytes
    documents = None
    if loaded.bos_id >= 0:
        documents = DocumentScores(document_nll, per_document(times, loaded.starts), document_bytes)
    return Score(
        loss=nll / tokens,
        bpb=bpb,
        tokens=tokens,
        bytes=n_bytes,
        seconds=time.perf_counter() - began,
        method=method,
        seq_len=int(seq_len),
        stride=stride if method == "sliding" else None,
        tail=tail if method == "sliding" else None,
        windows=windows,
        documents=documents,
        audit=Audit(
            documents=None if documents is None else int(loaded.starts.size),
            scored_tokens=tokens,
            expected_tokens=int(expected.sum(dtype=np.int64)),
            bytes_checked=loaded.text is not None,
            duplicates=loaded.duplicates,
            declared_by=loaded.declared_by,
            text=loaded.text,
            source_bytes=loaded.source_bytes,
            tokenizer=loaded.tokenizer,
            tokenizer_bound=loaded.tokenizer_bound,
        ),
        byte_basis=loaded.byte_basis,
        source_bytes=loaded.source_bytes,
    )


def _bound_to(record: Record | None, data: ValidationData) -> ValidationData:
    """Data that was read before the model was known; raises ValueError where the model names another tokenizer."""
    declared = None if record is None else record.declared_tokenizer()
    named = None if declared is None else declared.identity
    if record is not None and None not in (named, data.tokenizer) and data.tokenizer_bound is not False:
        if named != data.tokenizer:
            raise ValueError(
                f"The data was read with a tokenizer of the identity {data.tokenizer}; {record.source} names {named}. "
                "Read it with that one, or score all the same, which the score says (any_tokenizer=True)."
            )
        return replace(data, tokenizer_bound=True)
    return data


def _warn_of_basis(record: Record | None, found: str | None) -> None:
    """The score that a run or an artifact reports was counted over the bytes of another text."""
    said = None if record is None else record.byte_basis
    if record is not None and None not in (said, found) and said != found:
        warnings.warn(
            f"Bytes are counted over {BASES[found or '']}; those of {record.source} over {BASES[said or '']}: "
            "their bits per byte cannot be compared.",
            stacklevel=3,
        )


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(map(repr, METHODS))}.")


def plan_windows(method: str, n_targets: int, seq_len: int, stride: int, tail: str) -> Windows:
    """The windows that the standard or the sliding method scores.

    Raises ValueError for an unknown method, an impossible stride or tail, or too few targets: what a run wants to know
    before it trains.
    """
    if method == "standard":
        return standard_windows(n_targets, seq_len)
    if method != "sliding":
        raise ValueError(f"method is {method!r}; the methods with windows are 'standard' and 'sliding'.")
    return sliding_windows(n_targets, seq_len, stride, tail)


def _open_tokenizer(tokenizer: StrPath | Tokenizer | None, vocab_size: int) -> Tokenizer | None:
    if isinstance(tokenizer, (str, os.PathLike)):
        from pgolf.data.tokenizer import Tokenizer

        tokenizer = Tokenizer(tokenizer)
    if tokenizer is not None and tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"The tokenizer {tokenizer.path} has {tokenizer.vocab_size:,} tokens; the model has {vocab_size:,}."
        )
    return tokenizer


def _score_windows(
    model: Model,
    data: ValidationData,
    plan: Windows,
    batch_seqs: int | None,
    progress: Callable[[int, int, int], object] | None,
) -> tuple[float, npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """The total nll, the nll of each document (D,), and how often each target was scored (N,)."""
    window_nll = np.empty(len(plan), dtype=np.float64)
    document_nll = np.zeros(data.starts.size, dtype=np.float64)
    times = np.zeros(data.tokens.size - 1, dtype=np.int32)
    scored = 0
    for begin, end, positions, first, raw in _losses(model, data, plan, batch_seqs):
        length = positions.shape[1]
        if raw.shape != (end - begin, length - first):
            raise ValueError(f"window_losses returned shape {raw.shape}; expected {(end - begin, length - first)}.")
        losses = raw.astype(np.float64, order="C")
        window_nll[begin:end] = losses.sum(axis=1)
        targets_scored = positions[:, first:]
        _check_finite(losses, targets_scored)
        documents = np.searchsorted(data.starts, targets_scored + 1, side="right") - 1
        # One addition after the other, in window order: the batches leave no trace in any bit.
        np.add.at(document_nll, documents, losses)
        np.add.at(times, targets_scored, 1)
        scored += losses.size
        if progress is not None:
            progress(end, len(plan), scored)
    return float(window_nll.sum()), document_nll, times


def _score_documents(
    model: Model, data: ValidationData, settings: Settings, progress: Callable[[int, int, int], object] | None
) -> tuple[float, npt.NDArray[np.float64], npt.NDArray[np.int32], int]:
    """By test-time training: the total nll, that of each document, how often each target was scored; chunks."""
    from pgolf.model import GPT
    from pgolf.scoring.ttt import Documents, score

    if not isinstance(model, GPT):
        raise TypeError(
            f"method is 'ttt' and the model a {type(model).__name__}; test-time training takes a pgolf.GPT."
        )
    if data.bos_id < 0:
        raise ValueError(
            "Test-time training needs to know where documents begin, and no BOS token is known: give the tokenizer, or "
            "set model.bos_id."
        )
    documents = Documents.of(data.starts, data.tokens.size - 1)
    losses, times = score(model, data.tokens, documents, settings, progress)
    scored = np.flatnonzero(times)  # all, unless the audit is about to say which not
    _check_finite(losses[scored].astype(np.float64), scored)
    nll = np.zeros(data.starts.size, dtype=np.float64)
    np.add.at(nll, np.searchsorted(data.starts, scored + 1, side="right") - 1, losses[scored].astype(np.float64))
    return float(nll.sum()), nll, times, int(documents.chunks(settings.chunk).sum())


def _losses(
    model: Model, data: ValidationData, plan: Windows, batch_seqs: int | None
) -> Iterator[tuple[int, int, IntArray, int, npt.NDArray[Any]]]:
    """(begin, end, positions, first scored position, losses) of every batch of windows, in window order.

    A pgolf.GPT on a GPU is given the next batches while the losses of the one before are summed up, and all batches of
    one kind in one size, the last one filled up with its last window: one recording serves them, and how a window is
    computed does not depend on how many are left.
    """
    later = None if getattr(model, "device", "cpu") == "cpu" else getattr(model, "window_losses_later", None)
    waiting: deque[tuple[int, int, IntArray, int, Callable[[], npt.ArrayLike]]] = deque()
    for begin, end, size in _batches(plan, batch_seqs):
        length, first = int(plan.length[begin]), int(plan.first_scored[begin])
        rows = np.arange(begin, end if later is None else begin + size).clip(max=end - 1)
        positions = plan.start[rows, None] + np.arange(length)
        ids, targets = (data.tokens[at].astype(np.int32) for at in (positions, positions + 1))
        if later is None:
            yield begin, end, positions, first, np.asarray(model.window_losses(ids, targets, first))
            continue
        waiting.append((begin, end, positions[: end - begin], first, later(ids, targets, first)))
        if len(waiting) > _BATCHES_AHEAD:
            yield _landed(*waiting.popleft())
    for batch in waiting:
        yield _landed(*batch)


def _landed(
    begin: int, end: int, positions: IntArray, first: int, losses: Callable[[], npt.ArrayLike]
) -> tuple[int, int, IntArray, int, npt.NDArray[Any]]:
    return begin, end, positions, first, np.asarray(losses())[: end - begin]


def _batches(plan: Windows, batch_seqs: int | None) -> Iterator[tuple[int, int, int]]:
    """Ranges of consecutive windows with one length and one first scored position, in window order.

    Also the number of windows in the first range of each kind, which the last may not reach.
    """
    differs = (np.diff(plan.length) != 0) | (np.diff(plan.first_scored) != 0)
    bounds = [0, *(np.flatnonzero(differs) + 1).tolist(), len(plan)]
    for begin, end in itertools.pairwise(bounds):
        step = batch_seqs or max(1, BATCH_TOKENS // int(plan.length[begin]))
        for start in range(begin, end, step):
            yield start, min(start + step, end), min(step, end - begin)


def _check_finite(losses: npt.NDArray[np.float64], targets: IntArray) -> None:
    bad = ~np.isfinite(losses)
    if bad.any():
        index = int(np.argmax(bad))
        raise NonFiniteError(
            f"The loss of token {targets.flat[index] + 1:,} is {losses.flat[index]}; it must be finite."
        )
