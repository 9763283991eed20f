"""The artifact container of docs/spec.md §4: a preamble, a JSON header and the tensors, each an entropy-coded stream.

Version 2 is written; version 1, one zstd frame around all, is read too. Both stand for the same content, of which the
preamble has size and checksum: the header, and the tensors as plain values.

Nothing here knows what a model is, and reading runs no code of the file: there is no pickle. A reader trusts nothing:
it holds at most 1 MiB of header, the file itself and, once header and declared size agree, at most the declared size
(1 GiB or less); of version 1 that only as the content really arrives.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt
import zstandard

from pgolf import _C
from pgolf.common.errors import FormatError
from pgolf.common.threads import on_threads
from pgolf.config.encoding import ENCODINGS

MAGIC = b"PGOLF\r\n\0"
VERSION = 2
READ_VERSIONS = (1, 2)
ALIGNMENT = 64
MAX_CONTENT_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20
MAX_RANK = 8
MAX_HEADER_DEPTH = 16

# Magic, version, flags, content size, the content's CRC-32; after these 28 bytes comes their own CRC-32.
_PREAMBLE = struct.Struct("<8sIIQI")
_U32 = struct.Struct("<I")
_FLOATS: dict[str, np.dtype[np.floating[Any]]] = {"fp16": np.dtype("<f2"), "fp32": np.dtype("<f4")}

_MAX_FRAME_HEADER_BYTES = 18
_UNUSED_BIT = 0x10  # of the frame header descriptor, which decoders ignore (RFC 8878 §3.1.1.1.1.3)
_MAX_WINDOW_BYTES = 1 << 27  # level 22's
# A block of 4 bytes may stand for 128 KiB, so a chunk of input makes at most 32 MiB of output.
_CHUNK_BYTES = 1024
_MAX_FRAME_BYTES = 2 * MAX_HEADER_BYTES  # of version 2's head, compressed or not: the header and 4 bytes a tensor


@dataclass(frozen=True, eq=False)
class EncodedTensor:
    """A tensor as it is stored.

    encoding: one of ENCODINGS.
    values: int8 (rows, columns) for the integer encodings, else float16 or float32 of any shape.
    scale: (rows,) float16 for the integer encodings, else None.
    """

    encoding: str
    values: npt.NDArray[Any]
    scale: npt.NDArray[np.float16] | None = None

    def payload(self) -> bytes:
        """The bytes that stand in the container: the values, row-major, then at once the scales; little-endian."""
        arrays = [self.values] if self.scale is None else [self.values, self.scale]
        return b"".join(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() for array in arrays)


def compress(data: bytes | bytearray) -> bytes:
    """One zstd frame as artifacts hold it: level 22, one thread, with the content size, without checksum."""
    return zstandard.ZstdCompressor(
        level=22, write_content_size=True, write_checksum=False, write_dict_id=False, threads=0
    ).compress(data)


def encode_stream(tensor: EncodedTensor) -> bytes:
    """A tensor's payload as version 2 stores it, entropy-coded without any other tensor (docs/spec.md §4)."""
    if tensor.scale is not None:
        scale = np.require(tensor.scale, np.float16, ["C", "A"]).view(np.uint16)
        return _C.encode_integers(np.require(tensor.values, np.int8, ["C", "A"]), scale)
    bits = np.dtype(f"u{tensor.values.dtype.itemsize}")
    return _C.encode_floats(np.require(tensor.values, None, ["C", "A"]).reshape(_rows(tensor.values.shape)).view(bits))


def encode_streams(tensors: Mapping[str, EncodedTensor]) -> dict[str, bytes]:
    """:func:`encode_stream` of each, by as many threads as pgolf uses."""
    return dict(zip(tensors, on_threads(encode_stream, tensors.values()), strict=True))


def pack_content(header: Mapping[str, Any], tensors: Mapping[str, EncodedTensor]) -> bytes:
    """What a container's preamble has the size and the checksum of: header and tensors as plain values.

    Args:
        header: JSON values; the key "tensors" is the container's own.
        tensors: encoded tensors by name.

    Raises:
        ValueError: the header is not JSON or above 1 MiB, arrays do not fit their encoding, there is more than 1 GiB.
    """
    table = {name: {"encoding": t.encoding, "shape": list(t.values.shape)} for name, t in tensors.items()}
    text = json.dumps(
        {**header, "tensors": table}, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()
    if _is_deep(header):
        raise ValueError(f"The header is nested more than {MAX_HEADER_DEPTH} deep; less was expected.")
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"The header takes {len(text):,} bytes; at most {MAX_HEADER_BYTES:,} were expected.")
    content = bytearray(_U32.pack(len(text)) + text)
    for name in sorted(tensors):
        payload = tensors[name].payload()
        try:
            expected = _payload_bytes(**table[name])
        except ValueError as error:
            raise ValueError(f"The tensor {name!r} {error}.") from None
        if len(payload) != expected:
            raise ValueError(
                f"The tensor {name!r} has a payload of {len(payload):,} bytes; {expected:,} were expected "
                f"for {tensors[name].encoding} and shape {tensors[name].values.shape}."
            )
        content += bytes(_aligned(len(content)) - len(content))
        content += payload
    if len(content) > MAX_CONTENT_BYTES:
        raise ValueError(f"The content takes {len(content):,} bytes; at most {MAX_CONTENT_BYTES:,} were expected.")
    return bytes(content)


def pack(
    header: Mapping[str, Any], tensors: Mapping[str, EncodedTensor], streams: Mapping[str, bytes] | None = None
) -> bytes:
    """A container's bytes, of version 2; equal for equal arguments and an equal zstd version.

    Args:
        header: JSON values; the key "tensors" is the container's own.
        tensors: encoded tensors by name.
        streams: each tensor's :func:`encode_stream`, where they are known already.

    Raises:
        ValueError: as :func:`pack_content`.
    """
    content = pack_content(header, tensors)
    (header_size,) = _U32.unpack_from(content)
    names = sorted(tensors)
    streams = encode_streams(tensors) if streams is None else streams
    stored = [streams[name] for name in names]
    head = content[: _U32.size + header_size] + b"".join(_U32.pack(len(stream)) for stream in stored)
    frame = compress(head)
    body = b"".join([_U32.pack(len(frame)), frame, *stored])
    preamble = _PREAMBLE.pack(MAGIC, VERSION, 0, len(content), zlib.crc32(content))
    return preamble + _U32.pack(zlib.crc32(preamble)) + body + _U32.pack(zlib.crc32(body))


def unpack(source: bytes | str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, EncodedTensor]]:
    """The header and the tensors that :func:`pack` was given, after every check of docs/spec.md §4.

    Both checksums are of what is read, not of the compressed bytes: damage passes only where zstd decodes it to the
    very same content.

    Args:
        source: a container's bytes or its path.

    Returns:
        The header without "tensors", and the tensors in name order, whose arrays are read-only views of one buffer.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the file is damaged or hostile; the message names it, what was found and what was expected.
    """
    if isinstance(source, bytes):
        return _Reader("The artifact in memory", io.BytesIO(source)).read()
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"There is no artifact {path}.")
    with path.open("rb") as file:
        return _Reader(str(path), file).read()


def version_of(path: str | os.PathLike[str]) -> int:
    """The format's version of a container that :func:`unpack` reads."""
    with Path(path).open("rb") as file:
        _, version, *_ = _PREAMBLE.unpack(file.read(_PREAMBLE.size))
    return int(version)


class _Reader:
    """One reading of a container, from its first byte to its last."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name = name
        self._file = file
        self._size = 0  # of the content, as the preamble declares it

    def read(self) -> tuple[dict[str, Any], dict[str, EncodedTensor]]:
        version, checksum = self._read_preamble()
        header, tensors = self._read_1(checksum) if version == 1 else self._read_2(checksum)
        header.pop("tensors")
        return header, tensors

    def _read_1(self, checksum: int) -> tuple[dict[str, Any], dict[str, EncodedTensor]]:
        """The rest of a version 1: one zstd frame that holds the content."""
        pieces = self._decompress(self._file, self._size)
        content, header_end = self._read_header(pieces, self._size)
        header = self._parse(content[_U32.size : header_end])
        offsets = self._layout(header["tensors"], header_end)
        for piece in pieces:
            content += piece
        self._check(zlib.crc32(content), checksum)
        view = memoryview(content).toreadonly()
        tensors, previous_end = {}, header_end
        for name, offset in offsets.items():
            if any(view[previous_end:offset]):
                self._fail(f"the bytes before the tensor {name!r} are not all zero; zeros were expected")
            tensors[name] = _tensor_at(view, offset, **header["tensors"][name])
            previous_end = offset + _payload_bytes(**header["tensors"][name])
        return header, tensors

    def _read_2(self, checksum: int) -> tuple[dict[str, Any], dict[str, EncodedTensor]]:
        """The rest of a version 2: a zstd frame with header and stream sizes, the streams, a CRC-32 of all that."""
        left = self._file.seek(0, os.SEEK_END) - _PREAMBLE.size - 3 * _U32.size
        self._file.seek(_PREAMBLE.size + _U32.size)
        if left < 0:
            self._fail("less than 8 bytes follow the preamble; a head and a CRC-32 were expected")
        start = self._file.read(_U32.size)
        (frame_size,) = _U32.unpack(start)
        most = min(left, _MAX_FRAME_BYTES)
        if frame_size > most:
            self._fail(f"the head claims {frame_size:,} of {left:,} bytes; at most {most:,} were expected")
        frame = self._file.read(frame_size)
        left -= frame_size
        head, header, offsets = self._read_head(frame)
        table, header_end = header["tensors"], len(head) - _U32.size * len(offsets)

        sizes = [size for (size,) in _U32.iter_unpack(head[header_end:])]
        if sum(sizes) != left:
            self._fail(f"the streams have {left:,} bytes; the head's sizes add up to {sum(sizes):,}")
        streams = {name: self._file.read(size) for name, size in zip(offsets, sizes, strict=True)}
        stored = zlib.crc32(frame, zlib.crc32(start))
        for stream in streams.values():
            stored = zlib.crc32(stream, stored)
        (expected,) = _U32.unpack(self._file.read(_U32.size))
        if stored != expected:
            self._fail(f"the bytes after the preamble have the CRC-32 {stored:08x}; {expected:08x} was expected")

        decoded = on_threads(lambda name: _decode_stream(streams[name], **table[name]), streams)
        tensors = dict(zip(streams, decoded, strict=True))
        found, end = zlib.crc32(head[:header_end]), header_end
        for name, offset in offsets.items():
            payload = tensors[name].payload()
            found = zlib.crc32(payload, zlib.crc32(bytes(offset - end), found))
            end = offset + len(payload)
        self._check(found, checksum)
        return header, tensors

    def _read_head(self, frame: bytes) -> tuple[bytearray, dict[str, Any], dict[str, int]]:
        """The head of a version 2, decompressed, the header in it, and where each tensor of the content starts."""
        try:
            size = zstandard.get_frame_parameters(frame).content_size
        except zstandard.ZstdError as error:
            self._fail(f"a zstd frame was expected ({error})")
        if not _U32.size <= size <= _MAX_FRAME_BYTES:
            self._fail(f"the head has {size:,} bytes; {_U32.size} to {_MAX_FRAME_BYTES:,} were expected")
        pieces = self._decompress(io.BytesIO(frame), size)
        head, header_end = self._read_header(pieces, size)
        header = self._parse(head[_U32.size : header_end])
        offsets = self._layout(header["tensors"], header_end)
        for piece in pieces:
            head += piece
        expected = _U32.size * len(offsets)
        if len(head) != header_end + expected:
            self._fail(
                f"{len(head) - header_end:,} bytes follow the header; "
                f"{expected:,}, the size of each tensor's stream, were expected"
            )
        return head, header, offsets

    def _read_header(self, pieces: Iterator[bytes], size: int) -> tuple[bytearray, int]:
        """What has been decompressed of `size` bytes once the header is there, and where the header ends."""
        content = bytearray()

        def fill(wanted: int) -> None:
            """Extends content to `wanted` bytes or more; `_decompress` refuses a frame short of the declared size."""
            while len(content) < wanted:
                content.extend(next(pieces))

        fill(_U32.size)
        (header_size,) = _U32.unpack_from(content)
        if header_size > MAX_HEADER_BYTES:
            self._fail(f"the header claims {header_size:,} bytes; at most {MAX_HEADER_BYTES:,} were expected")
        header_end = _U32.size + header_size
        if header_end > size:
            self._fail(f"the header claims {header_size:,} bytes of a content of {size:,}; fewer were expected")
        fill(header_end)
        return content, header_end

    def _check(self, found: int, checksum: int) -> None:
        if found != checksum:
            self._fail(f"the content has the CRC-32 {found:08x}; {checksum:08x} was expected")

    def _fail(self, sentence: str) -> NoReturn:
        # What a hostile header says may be a megabyte long.
        raise FormatError(f"{self._name}: {sentence[:1000]}.")

    def _read_preamble(self) -> tuple[int, int]:
        """Checks the preamble, sets the content's size and returns version and the content's CRC-32."""
        preamble = self._file.read(_PREAMBLE.size + _U32.size)
        if not preamble.startswith(MAGIC):
            self._fail(f"the file begins with {preamble[: len(MAGIC)]!r}; an artifact's {MAGIC!r} was expected")
        if len(preamble) < _PREAMBLE.size + _U32.size:
            self._fail(f"the preamble has {len(preamble)} bytes; {_PREAMBLE.size + _U32.size} were expected")
        (expected,) = _U32.unpack_from(preamble, _PREAMBLE.size)
        if (found := zlib.crc32(preamble[: _PREAMBLE.size])) != expected:
            self._fail(f"the preamble has the CRC-32 {found:08x}; {expected:08x} was expected")
        _, version, flags, self._size, checksum = _PREAMBLE.unpack_from(preamble)
        if version not in READ_VERSIONS:
            self._fail(f"the format's version is {version}; {' or '.join(map(str, READ_VERSIONS))} was expected")
        if flags != 0:
            self._fail(f"the preamble's flags are {flags:#x}; 0 was expected")
        if not _U32.size <= self._size <= MAX_CONTENT_BYTES:
            self._fail(f"the declared size is {self._size:,} bytes; {_U32.size} to {MAX_CONTENT_BYTES:,} were expected")
        return version, checksum

    def _decompress(self, file: BinaryIO, size: int) -> Iterator[bytes]:
        """Yields the frame in the rest of a file piece by piece; never more than `size`, at the end exactly that."""
        start = file.read(_MAX_FRAME_HEADER_BYTES)
        try:
            frame = zstandard.get_frame_parameters(start)
        except zstandard.ZstdError as error:
            self._fail(f"a zstd frame was expected ({error})")
        if frame.content_size != size:
            self._fail(f"the zstd frame's content size is {frame.content_size:,}; {size:,} were declared")
        window = min(size, _MAX_WINDOW_BYTES)
        if frame.window_size != window or frame.has_checksum or frame.dict_id or start[4] & _UNUSED_BIT:
            self._fail(
                f"the zstd frame's header is {start[: zstandard.frame_header_size(start)].hex(' ')}; "
                f"a window of {window:,} bytes without checksum, dictionary and unused bits was expected"
            )
        decoder = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
        produced, chunk = 0, start
        while not decoder.eof:
            if not chunk:
                self._fail(f"the frame ends after {produced:,} of {size:,} decompressed bytes; it is truncated")
            try:
                piece = decoder.decompress(chunk)
            except zstandard.ZstdError as error:
                self._fail(f"the zstd frame is damaged after {produced:,} of {size:,} bytes ({error})")
            produced += len(piece)
            if produced > size:
                self._fail(f"the zstd frame holds more than the declared {size:,} bytes")
            yield piece
            chunk = b"" if decoder.eof else file.read(_CHUNK_BYTES)
        if produced != size:
            self._fail(f"the zstd frame holds {produced:,} bytes; {size:,} were declared")
        if decoder.unused_data or file.read(1):
            self._fail("bytes follow the zstd frame; its end was expected")

    def _parse(self, text: bytes | bytearray) -> dict[str, Any]:
        try:
            header = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            self._fail(f"the header is not UTF-8 JSON ({error})")
        if _is_deep(header):
            self._fail(f"the header is nested more than {MAX_HEADER_DEPTH} deep; less was expected")
        if not isinstance(header, dict) or not isinstance(header.get("tensors"), dict):
            self._fail('the header has no object "tensors"; one entry for each tensor was expected')
        return header

    def _layout(self, table: dict[str, Any], end: int) -> dict[str, int]:
        """Where each tensor of the content starts, if the last ends where it should; the header ends at `end`."""
        offsets = {}
        for name in sorted(table):
            entry = table[name]
            if not isinstance(entry, dict) or entry.keys() != {"encoding", "shape"}:
                self._fail(
                    f'the header\'s entry for the tensor {name!r} is {entry!r}; "encoding" and "shape" were expected'
                )
            offsets[name] = _aligned(end)
            try:
                end = offsets[name] + _payload_bytes(**entry)
            except ValueError as error:
                self._fail(f"the tensor {name!r} {error}")
        if end != self._size:
            self._fail(f"the content has {self._size:,} bytes; the header's tensors need {end:,}")
        return offsets


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _payload_bytes(encoding: Any, shape: Any) -> int:
    """The size of a tensor's payload; raises ValueError, without the tensor's name, for what no payload can have."""
    if encoding not in ENCODINGS:
        raise ValueError(f"has the encoding {encoding!r}; one of {', '.join(ENCODINGS)} was expected")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(type(dim) is int and dim >= 0 for dim in shape):
        raise ValueError(f"has the shape {shape!r}; a list of at most {MAX_RANK} non-negative integers was expected")
    if encoding not in _FLOATS and len(shape) != 2:
        raise ValueError(f"has the encoding {encoding} and the shape {shape}; [rows, columns] was expected")
    if math.prod(max(dim, 1) for dim in shape) > MAX_CONTENT_BYTES:
        raise ValueError(f"has the shape {shape}; at most {MAX_CONTENT_BYTES:,} elements were expected")
    elements = math.prod(shape)
    return elements * _FLOATS[encoding].itemsize if encoding in _FLOATS else elements + 2 * int(shape[0])


def _tensor_at(view: memoryview, offset: int, encoding: str, shape: list[int]) -> EncodedTensor:
    elements = math.prod(shape)
    dtype = _FLOATS.get(encoding, np.dtype(np.int8))
    values = np.frombuffer(view, dtype, elements, offset).reshape(shape)
    if encoding in _FLOATS:
        return EncodedTensor(encoding, values)
    return EncodedTensor(encoding, values, np.frombuffer(view, _FLOATS["fp16"], shape[0], offset + elements))


def _decode_stream(stream: bytes, encoding: str, shape: list[int]) -> EncodedTensor:
    """The tensor that a stream of version 2 stands for; every stream stands for one."""
    if encoding not in _FLOATS:
        values, scale = _C.decode_integers(stream, *shape)
        tensor = EncodedTensor(encoding, values, scale.view(np.float16))
    else:
        decode = _C.decode_halves if encoding == "fp16" else _C.decode_singles
        bits = decode(stream, *_rows(shape))
        tensor = EncodedTensor(encoding, bits.view(f"f{bits.itemsize}").reshape(shape))
    for array in (tensor.values, tensor.scale):
        if array is not None:
            array.flags.writeable = False
    return tensor


def _rows(shape: Sequence[int]) -> tuple[int, int]:
    """A float tensor as its stream takes it: (rows, columns), the first axis of a matrix or more against the others."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape), 1)


def _is_deep(value: Any) -> bool:
    """Whether a JSON value is nested so deep that comparing or printing it might exhaust the stack."""
    layer = [value]
    for _ in range(MAX_HEADER_DEPTH + 1):
        layer = [
            item
            for outer in layer
            if isinstance(outer, (Mapping, list, tuple))
            for item in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
    return bool(layer)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return values


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON value")
