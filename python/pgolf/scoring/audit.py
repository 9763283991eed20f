"""The score audit: is a score what its method defines, of the text that it claims? (docs/spec.md §5)

Always on: public scores were wrong by 4 to 20 % through byte tables that nobody checked. The audit shares no code with
what it checks: it reads the tokenizer's model file itself and has the method's definition in a form of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pgolf.scoring.windows import IntArray

if TYPE_CHECKING:
    from pgolf.data.tokenizer import Tokenizer

SAMPLED_DOCUMENTS = 1024
"""Validation documents that a sample looks up, evenly spaced."""
SAMPLED_TOKENS = 2**26
"""Training tokens in which a sample looks, from the beginnings of all training shards in equal parts."""


@dataclass(frozen=True)
class Duplicates:
    """Validation documents that also stand, token for token, in the training shards.

    found: how many of the ``looked_up`` validation documents. training_documents: how many they were compared with.
    complete: every validation document was looked up among all training documents, not a sample of them.
    """

    found: int
    looked_up: int
    training_documents: int
    complete: bool


@dataclass(frozen=True)
class TextCount:
    """What the text of the validation tokens comes to, each token counted once.

    text_bytes: UTF-8 bytes that SentencePiece decodes the documents to. target_bytes: those that the targets count. The
    difference is what no target counts: unknown_bytes, what SentencePiece writes for unknown and unused pieces;
    control_spaces, spaces behind control pieces; and what it writes for bytes that spell no character, which count one
    each. unknown_tokens: how many targets are unknown to the tokenizer.
    """

    text_bytes: int
    target_bytes: int
    unknown_tokens: int
    unknown_bytes: int
    control_spaces: int


@dataclass(frozen=True)
class Audit:
    """What the audit of a score established; a mismatch of bytes or tokens is an error and never gets here.

    documents: validation documents in the data; None: unknown, as no BOS token is known.
    scored_tokens, expected_tokens: scores given, and the number that the method defines.
    bytes_checked: every document's byte count equals its text's UTF-8 length; False: not done, without a tokenizer.
    duplicates: None where there are no training shards beside the data, or documents are unknown.
    declared_by: who declares the validation split, all of which was scored: "pgolf" or "community" (a manifest), "run"
        or "artifact" (its record of the data); None: nobody does, as for arrays and single shards.
    text: None without a tokenizer.
    source_bytes: UTF-8 bytes of the original text, before the tokenizer's normalisation; None where not known.
    tokenizer: the identity of the tokenizer that counted (`pgolf.Tokenizer.identity`). tokenizer_bound: whether it is
        the one that data, run or artifact names; False: another one, by any_tokenizer; None: nobody names one.
    """

    documents: int | None
    scored_tokens: int
    expected_tokens: int
    bytes_checked: bool
    duplicates: Duplicates | None
    declared_by: str | None = None
    text: TextCount | None = None
    source_bytes: int | None = None
    tokenizer: str | None = None
    tokenizer_bound: bool | None = None


def document_starts(tokens: npt.NDArray[Any], bos_id: int) -> IntArray:
    """Where documents begin in a stream: (D,) int64, rising; at every BOS token and, whatever stands there, at 0."""
    starts = np.flatnonzero(tokens == bos_id)
    return starts if starts.size and starts[0] == 0 else np.concatenate([[0], starts])


def per_document(values: npt.NDArray[Any], starts: IntArray) -> IntArray:
    """Sums over each document's targets: (D,) int64 from one integer per target, (N,); target i is token i + 1."""
    before = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    first = np.maximum(starts, 1) - 1
    sums: IntArray = before[np.append(first[1:], values.size)] - before[first]
    return sums


def check_bytes(
    tokens: npt.NDArray[Any], target_bytes: npt.NDArray[np.integer[Any]], starts: IntArray, tokenizer: Tokenizer
) -> TextCount:
    """Compare every document's byte count with the UTF-8 length of its decoded text, and count that text.

    tokens: (N + 1,) integers. target_bytes: (N,) integers, the bytes counted for tokens[1:]. starts: as from
    document_starts.

    SentencePiece drops spaces at the start of a text, so each document is decoded behind a token of other text. What
    then may differ is explained exactly by tokens that have no text of their own: a space behind an unknown, unused or
    control token is text but counts 0, and so does the text that unknown and unused tokens decode to; bytes that spell
    no character, as where a document was cut inside one, decode to U+FFFD (3 bytes) each but count 1.

    Raises ValueError naming the first document that differs, and the pieces that decode to other text than they count.
    """
    pieces = _Pieces(str(tokenizer.path))
    previous, targets = tokens[:-1], tokens[1:]
    spaces = pieces.has_space[targets] & pieces.is_special[previous]
    unknown = pieces.unknown_bytes[targets]
    counted = per_document(target_bytes, starts)
    explained = per_document(spaces + unknown + pieces.broken_bytes(targets), starts)
    ends = np.append(starts[1:], tokens.size)
    text_bytes = 0
    for index, (start, end) in enumerate(zip(np.maximum(starts, 1), ends, strict=True)):
        text = pieces.decode(tokens[start:end])
        size = len(text.encode())
        if size != counted[index] + explained[index]:
            raise ValueError(
                f"The score audit found a wrong byte count: the tokens of validation document {index} (from token "
                f"{starts[index]:,}) count {counted[index]:,} bytes, but their text has {size:,} bytes of UTF-8, of "
                f"which unknown and control tokens explain {explained[index]:,}. "
                f"{_suspects(pieces, tokenizer, tokens[start:end])}"
            )
        text_bytes += len(pieces.alone(tokens[start:end]).encode()) if text.startswith(" ") else size
    return TextCount(
        text_bytes=text_bytes,
        target_bytes=int(counted.sum()),
        unknown_tokens=int(pieces.is_unknown[targets].sum()),
        unknown_bytes=int(unknown.sum()),
        control_spaces=int(spaces.sum()),
    )


def _suspects(pieces: _Pieces, tokenizer: Tokenizer, document: npt.NDArray[Any]) -> str:
    """The pieces of a document that decode to another number of bytes than the tokenizer's table has for them."""
    table = tokenizer.byte_table
    found = []
    for token in dict.fromkeys(document.tolist()):
        if table.is_boundary[token] or token in pieces.byte_of:  # a byte alone need not spell a character
            continue
        size = len(pieces.decode(np.array([token])).encode())
        if size != table.base_bytes[token] + table.has_leading_space[token]:
            found.append(f"{token} ({pieces.name(token)!r})")
    if found:
        listed = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        return f"These pieces of {tokenizer.path} have no decoding of their own: {listed}."
    return f"The counts are not those of the tokenizer {tokenizer.path}, or its pieces decode otherwise side by side."


class _Pieces:
    """What the audit needs of a SentencePiece model, read from the file."""

    def __init__(self, path: str) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor: Any = SentencePieceProcessor(model_file=path)
        ids = range(self._processor.vocab_size())
        self._lead = next((i for i in ids if self._is_lead(i)), None)
        self._lead_text = "" if self._lead is None else self._text([self._lead])
        self.is_unknown = np.array([self._processor.is_unknown(i) for i in ids])
        is_textless = self.is_unknown | np.array([self._processor.is_unused(i) for i in ids])
        self.is_special = is_textless | np.array([self._processor.is_control(i) for i in ids])
        self.has_space = ~self.is_special & np.array([self._processor.id_to_piece(i).startswith("▁") for i in ids])
        self.unknown_bytes = np.zeros(len(ids), dtype=np.int64)
        for token in np.flatnonzero(is_textless):
            self.unknown_bytes[token] = len(self.decode(np.array([token])).encode())
        self.byte_of = {i: int(self.name(i)[1:-1], 16) for i in ids if self._processor.is_byte(i)}
        self._is_byte = np.array([i in self.byte_of for i in ids])

    def name(self, token: int) -> str:
        """The piece as the model writes it."""
        return str(self._processor.id_to_piece(token))

    def decode(self, ids: npt.NDArray[Any]) -> str:
        """The text of tokens in the middle of a text: none of their spaces are dropped."""
        lead = [] if self._lead is None else [self._lead]
        return self._text([*lead, *ids.tolist()]).removeprefix(self._lead_text)

    def broken_bytes(self, targets: npt.NDArray[Any]) -> IntArray:
        """(N,) int64: what byte tokens that spell no character decode to beyond a byte each, at each run's first."""
        surplus = np.zeros(targets.size, dtype=np.int64)
        mask = np.concatenate([[False], self._is_byte[targets], [False]])
        bounds = np.flatnonzero(mask[1:] != mask[:-1]).reshape(-1, 2)
        known: dict[bytes, int] = {}
        for start, end in bounds.tolist():
            run = targets[start:end].tolist()
            spelled = bytes(self.byte_of[token] for token in run)
            if spelled not in known:
                try:
                    spelled.decode()
                    known[spelled] = 0
                except UnicodeDecodeError:
                    # ▁ counts one byte of its three.
                    counts = len(spelled) - 2 * spelled.count("▁".encode())
                    known[spelled] = len(self._text(run).encode()) - counts
            surplus[start] = known[spelled]
        return surplus

    def alone(self, ids: npt.NDArray[Any]) -> str:
        """The text of tokens that begin a text, whose first spaces the decoder may drop: the normaliser put them."""
        return self._text(ids.tolist())

    def _text(self, ids: list[int]) -> str:
        # Of a space that byte tokens spell SentencePiece makes its own ▁.
        text: str = self._processor.decode(ids)
        return text.replace("▁", " ")

    def _is_lead(self, token: int) -> bool:
        text = self._text([token])
        return bool(text.strip()) and "\ufffd" not in text


def defined_scores(n_targets: int, method: str, seq_len: int, stride: int, tail: str) -> npt.NDArray[np.int32]:
    """How often the method scores each target, (n_targets,) int32: its definition in closed form, not a window plan."""
    times = np.zeros(n_targets, dtype=np.int32)
    cut = n_targets - n_targets % seq_len
    if method == "standard":
        times[:cut] = 1
    elif method == "ttt" or tail == "exact":
        times[:] = 1
    else:
        whole = (cut - seq_len) // stride
        times[: seq_len + whole * stride] = 1
        times[cut - stride : cut] += cut // stride - 1 - whole
    return times


def check_scores(times: npt.NDArray[np.int32], expected: npt.NDArray[np.int32], starts: IntArray) -> None:
    """Compare how often each target was scored with how often the method scores it, both (N,).

    Raises ValueError naming the first document that differs; starts: as from document_starts.
    """
    if np.array_equal(times, expected):
        return
    target = int(np.argmax(times != expected))
    document = int(np.searchsorted(starts, target + 1, side="right")) - 1
    raise ValueError(
        f"The score audit found a wrong number of scores: {int(times.sum()):,} were given and the method defines "
        f"{int(expected.sum()):,}; the first that differs is token {target + 1:,}, in validation document {document}, "
        f"scored {times[target]} times instead of {expected[target]}."
    )


def find_duplicates(
    tokens: npt.NDArray[Any], starts: IntArray, shards: Sequence[Path], bos_id: int, full: bool = False
) -> Duplicates:
    """Look up validation documents among training documents by the hash of their tokens.

    tokens, starts: the validation stream and its documents. shards: the training shards in order; a document may go on
    in the next. full: look up all validation documents among all training documents; else at most SAMPLED_DOCUMENTS
    among the documents of at most SAMPLED_TOKENS. Left out: empty documents and what stands before the first BOS token.
    """
    from pgolf.data.shards import read_shard

    ends = np.append(starts[1:], tokens.size)
    whole = np.flatnonzero((tokens[starts] == bos_id) & (ends - starts > 1))
    opened = [read_shard(path) for path in shards]
    longest = max(shard.size for shard in opened)
    limit = longest if full else SAMPLED_TOKENS // len(shards)
    complete = limit >= longest
    if not full and whole.size > SAMPLED_DOCUMENTS:
        whole = whole[np.arange(SAMPLED_DOCUMENTS) * whole.size // SAMPLED_DOCUMENTS]
        complete = False
    keys = _keys(tokens, starts[whole], ends[whole])
    digests = [_digest(tokens, start, end) for start, end in zip(starts[whole], ends[whole], strict=True)]
    seen: set[bytes] = set()
    count = 0
    for part, part_starts, part_ends in _training_documents(opened, bos_id, limit):
        count += part_starts.size
        same_key = np.isin(_keys(part, part_starts, part_ends), keys)
        for start, end in zip(part_starts[same_key], part_ends[same_key], strict=True):
            seen.add(_digest(part, start, end))
    return Duplicates(sum(digest in seen for digest in digests), len(digests), count, complete)


def _training_documents(
    shards: Sequence[npt.NDArray[np.uint16]], bos_id: int, limit: int
) -> Iterator[tuple[npt.NDArray[np.uint16], IntArray, IntArray]]:
    """Tokens with the starts and ends of the whole, non-empty documents among the first ``limit`` of each shard."""
    rest = np.empty(0, dtype=np.uint16)
    for index, shard in enumerate(shards):
        tokens = np.concatenate([rest, shard[:limit]])
        bounds = np.flatnonzero(tokens == bos_id)
        if limit < shard.size:
            rest = rest[:0]
        elif index + 1 < len(shards):
            rest = tokens[bounds[-1] :] if bounds.size else rest
        else:
            bounds = np.append(bounds, tokens.size)
        starts, ends = bounds[:-1], bounds[1:]
        filled = ends - starts > 1
        yield tokens, starts[filled], ends[filled]


def _keys(tokens: npt.NDArray[Any], starts: IntArray, ends: IntArray) -> npt.NDArray[np.uint64]:
    """A cheap key for each document, (D,): equal documents have equal keys, and few others do."""
    keys = (ends - starts).astype(np.uint64)
    for position in (starts + 1, (starts + ends) // 2, ends - 1):
        keys = keys * np.uint64(65_537) + tokens[position].astype(np.uint64)
    return keys


def _digest(tokens: npt.NDArray[Any], start: int, end: int) -> bytes:
    return hashlib.blake2b(tokens[start + 1 : end].astype("<u4").tobytes(), digest_size=16).digest()
