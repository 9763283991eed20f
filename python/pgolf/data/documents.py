"""Documents out of text, JSON Lines and JSON, plain or compressed, one after the other and never all at once."""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import json
import os
import platform
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, cast

from pgolf.common.errors import FormatError
from pgolf.data import manifest
from pgolf.data.corpus import Corpus

TEXT_DOCUMENT_BYTES = 16 * 1024
"""Longer text files become several documents."""
ZSTD_MAX_WINDOW = 2**27
ENDINGS = (".txt", ".md", ".jsonl", ".ndjson", ".json")
"""What is read of a folder; each may be followed by one of PACKINGS."""
PACKINGS = (".gz", ".zst")
FIELD = "text"
"""The field that holds the text, where nothing else is said."""

_BOM = codecs.BOM_UTF8
_OTHER_BOMS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_LONGEST_FIRST_LINE = 1 << 20
_BLOCK_BYTES = 1 << 20
_BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_LINE_END = re.compile(rb"\n")

_EXPECTED = "one JSON object a line is expected, or in a file that ends in .json an array of them"

Kind = Literal["text", "lines", "json"]


class RawDocument(NamedTuple):
    """A document as it stands in its file; `text` decodes it (in whichever process has the time)."""

    path: str
    line: int
    """The line of the file on which it starts, from 1."""
    is_json: bool
    raw: bytes
    field: str = FIELD
    """Of a JSON object: where its text is."""

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
            raise FormatError(f"{where}: this is not JSON ({error}); {_EXPECTED}.") from None
        if isinstance(value, str):
            text, what = value, "the string"
        elif not isinstance(value, dict):
            raise FormatError(
                f"{where}: this is a JSON {type(value).__name__}; an object with the field {self.field!r} or a string "
                "is expected, and an array of them in a file that ends in .json."
            )
        elif self.field not in value:
            names = ", ".join(repr(name) for name in value) or "none"
            raise FormatError(
                f"{where}: the field {self.field!r} is missing; the object's fields are: {names}. "
                "Say which of them holds the text: field=NAME."
            )
        else:
            text, what = value[self.field], f"the field {self.field!r}"
        if not isinstance(text, str):
            raise FormatError(f"{where}: {what} is of type {type(text).__name__}; a string is expected.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise FormatError(f"{where}: {what} has a lone surrogate, which has no UTF-8 form.") from None
        return text


class Reader(Protocol):
    """A sequence of documents that can be read more than once."""

    names: tuple[str, ...]
    """What is read, for the manifest."""
    total_bytes: int
    read_bytes: int
    """How many of total_bytes have been read since documents() began."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about sources that may have been meant differently, known once they have been read."""
        ...

    def documents(self) -> Iterator[RawDocument]:
        """All documents, from the beginning."""
        ...


class CorpusReader:
    """The built-in corpus, its validation documents first."""

    def __init__(self, corpus: Corpus) -> None:
        self.names: tuple[str, ...] = (f"standard library of Python {platform.python_version()}",)
        self.notes: tuple[str, ...] = ()
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

    A folder stands for all files below it with one of ENDINGS, in the order of their relative paths; what begins with a
    dot is left out, links to folders are not followed, and nothing of the output folder `leave_out` is read.

    - `.jsonl`, `.ndjson`: JSON Lines. Every line that is not blank is a document: an object with the field `field`, or
      a string.
    - `.json`: an array of such values, or values one behind the other, as JSON Lines or over several lines each. They
      are found one by one: memory is bounded by the longest of them, not by the file.
    - Any other file is text: one document, or where it is longer than TEXT_DOCUMENT_BYTES several, cut at a blank line
      where one stands in the second half of that length, else at a line's end, else between characters. Without one of
      ENDINGS, a file whose first line is an object with the field is JSON Lines.

    All may end in `.gz`, or in `.zst` (windows up to 2²⁷). A UTF-8 byte order mark is no part of the text.

    Raises FileNotFoundError for paths that are neither files nor folders, and for folders without such files.
    """

    def __init__(self, paths: Sequence[Path], field: str = FIELD, leave_out: Path | None = None) -> None:
        found = [source for path in paths for source in _sources(path, leave_out)]
        self.names: tuple[str, ...] = tuple(name for name, _ in found)
        self._paths = [path for _, path in found]
        self._field = field
        self._groups: tuple[int, int] | None = None
        self._notes: dict[Path, str] = {}
        self.total_bytes = sum(path.stat().st_size for path in self._paths)
        self.read_bytes = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about sources that may have been meant differently, known once they have been read."""
        return tuple(self._notes.values())

    def split_single_text(self, documents: int, least: int) -> bool:
        """Whether there is one source alone, a text too short for `documents` documents: it is split more finely then.

        It is split at blank lines, paragraphs in groups of about 1/documents of the text, or where that makes fewer
        than `least` documents, at the ends of lines.
        """
        if len(self._paths) != 1:
            return False
        (path,) = self._paths
        longest = documents * TEXT_DOCUMENT_BYTES
        with _opened(path) as (_, text):
            short = self._kind(path) == "text" and len(text.read(longest + 1)) <= longest
        self._groups = (documents, least) if short else None
        return short

    def documents(self) -> Iterator[RawDocument]:
        """All documents, from the beginning.

        Raises FormatError where a compressed file is damaged or ends early, where text is UTF-16, and where a JSON
        array is broken.
        """
        self.read_bytes = 0
        for path in self._paths:
            before = self.read_bytes
            kind = self._kind(path)
            with _opened(path) as (file, text):
                for line, raw in self._pieces(path, kind, text):
                    self.read_bytes = before + file.tell()
                    yield RawDocument(str(path), line, kind != "text", raw, self._field)

    def _pieces(self, path: Path, kind: Kind, text: BinaryIO) -> Iterator[tuple[int, bytes]]:
        """Documents with the lines on which they start."""
        if kind == "lines":
            return _json_lines(text)
        if kind == "json":
            return _json_values(text, path)
        return _text_pieces(text) if self._groups is None else _text_groups(text, *self._groups)

    def _kind(self, path: Path) -> Kind:
        """What a file holds, by its ending, and by its first line where the ending is not one of ENDINGS."""
        ending, _ = _ending(path)
        if ending in (".jsonl", ".ndjson"):
            return "lines"
        if ending == ".json":
            return "json"
        with _opened(path) as (_, text):
            first = text.readline(_LONGEST_FIRST_LINE).removeprefix(_BOM)
        if not _is_document(first, self._field):
            return "text"
        if ending not in ENDINGS:
            return "lines"
        self._notes[path] = (
            f"{path} was read as text, though its first line is a JSON object with the field {self._field!r}; to read "
            "a document a line, give the file a name that ends in .jsonl."
        )
        return "text"


def _sources(path: Path, leave_out: Path | None) -> Iterator[tuple[str, Path]]:
    """The files that a source stands for: each with its name for the manifest."""
    if path.is_file():
        yield path.name, path
        return
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such source file or folder.")
    found = {
        file.relative_to(path).as_posix(): file
        for file in _files_below(path)
        if _ending(file)[0] in ENDINGS and not (leave_out is not None and _is_output(file, path, leave_out))
    }
    if not found:
        raise FileNotFoundError(
            f"{path}: the folder holds no text; files are expected that end in {', '.join(ENDINGS)}, alone or with "
            f"{' or '.join(PACKINGS)} behind."
        )
    yield from sorted(found.items())


def _is_output(file: Path, folder: Path, out: Path) -> bool:
    """Whether a file of a source folder is of the output folder, which may lie in the source folder or be it."""
    file, folder, out = file.resolve(), folder.resolve(), out.resolve()
    return file == out / manifest.NAME or (folder in out.parents and out in file.parents)


def _files_below(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (path for name in files if not name.startswith(".") and (path := Path(root, name)).is_file())


def _ending(path: Path) -> tuple[str, str]:
    """The ending that says what a file holds, and that of its compression, "" where there is none; in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKINGS else ""
    return (suffixes[-1] if suffixes else ""), packing


def _is_document(line: bytes, field: str) -> bool:
    """Whether a line is a JSON object with a string in the field."""
    if not line.lstrip().startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(line).get(field), str)
    except (ValueError, RecursionError):
        return False


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A file as it is and the text in it. Raises FormatError for damage and for text that is UTF-16 or UTF-32."""
    from zstandard import ZstdError

    with path.open("rb") as file:
        try:
            text = _unpacked(file, _ending(path)[1])
            _refuse_other_encodings(path, text.peek(4)[:4])
            yield file, cast(BinaryIO, text)
        except (EOFError, gzip.BadGzipFile, zlib.error, ZstdError) as error:
            raise FormatError(f"{path}: the compressed file is damaged or ends early ({error}).") from None


def _refuse_other_encodings(path: Path, start: bytes) -> None:
    encoding = next((name for bom, name in _OTHER_BOMS.items() if start.startswith(bom)), None)
    # Two characters of ASCII without a byte order mark: no text begins with such NUL bytes.
    if re.fullmatch(rb"[^\0]\0[^\0]\0|\0[^\0]\0[^\0]", start, re.DOTALL):
        encoding = "UTF-16"
    if encoding is not None:
        wrong = next((byte for byte in start if byte >= 0x80), 0)
        raise FormatError(
            f"{path}, line 1: the byte 0x{wrong:02x} is not UTF-8, as text must be: the file is {encoding}. "
            f"Convert it, as with iconv -f {encoding} -t UTF-8."
        )


def _unpacked(file: io.BufferedReader, packing: str) -> io.BufferedReader:
    if packing == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20)
    return io.BufferedReader(_ZstdFile(file), 1 << 20) if packing == ".zst" else file


def _json_lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if line.strip():
            yield number, line


def _json_values(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """The values of a file, or the elements where it is an array, each with the line on which it starts."""
    values = _JsonValues(file)
    start = values.next_byte()
    if start != b"[":
        while start:
            yield values.take()
            start = values.next_byte()
        return

    def fail(sentence: str) -> FormatError:
        return FormatError(f"{path}, line {values.line}: this is not JSON ({sentence}); {_EXPECTED}.")

    values.skip()
    separator = b"," if values.next_byte() != b"]" else b"]"
    if separator == b"]":
        values.skip()
    while separator == b",":
        if values.next_byte() in (b",", b"]", b"}", b":"):
            raise fail(f"an element of the array was expected, not {values.next_byte().decode()!r}")
        if not values.next_byte():
            raise fail("the file ends inside its array")
        yield values.take()
        separator = values.next_byte()
        if separator not in (b",", b"]"):
            raise fail("',' or ']' was expected after an element" if separator else "the file ends inside its array")
        values.skip()
    if values.next_byte():
        raise fail("the file goes on after its array")


class _JsonValues:
    """Where each JSON value in a file ends, found by its quotes and brackets; whether it is right is for others."""

    # What may end a value that no bracket encloses; what matters inside brackets; inside a string.
    _BARE = re.compile(rb'[\[\]{}",\s]')
    _NESTED = re.compile(rb'[\[\]{}"]')
    _STRING = re.compile(rb'["\\]')
    # Escapes by the thousand, for speed; not more, for what the expression remembers of each.
    _ESCAPES = re.compile(rb'(?:[^"\\]*\\.){1,1000}', re.DOTALL)
    _SPACE = re.compile(rb"[ \t\r\n]*")

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._buffer = file.read(_BLOCK_BYTES).removeprefix(_BOM)
        self._at = 0
        self.line = 1
        """The line of the next byte, from 1."""

    def next_byte(self) -> bytes:
        """The next byte that is not white space, which stays; b"" at the end."""
        while True:
            found = self._SPACE.match(self._buffer, self._at)
            self._advance(self._at if found is None else found.end())
            if self._at < len(self._buffer) or not self._more():
                return self._buffer[self._at : self._at + 1]

    def skip(self) -> None:
        """Pass over one byte."""
        self._advance(self._at + 1)

    def take(self) -> tuple[int, bytes]:
        """The value that begins here, of one byte at least, and its line; at the end of the file it may be cut off."""
        depth = 0
        in_string = False
        end = self._at
        while True:
            while in_string and (escapes := self._ESCAPES.match(self._buffer, end)):
                end = escapes.end()
            pattern = self._STRING if in_string else self._NESTED if depth else self._BARE
            found = pattern.search(self._buffer, end)
            if found is None:
                done = max(end, len(self._buffer)) - self._at
                if not self._more():
                    return self._taken(len(self._buffer))
                end = self._at + done
                continue
            byte, end = found[0], found.end()
            if in_string:
                in_string = byte != b'"'
                end += byte == b"\\"  # and what it escapes
            elif byte == b'"':
                in_string = True
            elif byte in (b"{", b"["):
                depth += 1
            elif byte in (b"}", b"]"):
                depth -= 1
            if depth < 0 or (byte not in b'"{}[]\\'):  # what comes after a number or a word
                return self._taken(max(found.start(), self._at + 1))
            if depth == 0 and not in_string:
                return self._taken(end)

    def _taken(self, end: int) -> tuple[int, bytes]:
        line, raw = self.line, self._buffer[self._at : end]
        self._advance(end)
        return line, raw

    def _advance(self, end: int) -> None:
        self.line += self._buffer.count(b"\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        """Read on; as much again as is held, so that a long value is not copied for every block."""
        held = self._buffer[self._at :]
        block = self._file.read(max(_BLOCK_BYTES, len(held)))
        self._buffer, self._at = held + block, 0
        return bool(block)


def _text_groups(file: BinaryIO, documents: int, least: int) -> Iterator[tuple[int, bytes]]:
    """A short text in groups of paragraphs, or of lines where these are fewer than `least`."""
    text = file.read().removeprefix(_BOM)
    for end in (_BLANK_LINES, _LINE_END):
        # A unit belongs to the share of the text in which it starts.
        groups = [
            b"".join(raw for _, raw in group)
            for _, group in itertools.groupby(_units(text, end), lambda unit: unit[0] * documents // len(text))
        ]
        if len(groups) >= least:
            break
    line = 1
    for raw in groups:
        yield line, raw
        line += raw.count(b"\n")


def _units(text: bytes, end: re.Pattern[bytes]) -> Iterator[tuple[int, bytes]]:
    """A text's parts, each up to where `end` ends and with more in it than white space, and where they start."""
    starts, last = [0], len(text.rstrip())
    for stop in (found.end() for found in end.finditer(text)):
        if stop < last and text[starts[-1] : stop].strip():
            starts.append(stop)
    for start, stop in itertools.pairwise([*starts, len(text)]):
        offset = start
        for _, raw in _text_pieces(io.BytesIO(text[start:stop])):
            yield offset, raw
            offset += len(raw)


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
    for ends in ((b"\n\n", b"\n\r\n"), (b"\n",)):
        found = [(block.rfind(end, TEXT_DOCUMENT_BYTES // 2, TEXT_DOCUMENT_BYTES), len(end)) for end in ends]
        start, length = max(found)
        if start >= 0:
            return start + length
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
