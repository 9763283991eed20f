"""SentencePiece tokenizers, and how many bytes of text each token stands for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pgolf.common.errors import FormatError

SPACE = "\u2581"
"""The character that stands for a space in SentencePiece's pieces (LOWER ONE EIGHTH BLOCK)."""


class ByteTable(NamedTuple):
    """Bytes per token, docs/spec.md §5; three arrays of shape (vocab_size,)."""

    base_bytes: NDArray[np.int16]
    """UTF-8 length of what the piece decodes to inside a text, without a leading space; 1 for byte tokens; 0 for
    control, unknown and unused ones."""
    has_leading_space: NDArray[np.bool_]
    """The piece starts with a space, which counts one byte unless the previous token is a boundary."""
    is_boundary: NDArray[np.bool_]
    """Control, unknown and unused tokens."""


class Tokenizer:
    """A SentencePiece model.

    `path`: a `.model` file. Raises FileNotFoundError where it is missing, FormatError where it is not such a model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from sentencepiece import SentencePieceProcessor

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such tokenizer; a SentencePiece .model file is expected.")
        model = self.path.read_bytes()
        try:
            self._normalizer = _normalizer_spec(model)
            self.identity = _identity(model, self._normalizer)
            """SHA-256, in hexadecimal, of what makes this tokenizer: pieces, their types, the normaliser. A copy that
            another program saved again has the same one."""
            self._processor: Any = SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(model)
            self._pieces = [self._processor.id_to_piece(token) for token in range(self._processor.vocab_size())]
        except (FormatError, RuntimeError, UnicodeDecodeError) as error:
            raise FormatError(f"{self.path}: this is not a SentencePiece model ({error}).") from None
        self.sha256 = hashlib.sha256(model).hexdigest()
        """SHA-256 of the model file's bytes, in hexadecimal."""
        self.vocab_size = len(self._pieces)
        self.bos_id: int = self._processor.bos_id()
        """The id that starts a document; -1 where the model has none."""

    def __repr__(self) -> str:
        return f"Tokenizer({str(self.path)!r}, vocab_size={self.vocab_size}, normalizer={self.normalizer!r})"

    @property
    def normalizer(self) -> str:
        """The name of the text normalisation: "nmt_nfkc", "identity", ..."""
        return bytes(self._normalizer.get(1, b"")).decode("utf-8", "replace")

    @property
    def add_dummy_prefix(self) -> bool:
        """True where the model puts a space before every text that it encodes."""
        return bool(self._normalizer.get(3, 1))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or EOS.

        Raises TypeError for anything but str, ValueError for text that has no UTF-8 form (lone surrogates).
        """
        if not isinstance(text, str):
            raise TypeError(f"the text is of type {type(text).__name__}; str is expected.")
        ids: list[int] = self._processor.encode(text.encode("utf-8"))
        return ids

    def decode(self, ids: ArrayLike) -> str:
        """The text of 1-D token ids; control tokens stand for nothing.

        Raises TypeError and ValueError for another dtype or shape, IndexError for ids outside the vocabulary.
        """
        array = self._checked(ids)
        if array.ndim != 1:
            raise ValueError(f"token ids have shape {array.shape}; one dimension is expected.")
        return as_text(self._processor.decode(array.tolist()))

    @cached_property
    def byte_table(self) -> ByteTable:
        """Bytes per token, as SentencePiece decodes each piece inside a text (docs/spec.md §5)."""
        sp = self._processor
        table = ByteTable(
            np.zeros(self.vocab_size, dtype=np.int16),
            np.zeros(self.vocab_size, dtype=np.bool_),
            np.zeros(self.vocab_size, dtype=np.bool_),
        )
        for token, piece in enumerate(self._pieces):
            if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
                table.is_boundary[token] = True
            elif sp.is_byte(token):
                table.base_bytes[token] = 1
            else:
                text = self._inside_text(token)
                table.has_leading_space[token] = piece.startswith(SPACE) and text.startswith(" ")
                table.base_bytes[token] = len(text.encode("utf-8")) - table.has_leading_space[token]
        for array in table:
            array.flags.writeable = False
        return table

    def _inside_text(self, token: int) -> str:
        """What a token decodes to inside a text; at its beginning the decoder may drop spaces."""
        lead, text = self._lead
        return as_text(self._processor.decode([*lead, token])).removeprefix(text)

    @cached_property
    def _lead(self) -> tuple[list[int], str]:
        """A token that decodes to more than spaces, and its text; none where the vocabulary has no such token."""
        for token in range(self.vocab_size):
            text = as_text(self._processor.decode([token]))
            if text.strip() and "\ufffd" not in text:
                return [token], text
        return [], ""

    @cached_property
    def _space_in_bytes(self) -> tuple[int, ...]:
        """The byte tokens that spell ▁, which SentencePiece puts in a space's place; empty where it lacks one."""
        pieces = enumerate(self._pieces)
        tokens = {int(piece[1:-1], 16): token for token, piece in pieces if self._processor.is_byte(token)}
        spelled = SPACE.encode("utf-8")
        return tuple(tokens[byte] for byte in spelled) if tokens.keys() >= set(spelled) else ()

    def stream_bytes(self, tokens: ArrayLike) -> NDArray[np.int64]:
        """How many bytes of text each token of a stream but the first stands for (docs/spec.md §5).

        As `target_bytes`, and a space that a vocabulary without ▁ spells with three byte tokens counts one byte, at
        the third. `tokens`: (N + 1,) integers; returns (N,) int64 for tokens[1:].

        Raises TypeError for other dtypes, ValueError for other shapes, IndexError for ids outside the vocabulary.
        """
        array = self._checked(tokens)
        if array.ndim != 1:
            raise ValueError(f"a stream of tokens has shape {array.shape}; one dimension is expected.")
        total = self.target_bytes(array[:-1], array[1:])
        if self._space_in_bytes:
            first, second, third = self._space_in_bytes
            # Not of one that begins the stream, whose first token is not a target: there the others are bytes alone.
            starts = 1 + np.flatnonzero((array[1:-2] == first) & (array[2:-1] == second) & (array[3:] == third))
            total[starts - 1] = 0
            total[starts] = 0
        return total

    def target_bytes(self, prev_ids: ArrayLike, target_ids: ArrayLike) -> NDArray[np.int64]:
        """How many bytes of text each target stands for, behind the token that precedes it (docs/spec.md §5).

        `prev_ids`, `target_ids`: integer arrays of one shape; the result, int64, has it too.
        Raises TypeError for other dtypes, ValueError for differing shapes, IndexError for ids outside the vocabulary.
        """
        prev, target = self._checked(prev_ids), self._checked(target_ids)
        if prev.shape != target.shape:
            raise ValueError(
                f"previous ids have shape {prev.shape} and target ids {target.shape}; they must be the same."
            )
        table = self.byte_table
        space = table.has_leading_space[target] & ~table.is_boundary[prev]
        total: NDArray[np.int64] = np.add(table.base_bytes[target], space, dtype=np.int64)
        return total

    def _checked(self, ids: ArrayLike) -> NDArray[Any]:
        array = np.asarray(ids)
        if array.size == 0:
            return array.astype(np.int64)
        if array.dtype.kind not in "iu":
            raise TypeError(f"token ids have dtype {array.dtype}; integers are expected.")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.vocab_size:
            raise IndexError(
                f"token ids range from {low} to {high}; the vocabulary of {self.path} is 0 to {self.vocab_size - 1}."
            )
        return array


def as_text(decoded: str) -> str:
    """What SentencePiece decoded, as text: a ▁ that byte tokens spell stands for a space, as every ▁ in a piece does.

    SentencePiece puts ▁ in the place of every space before it cuts a text into pieces, so that no ▁ of the text itself
    could be told from a space.
    """
    return decoded.replace(SPACE, " ")


def _identity(model: bytes, normalizer: dict[int, Any]) -> str:
    """SHA-256 of a serialized ModelProto's pieces with their types, and of what its normaliser does.

    Left out: scores, the trainer's settings, the normaliser's name, the order of fields and those at their defaults.
    """
    digest = hashlib.sha256()
    for number, value in _fields(model):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))  # 1 piece, 2 score, 3 type, by default 1 (NORMAL)
            text = piece.get(1, b"")
            if not isinstance(text, bytes):
                raise FormatError("it has a piece that is not a string")
            digest.update(len(text).to_bytes(4, "little") + text + bytes([int(piece.get(3, 1)) & 0xFF]))
    # 2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces
    digest.update(bytes(normalizer.get(2, b"")))
    digest.update(bytes(bool(normalizer.get(number, 1)) for number in (3, 4, 5)))
    return digest.hexdigest()


def _normalizer_spec(model: bytes) -> dict[int, Any]:
    """The scalar and bytes fields of a serialized ModelProto's NormalizerSpec (field 3), by number.

    The SentencePiece library reads these but does not show them, and its protobuf classes need a package of their own.
    Field numbers are those of sentencepiece_model.proto: 1 name, 2 precompiled_charsmap, 3 add_dummy_prefix,
    4 remove_extra_whitespaces, 5 escape_whitespaces.
    """
    for number, value in _fields(model):
        if number == 3 and isinstance(value, bytes):
            return dict(_fields(value))
    raise FormatError("it has no normalizer")


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Walk a protobuf message (the wire format's varint, fixed and length-delimited fields)."""
    end = 0

    def take(count: int) -> bytes:
        nonlocal end
        if end + count > len(message):
            raise FormatError("it ends inside a field")
        end += count
        return message[end - count : end]

    def varint() -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise FormatError("it has an integer of more than 64 bits")

    while end < len(message):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
        elif kind == 1:
            yield number, take(8)
        elif kind == 2:
            yield number, take(varint())
        elif kind == 5:
            yield number, take(4)
        else:
            raise FormatError(f"it has a field of unknown wire type {kind}")
