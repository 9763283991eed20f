"""Documents out of text files and JSONL, plain or compressed, one after the other and never all at once."""

from __future__ import annotations

import gzip
import io
import json
import platform
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, cast

from pgolf.data.corpus import Corpus
from pgolf.errors import FormatError

TEXT_DOCUMENT_BYTES = 16 * 1024
"""Longer text files become several documents."""
ZSTD_MAX_WINDOW = 2**27

_BOM = b"\xef\xbb\xbf"


class RawDocument(NamedTuple):
    """A document as it stands in its file; `text` decodes it (in whichever process has the time)."""

    path: str
    line: int
    """The line of the file on which it starts, from 1."""
    is_json: bool
    raw: bytes

    def text(self) -> str:
        """The document's text. Raises FormatError, naming file and line, where it is not UTF-8 or not such JSON."""
        try:
            text = self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            line = self.line + self.raw.count(b"\n", 0, error.start)
            found = self.raw[error.start]
            raise FormatError(
                f"{self.path}, line {line}: the byte 0x{found:02x} is not UTF-8, as text must be."
            ) from None
        return self._json_text(text) if self.is_json else text

    def _json_text(self, line: str) -> str:
        where = f"{self.path}, line {self.line}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where}: this is not JSON ({error}); one JSON object a line is expected.") from None
        if not isinstance(value, dict):
            raise FormatError(
                f"{where}: this is a JSON {type(value).__name__}; an object with the field 'text' is expected."
            )
        if "text" not in value:
            names = ", ".join(repr(name) for name in value) or "none"
            raise FormatError(f"{where}: the field 'text' is missing; the object's fields are: {names}.")
        text = value["text"]
        if not isinstance(text, str):
            raise FormatError(f"{where}: the field 'text' is of type {type(text).__name__}; a string is expected.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise FormatError(f"{where}: the field 'text' has a lone surrogate, which has no UTF-8 form.") from None
        return text


class Reader(Protocol):
    """A sequence of documents that can be read more than once."""

    names: tuple[str, ...]
    """What is read, for the manifest."""
    total_bytes: int
    read_bytes: int
    """How many of total_bytes have been read since documents() began."""

    def documents(self) -> Iterator[RawDocument]:
        """All documents, from the beginning."""
        ...


class CorpusReader:
    """The built-in corpus, its validation documents first."""

    def __init__(self, corpus: Corpus) -> None:
        self.names: tuple[str, ...] = (f"standard library of Python {platform.python_version()}",)
        self.val_docs = len(corpus.val)
        self._documents = [RawDocument(d.name, 1, False, d.text.encode()) for d in (*corpus.val, *corpus.train)]
        self.total_bytes = sum(len(document.raw) for document in self._documents)
        self.read_bytes = 0

    def documents(self) -> Iterator[RawDocument]:
        """All documents, from the beginning."""
        self.read_bytes = 0
        for document in self._documents:
            self.read_bytes += len(document.raw)
            yield document


class FileReader:
    """The documents of several files, in the order given, and how far reading has come.

    `.jsonl` files hold a JSON object with the field `text` on every line that is not blank, each a document. Every
    other file is text: one document, or where it is longer than TEXT_DOCUMENT_BYTES several, cut at a blank line where
    one stands in the second half of that length, else at a line's end, else between characters. Both may end in `.gz`,
    or in `.zst` (windows up to 2²⁷).

    Raises FileNotFoundError and IsADirectoryError for paths that are no files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if path.is_dir():
                raise IsADirectoryError(f"{path}: this is a folder; text or JSONL files are expected.")
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such source file.")
        self.names: tuple[str, ...] = tuple(path.name for path in paths)
        self._paths = paths
        self.total_bytes = sum(path.stat().st_size for path in paths)
        self.read_bytes = 0

    def documents(self) -> Iterator[RawDocument]:
        """All documents, from the beginning. Raises FormatError where a compressed file is damaged or ends early."""
        from zstandard import ZstdError

        self.read_bytes = 0
        for path in self._paths:
            before = self.read_bytes
            suffixes = [suffix.lower() for suffix in path.suffixes]
            packing = suffixes.pop() if suffixes and suffixes[-1] in (".gz", ".zst") else ""
            is_json = bool(suffixes) and suffixes[-1] in (".jsonl", ".ndjson")
            with path.open("rb") as file:
                text = _unpacked(file, packing)
                try:
                    for line, raw in _json_lines(text) if is_json else _text_pieces(text):
                        self.read_bytes = before + file.tell()
                        yield RawDocument(str(path), line, is_json, raw)
                except (EOFError, gzip.BadGzipFile, zlib.error, ZstdError) as error:
                    raise FormatError(f"{path}: the compressed file is damaged or ends early ({error}).") from None


def _unpacked(file: BinaryIO, packing: str) -> BinaryIO:
    if packing == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file))
    return cast(BinaryIO, io.BufferedReader(_ZstdFile(file), 1 << 20)) if packing == ".zst" else file


def _json_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield number, line


def _text_pieces(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    line = 1
    block = file.read(TEXT_DOCUMENT_BYTES).removeprefix(_BOM)
    while block:
        block += file.read(TEXT_DOCUMENT_BYTES + 1 - len(block))
        cut = len(block) if len(block) <= TEXT_DOCUMENT_BYTES else _cut(block)
        yield line, block[:cut]
        line += block.count(b"\n", 0, cut)
        block = block[cut:]


def _cut(block: bytes) -> int:
    """Where to end a document within a block of TEXT_DOCUMENT_BYTES + 1 bytes."""
    for end in (b"\n\n", b"\n"):
        found = block.rfind(end, TEXT_DOCUMENT_BYTES // 2, TEXT_DOCUMENT_BYTES)
        if found >= 0:
            return found + len(end)
    cut = TEXT_DOCUMENT_BYTES
    while cut > TEXT_DOCUMENT_BYTES - 3 and block[cut] & 0xC0 == 0x80:  # a character's second to fourth byte
        cut -= 1
    return cut


class _ZstdFile(io.RawIOBase):
    """Zstandard frames, one behind the other, as a readable file; unlike the library's reader it notices truncation."""

    def __init__(self, file: BinaryIO) -> None:
        from zstandard import ZstdDecompressor

        self._file = file
        self._decompressor = ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)
        self._frame: Any = None
        self._packed = b""
        self._text = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            self._packed = self._packed or self._file.read(1 << 16)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            frame = self._frame or self._decompressor.decompressobj()
            self._text = memoryview(frame.decompress(self._packed))
            self._packed = frame.unused_data if frame.eof else b""
            self._frame = None if frame.eof else frame
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count
