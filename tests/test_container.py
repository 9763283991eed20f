"""The artifact container: exact bytes, round trips, and a FormatError for every damaged or hostile file."""

from __future__ import annotations

import base64
import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pgolf import _C
from pgolf.artifacts import container
from pgolf.artifacts.container import EncodedTensor, encode_stream, pack, pack_content, unpack, version_of
from pgolf.common.errors import FormatError

RNG = np.random.default_rng(0)
HEADER = {"seed": 42, "größe": [1.5, None, True]}
TENSORS = {
    "b.int6": EncodedTensor("int6", RNG.integers(-32, 32, (3, 5), np.int8), np.array([0.5, 2.0**-14, 3], np.float16)),
    "a.fp32": EncodedTensor("fp32", RNG.standard_normal((2, 3)).astype(np.float32)),
    "c.scalar": EncodedTensor("fp16", np.array(0.05, np.float16)),
    "d.empty": EncodedTensor("fp16", np.empty((0, 7), np.float16)),
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].encoding == tensor.encoding
        for a, b in [(found[name].values, tensor.values), (found[name].scale, tensor.scale)]:
            if b is None:
                assert a is None
            else:
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                assert a.tobytes() == b.tobytes()


def preamble_bytes(content: bytes, *, size: int | None = None, **fields) -> bytes:
    """A preamble whose own checksum is right, whatever its fields are."""
    preamble = struct.pack(
        "<8sIIQI",
        b"PGOLF\r\n\0",
        fields.get("version", 1),
        fields.get("flags", 0),
        len(content) if size is None else size,
        fields.get("crc", zlib.crc32(content)),
    )
    return preamble + struct.pack("<I", zlib.crc32(preamble))


def file_bytes(content: bytes, *, frame: bytes | None = None, **fields) -> bytes:
    """A container of version 1 whose checksums are right, whatever the content and the preamble's fields are."""
    return preamble_bytes(content, **fields) + (container.compress(content) if frame is None else frame)


def file_2(
    head: bytes, streams: bytes = b"", *, content: bytes = bytes(1000), frame: bytes | None = None, **fields
) -> bytes:
    """The same of version 2: its head, and its streams in a row."""
    frame = container.compress(head) if frame is None else frame
    body = struct.pack("<I", fields.pop("frame_size", len(frame))) + frame + streams
    return preamble_bytes(content, version=2, **fields) + body + struct.pack("<I", zlib.crc32(body))


def content_of(header, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = struct.pack("<I", len(text)) + text
    return start + (bytes(-len(start) % 64) + payload if payload else b"")


def test_exact_bytes():
    """The whole layout of docs/spec.md §4, written out by hand; the streams are those of tests/test_coder.py."""
    data = pack(HEADER, TENSORS)
    assert data[:16] == b"PGOLF\r\n\0" + bytes([2, 0, 0, 0, 0, 0, 0, 0])
    size, content_crc, preamble_crc = struct.unpack("<QII", data[16:32])
    assert preamble_crc == zlib.crc32(data[:28])

    text = (
        '{"größe":[1.5,null,true],"seed":42,"tensors":{'
        '"a.fp32":{"encoding":"fp32","shape":[2,3]},"b.int6":{"encoding":"int6","shape":[3,5]},'
        '"c.scalar":{"encoding":"fp16","shape":[]},"d.empty":{"encoding":"fp16","shape":[0,7]}}}'
    ).encode()
    payloads = [
        TENSORS["a.fp32"].values.astype("<f4").tobytes(),
        TENSORS["b.int6"].values.tobytes() + TENSORS["b.int6"].scale.astype("<f2").tobytes(),
        TENSORS["c.scalar"].values.astype("<f2").tobytes(),
        b"",
    ]
    expected = struct.pack("<I", len(text)) + text
    for payload in payloads:
        expected += bytes(-len(expected) % 64) + payload
    assert (size, content_crc) == (len(expected), zlib.crc32(expected))
    assert pack_content(HEADER, TENSORS) == expected

    tensor = TENSORS["b.int6"]
    streams = [
        _C.encode_floats(TENSORS["a.fp32"].values.view(np.uint32)),
        _C.encode_integers(tensor.values, tensor.scale.view(np.uint16)),
        _C.encode_floats(TENSORS["c.scalar"].values.reshape(1, 1).view(np.uint16)),
        _C.encode_floats(TENSORS["d.empty"].values.view(np.uint16)),
    ]
    assert streams == [encode_stream(TENSORS[name]) for name in sorted(TENSORS)]
    head = struct.pack("<I", len(text)) + text + struct.pack("<4I", *map(len, streams))
    frame = zstandard.ZstdCompressor(level=22).compress(head)
    body = struct.pack("<I", len(frame)) + frame + b"".join(streams)
    assert data[32:] == body + struct.pack("<I", zlib.crc32(body))


GOLDEN_VALUES = (np.arange(40, dtype=np.int64).reshape(5, 8) * 7919 % 63 - 31).astype(np.int8)
GOLDEN_TENSORS = {
    "b.int6": EncodedTensor("int6", GOLDEN_VALUES, np.array([0.5, 0.25, 2.0**-14, 3, 0.1], np.float16)),
    "a.fp32": EncodedTensor("fp32", np.array([[1, -2.5, 3e-9], [0, 65504, -1e30]], np.float32)),
    "c.scalar": EncodedTensor("fp16", np.array(0.05, np.float16)),
    "d.empty": EncodedTensor("fp16", np.empty((0, 7), np.float16)),
}
GOLDEN_1 = base64.b64decode(
    "UEdPTEYNCgABAAAAAAAAAMABAAAAAAAAjFCVsriHzi8otS/9YMAALQcAxAvdAAAAeyJncsO2w59lIjpbMS41LG51bGwsdHJ1ZV0sInNlZWQiOjQy"
    "LCJ0ZW5zb3JzIjp7ImEuZnAzMmVuY29kaW5nIjoiLCJzaGFwMiwzXX0sImIuaW50NjUsOGMuc2NhbGFyMWQuZW1wdHkwLDddfX19AIA/AAAgwI8o"
    "TjHgf0fK8knxAOEN+ucTAO0ZBvMfDPnmEv/sGAXyHgv45RH+6xcE8R0K9+QQ/eoWA/AAOAA0AAQAQmYuAGYqABAAAtIYcEBu4a6AcDhnSqypFaBy"
    "dwvDARsQ4LKA0/5MsGKz/XYtUA=="
)


def test_version_1_is_still_read(tmp_path):
    """Golden bytes that the last version 1 of pgolf wrote."""
    header, tensors = unpack(GOLDEN_1)
    assert header == HEADER
    assert_same(tensors, GOLDEN_TENSORS)
    assert zstandard.ZstdDecompressor().decompress(GOLDEN_1[32:]) == pack_content(HEADER, GOLDEN_TENSORS)
    (tmp_path / "1.pgolf").write_bytes(GOLDEN_1)
    (tmp_path / "2.pgolf").write_bytes(pack(header, tensors))
    assert [version_of(tmp_path / f"{version}.pgolf") for version in (1, 2)] == [1, 2]
    assert_same(unpack(tmp_path / "2.pgolf")[1], GOLDEN_TENSORS)


def test_bytes_depend_on_no_order():
    arrays = dict(reversed(TENSORS.items()))
    arrays["b.int6"] = EncodedTensor("int6", np.asfortranarray(arrays["b.int6"].values), arrays["b.int6"].scale)
    arrays["a.fp32"] = EncodedTensor("fp32", np.asfortranarray(arrays["a.fp32"].values))
    assert pack(dict(reversed(HEADER.items())), arrays) == pack(HEADER, TENSORS)


def test_round_trip_of_bytes_and_files(tmp_path):
    data = pack(HEADER, TENSORS)
    (tmp_path / "a.pgolf").write_bytes(data)
    for source in (data, tmp_path / "a.pgolf", str(tmp_path / "a.pgolf")):
        header, tensors = unpack(source)
        assert header == HEADER
        assert list(tensors) == sorted(TENSORS)
        assert_same(tensors, TENSORS)
        assert not tensors["a.fp32"].values.flags.writeable


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('aé\0\n"😀'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\\", max_size=3), inner, max_size=3),
    max_leaves=5,
)
floats = st.sampled_from([("fp16", np.float16), ("fp32", np.float32)]).flatmap(
    lambda pair: hnp.arrays(pair[1], hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)).map(
        lambda values: EncodedTensor(pair[0], values)
    )
)
integers = st.tuples(
    st.sampled_from(["int5", "int6", "int8"]),
    hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9)),
).map(lambda pair: EncodedTensor(*pair, np.linspace(0.1, 1, len(pair[1]), dtype=np.float16)))


@settings(max_examples=60)
@given(
    st.dictionaries(st.text(max_size=4).filter(lambda key: key != "tensors"), json_values, max_size=3),
    st.dictionaries(st.text(max_size=6), floats | integers, max_size=4),
)
def test_round_trip_of_anything(header, tensors):
    found_header, found = unpack(pack(header, tensors))
    assert found_header == header
    assert_same(found, tensors)


RANDOM = {
    "w": EncodedTensor("int6", RNG.integers(-32, 32, (8, 16), np.int8), RNG.random(8).astype(np.float16)),
    "x": EncodedTensor("fp32", RNG.standard_normal(6).astype(np.float32)),
}
BOTH = pytest.mark.parametrize(
    "data", [file_bytes(pack_content(HEADER, RANDOM)), pack(HEADER, RANDOM)], ids=["version 1", "version 2"]
)


@BOTH
def test_every_truncation_is_refused(data):
    for length in range(len(data)):
        with pytest.raises(FormatError):
            unpack(data[:length])


@BOTH
def test_every_bit_flip_is_refused(data):
    """Version 1 where nothing repeats itself (see the next test); version 2 has a checksum for every byte."""
    for position in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(FormatError):
            unpack(bytes(damaged))


@settings(max_examples=300)
@given(st.data())
def test_random_damage_is_refused_or_harmless(data):
    """Content that repeats itself has several zstd encodings: damage may pass only where it changes no value."""
    tensors = {"w": EncodedTensor("int5", np.zeros((40, 40), np.int8), np.ones(40, np.float16))}
    whole = data.draw(st.sampled_from([pack(HEADER, tensors), file_bytes(pack_content(HEADER, tensors))]))
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        header, found = unpack(bytes(damaged))
    except FormatError:
        return
    assert header == HEADER
    assert_same(found, tensors)


GOOD = content_of({"tensors": {}})


def entry(encoding, shape):
    return {"tensors": {"w": {"encoding": encoding, "shape": shape}}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "begins with b''; an artifact's b'PGOLF"),
        (b"PK\3\4" * 20, "begins with b'PK"),
        (file_bytes(GOOD)[:20], "preamble has 20 bytes; 32"),
        (file_bytes(GOOD)[:31] + b"\0" + file_bytes(GOOD)[32:], "preamble has the CRC-32 .* expected"),
        (file_bytes(GOOD, version=3), "version is 3; 1 or 2 was expected"),
        (file_bytes(GOOD, flags=4), "flags are 0x4; 0"),
        (file_bytes(GOOD, size=(1 << 30) + 1), "declared size is 1,073,741,825 bytes; 4 to 1,073,741,824"),
        (file_bytes(GOOD, size=1 << 63), "declared size is 9,223,372,036,854,775,808 bytes"),
        (file_bytes(b"abc"), "declared size is 3 bytes"),
        (file_bytes(GOOD, size=len(GOOD) + 1), f"content size is {len(GOOD)}; {len(GOOD) + 1} were declared"),
        (file_bytes(GOOD, frame=b""), "a zstd frame was expected"),
        (file_bytes(GOOD, frame=b"not a zstd frame at all"), "a zstd frame was expected"),
        (file_bytes(GOOD) + b"\0", "bytes follow the zstd frame"),
        (file_bytes(GOOD) + bytes(5000), "bytes follow the zstd frame"),
        (file_bytes(GOOD) + container.compress(GOOD), "bytes follow the zstd frame"),
        (file_bytes(GOOD)[:-1], f"ends after .* of {len(GOOD)} decompressed bytes; it is truncated"),
        (file_bytes(GOOD, crc=5), "content has the CRC-32 .*; 00000005 was expected"),
        (
            file_bytes(struct.pack("<I", (1 << 20) + 1) + bytes(1 << 21)),
            "header claims 1,048,577 bytes; at most 1,048,576",
        ),
        (file_bytes(struct.pack("<I", 50) + b"{}"), "header claims 50 bytes of a content of 6"),
        (file_bytes(content_of(b"\xff\xfe")), "header is not UTF-8 JSON"),
        (file_bytes(content_of(b"{")), "header is not UTF-8 JSON"),
        (file_bytes(content_of(b"[" * 1_000_000)), "header is not UTF-8 JSON"),
        (file_bytes(content_of(b'{"tensors":{},"tensors":{}}')), "header is not UTF-8 JSON .a key stands twice"),
        (file_bytes(content_of(b'{"tensors":{},"x":NaN}')), "NaN is not a JSON value"),
        (file_bytes(content_of(b'{"tensors":{},"x":' + b"9" * 10_000 + b"}")), "header is not UTF-8 JSON"),
        (file_bytes(content_of(b'{"tensors":{"w":' + b"[" * 400 + b"]" * 400 + b"}}")), "nested more than 16 deep"),
        (file_bytes(content_of([])), 'no object "tensors"'),
        (file_bytes(content_of({"seed": 1})), 'no object "tensors"'),
        (file_bytes(content_of({"tensors": []})), 'no object "tensors"'),
        (file_bytes(content_of({"tensors": {"w": 3}})), "entry for the tensor 'w' is 3"),
        (file_bytes(content_of({"tensors": {"w": {"shape": [1]}}})), '"encoding" and "shape" were expected'),
        (file_bytes(content_of(entry("int3", [2, 2]))), "'w' has the encoding 'int3'; one of int5, int6"),
        (file_bytes(content_of(entry(["fp16"], [2, 2]))), "'w' has the encoding .'fp16'.; one of"),
        (file_bytes(content_of(entry("fp16", 4))), "'w' has the shape 4; a list"),
        (file_bytes(content_of(entry("fp16", [2, -1]))), "'w' has the shape .2, -1.; a list"),
        (file_bytes(content_of(entry("fp16", [2.0]))), "'w' has the shape .2.0.; a list"),
        (file_bytes(content_of(entry("fp16", [True]))), "'w' has the shape .True.; a list"),
        (file_bytes(content_of(entry("fp16", [1] * 9))), "a list of at most 8"),
        (file_bytes(content_of(entry("fp16", [1] * 300_000))), "'w' has the shape"),
        (
            file_bytes(content_of(entry("int8", [8]))),
            r"'w' has the encoding int8 and the shape \[8\]; \[rows, columns\]",
        ),
        (file_bytes(content_of(entry("fp32", [10**6, 10**6]))), "'w' has the shape .* at most 1,073,741,824 elements"),
        (file_bytes(content_of(entry("fp32", [0, 10**30]))), "'w' has the shape .* at most 1,073,741,824 elements"),
        (file_bytes(content_of(entry("fp32", [1 << 30]))), "the header's tensors need 4,294,967,424"),
        (file_bytes(content_of(entry("int8", [1 << 30, 0]))), "the header's tensors need 2,147,483,776"),
        (file_bytes(content_of(entry("fp32", [2]), bytes(7))), "content has 71 bytes; the header's tensors need 72"),
        (file_bytes(content_of(entry("fp32", [2]), bytes(9))), "content has 73 bytes; the header's tensors need 72"),
        (file_bytes(GOOD + b"\0"), f"content has {len(GOOD) + 1} bytes; the header's tensors need {len(GOOD)}"),
        (
            file_bytes(content_of(entry("fp32", [1]), bytes(4)).replace(b"}\0", b"}\1")),
            "bytes before the tensor 'w' are not all zero",
        ),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_bad_containers_are_named(tmp_path, data, message):
    path = tmp_path / "bad.pgolf"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        unpack(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 2000


ONE = {"w": EncodedTensor("int6", GOLDEN_VALUES, np.ones(5, np.float16))}
CONTENT = pack_content({}, ONE)
HEAD = CONTENT[: 4 + int.from_bytes(CONTENT[:4], "little")]
STREAM = encode_stream(ONE["w"])
SIZES = struct.pack("<I", len(STREAM))


def test_bad_parts_of_version_2_start_from_a_good_one():
    good = file_2(HEAD + SIZES, STREAM, content=CONTENT)
    assert good == pack({}, ONE)
    assert_same(unpack(good)[1], ONE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (preamble_bytes(CONTENT, version=2) + bytes(7), "less than 8 bytes follow the preamble"),
        (file_2(HEAD, frame_size=1 << 31), "head claims 2,147,483,648 of .* bytes; at most"),
        (file_2(HEAD, bytes(3 << 20), frame_size=3 << 20), "head claims 3,145,728 of .* at most 2,097,152"),
        (file_2(HEAD, frame=b"no frame"), "a zstd frame was expected"),
        (file_2(HEAD, frame=b""), "a zstd frame was expected"),
        (file_2(b"abc"), "head has 3 bytes; 4 to 2,097,152"),
        (file_2(bytes(3 << 20)), "head has 3,145,728 bytes; 4 to 2,097,152"),
        (file_2(struct.pack("<I", (1 << 20) + 1) + bytes(2 << 19)), "header claims 1,048,577 bytes; at most 1,048,576"),
        (file_2(struct.pack("<I", 50) + b"{}"), "header claims 50 bytes of a content of 6"),
        (file_2(content_of(b"{")), "header is not UTF-8 JSON"),
        (file_2(HEAD + SIZES, STREAM, content=CONTENT + b"\0"), "content has 115 bytes; the header's tensors need 114"),
        (file_2(HEAD + SIZES, STREAM, size=1 << 31), "declared size is 2,147,483,648 bytes"),
        (file_2(HEAD, STREAM, content=CONTENT), "0 bytes follow the header; 4, the size of each tensor's stream"),
        (file_2(HEAD + SIZES * 2, STREAM, content=CONTENT), "8 bytes follow the header; 4, the size of each"),
        (file_2(HEAD + SIZES, STREAM[:-1], content=CONTENT), r"streams have (\d+) bytes; the head's sizes add up to"),
        (file_2(HEAD + SIZES, STREAM + b"\0", content=CONTENT), "the head's sizes add up to"),
        (file_2(HEAD + b"\xff" * 4, STREAM, content=CONTENT), "the head's sizes add up to 4,294,967,295"),
        (file_2(HEAD + SIZES, STREAM, content=CONTENT)[:-1] + b"\0", "bytes after the preamble have the CRC-32"),
        (file_2(HEAD + SIZES, bytes(len(STREAM)), content=CONTENT), "content has the CRC-32 .* was expected"),
        (file_2(HEAD + SIZES, STREAM, content=CONTENT, crc=5), "content has the CRC-32 .*; 00000005 was expected"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_bad_containers_of_version_2_are_named(tmp_path, data, message):
    path = tmp_path / "bad.pgolf"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        unpack(path)
    assert str(caught.value).startswith(str(path))


def test_nothing_is_decoded_before_header_and_size_agree():
    """A header that speaks of 900 MB in a file of 200 bytes: with another declared size it is refused at once."""
    head = content_of(entry("fp32", [225_000_000]))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"content has 1,000 bytes; the header's tensors need 900,000,128"):
            unpack(file_2(head + bytes(4), size=1000))
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_other_frame_headers_are_refused():
    plain = container.compress(GOOD)
    frames = {
        "checksum": zstandard.ZstdCompressor(level=22, write_checksum=True).compress(GOOD),
        "dictionary 7": plain[:4] + bytes([plain[4] | 1, 7]) + plain[5:],
        "unused bit": plain[:4] + bytes([plain[4] | 0x10]) + plain[5:],
        "window of 1 MiB": plain[:4] + b"\x80\x50" + struct.pack("<I", len(GOOD)) + plain[6:],
    }
    for frame in frames.values():
        with pytest.raises(FormatError, match=r"zstd frame's header is 28 b5 2f fd .* without checksum, dictionary"):
            unpack(file_bytes(GOOD, frame=frame))


def test_a_frame_without_content_size_is_refused():
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(GOOD)
    with pytest.raises(FormatError, match=f"{len(GOOD)} were declared"):
        unpack(file_bytes(GOOD, frame=frame))


@pytest.mark.parametrize(
    ("descriptor", "message"),
    [(b"\xa0", "zstd frame is damaged"), (b"\x80\x50", "zstd frame holds more than the declared 4,000,128 bytes")],
    ids=["single segment", "1 MiB window"],
)
def test_bombs_stop_at_the_declared_size(monkeypatch, descriptor, message):
    """A frame that declares 4 MB, begins as it should and goes on for 8 GiB: 65,536 run-length blocks of 128 KiB."""
    if descriptor != b"\xa0":  # a window below the content's size, as contents above 128 MiB have it
        monkeypatch.setattr(container, "_MAX_WINDOW_BYTES", 1 << 20)
    content = content_of(entry("fp32", [1000, 1000]), bytes(4_000_000))
    frame_header = b"\x28\xb5\x2f\xfd" + descriptor + struct.pack("<I", len(content))
    raw_block = struct.pack("<I", 128 << 3)[:3] + content[:128]
    zeros_block = struct.pack("<I", (128 << 10) << 3 | 1 << 1)[:3] + b"\0"
    data = file_bytes(content, frame=frame_header + raw_block + zeros_block * (1 << 16))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message):
            unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "tensors", "message"),
    [
        ({"x": float("nan")}, {}, "JSON"),
        ({"x": [[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]}, {}, "nested more than 16 deep"),
        ({"x": "y" * (1 << 20)}, {}, "header takes 1,048,597 bytes; at most 1,048,576"),
        ({}, {"w": EncodedTensor("int3", np.ones((2, 2), np.int8))}, "tensor 'w' has the encoding 'int3'"),
        ({}, {"w": EncodedTensor("int8", np.ones(4, np.int8), np.ones(4, np.float16))}, r"\[rows, columns\]"),
        ({}, {"w": EncodedTensor("int8", np.ones((2, 2), np.int8))}, "'w' has a payload of 4 bytes; 8 were expected"),
        ({}, {"w": EncodedTensor("fp16", np.ones(2, np.float32))}, "'w' has a payload of 8 bytes; 4 were expected"),
    ],
)
def test_pack_refuses_what_unpack_would(header, tensors, message):
    with pytest.raises(ValueError, match=message):
        pack(header, tensors)


def test_pack_refuses_more_than_a_gibibyte():
    row = np.broadcast_to(np.float32(1), (1 << 14,))
    tensors = {"a": EncodedTensor("fp32", row), "b": EncodedTensor("fp32", row)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container, "MAX_CONTENT_BYTES", 1 << 16)
        with pytest.raises(ValueError, match=r"content takes 131,.* bytes; at most 65,536"):
            pack({}, tensors)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no artifact .*none.pgolf"):
        unpack(tmp_path / "none.pgolf")
