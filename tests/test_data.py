"""Shards and data folders: round trips, and every broken file refused by name (docs/spec.md §6)."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf.common import errors
from pgolf.data.batches import BatchStream
from pgolf.data.folder import find_data, load_tokens
from pgolf.data.shard_file import shard_header
from pgolf.data.shards import ShardSet, read_shard, write_shard

TOKENS = st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@given(TOKENS, st.sampled_from([np.uint16, np.int32, np.uint32, np.int64, np.uint64]))
def test_shards_round_trip(scratch: Path, tokens: list[int], dtype: type) -> None:
    path = scratch / "round.bin"
    write_shard(path, np.array(tokens, dtype=dtype))
    read = read_shard(path)
    assert read.dtype == np.uint16 and read.tolist() == tokens
    with pytest.raises(ValueError, match="read-only"):
        read[0] = 1


def test_a_shards_bytes_are_the_format(scratch: Path) -> None:
    write_shard(scratch / "bytes.bin", np.array([1, 258, 65535])[::-1])
    content = (scratch / "bytes.bin").read_bytes()
    header = np.frombuffer(content[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 3] and not header[3:].any()
    assert content[1024:] == b"\xff\xff\x02\x01\x01\x00"


@pytest.mark.parametrize(
    ("tokens", "error", "words"),
    [
        (np.array([0.5]), TypeError, "dtype float64"),
        (np.array([True]), TypeError, "dtype bool"),
        (np.array([[1, 2]]), ValueError, r"shape \(1, 2\)"),
        (np.array(3), ValueError, r"shape \(\)"),
        (np.array([], dtype=np.int64), ValueError, "0 tokens"),
        (np.array([4, -1]), ValueError, "from -1 to 4"),
        (np.array([65536]), ValueError, "from 65536 to 65536"),
    ],
)
def test_tokens_that_no_shard_can_hold(tmp_path: Path, tokens: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=rf"new\.bin: .*{words}"):
        write_shard(tmp_path / "new.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, [1, 2, 3])

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_shard(path, [4, 5])
    assert read_shard(path).tolist() == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


GOOD = shard_header(2) + b"\1\0\2\0"


def with_field(index: int, value: int) -> bytes:
    header = np.frombuffer(GOOD[:1024], "<i4").copy()
    header[index] = value
    return header.tobytes() + GOOD[1024:]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has 0 bytes; a shard starts with a header of 1,024"),
        (GOOD[:1023], "has 1,023 bytes"),
        (GOOD[:-1], "has 1,027 bytes; its header says 2 tokens, which makes 1,028"),
        (GOOD[:-2], "has 1,026 bytes"),
        (GOOD + b"\0", "has 1,029 bytes"),
        (with_field(0, 20240801), "is 20240801; a token shard has 20240520"),
        (with_field(1, 2), "version is 2; pgolf reads version 1"),
        (with_field(2, 0), "says 0 tokens"),
        (with_field(2, -5), "says -5 tokens"),
        (with_field(2, 2**31 - 1), "2,147,483,647 tokens, which makes 4,294,968,318 bytes"),
        (with_field(9, 7), "field 9 is 7"),
    ],
)
def test_broken_shards_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.bin"
    path.write_bytes(content)
    with pytest.raises(errors.FormatError, match=rf"broken\.bin: .*{words}"):
        read_shard(path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.bin: no such shard"):
        read_shard(tmp_path / "gone.bin")


@given(st.lists(TOKENS, min_size=1, max_size=4), st.integers(0, 500), st.integers(0, 300))
def test_a_shard_set_is_one_endless_stream(scratch: Path, parts: list[list[int]], start: int, count: int) -> None:
    paths = [scratch / f"set_{i}.bin" for i in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        write_shard(path, part)
    whole = [token for part in parts for token in part]
    stream = ShardSet(reversed(paths))
    assert len(stream) == len(whole)
    read = stream.read(start, count)
    assert read.dtype == np.uint16 and read.flags.writeable
    assert read.tolist() == [whole[(start + i) % len(whole)] for i in range(count)]


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "z").mkdir()
    write_shard(tmp_path / "z" / "x_train_000000.bin", [1])
    write_shard(tmp_path / "x_train_000001.bin", [2])
    assert ShardSet(tmp_path.rglob("*.bin")).read(0, 2).tolist() == [1, 2]


def test_tokens_outside_the_vocabulary_are_found_when_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [5, 6])
    write_shard(tmp_path / "b.bin", [1, 2, 1024, 2000])
    stream = ShardSet([tmp_path / "a.bin", tmp_path / "b.bin"], vocab_size=1024)
    assert stream.read(0, 4).tolist() == [5, 6, 1, 2]
    for start in (0, 3):
        with pytest.raises(errors.FormatError, match=r"b\.bin: token 2 is 1024; a vocabulary of 1,024 ends at 1023"):
            stream.read(start, 5)


def test_shard_sets_refuse_nonsense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one shard"):
        ShardSet([])
    write_shard(tmp_path / "a.bin", [5])
    for start, count in ((-1, 1), (0, -1)):
        with pytest.raises(ValueError, match="at least 0"):
            ShardSet([tmp_path / "a.bin"]).read(start, count)


def sparse_shard(path: Path, tokens: int) -> Path:
    """A shard of zeros that takes no room on the disk."""
    with path.open("wb") as file:
        file.write(shard_header(tokens))
        file.truncate(1024 + 2 * tokens)
    return path


def test_reading_a_span_does_not_load_the_shard(tmp_path: Path) -> None:
    path = sparse_shard(tmp_path / "large.bin", 100_000_000)
    with path.open("r+b") as file:
        file.seek(1024 + 2 * 70_000_000)
        file.write(b"\7\0\1\2")
    tracemalloc.start()
    try:
        shards = ShardSet([path, path], vocab_size=1024)
        span = shards.read(169_999_999, 100_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert span[:4].tolist() == [0, 7, 513, 0] and not span[4:].any()
    assert peak < 1_000_000


def remove(path: Path) -> None:
    path.unlink()


def remove_folder(path: Path) -> None:
    shutil.rmtree(path.parent)


def cut(path: Path) -> None:
    os.truncate(path, 1024 + 2 * 50)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0\0")


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(b"\5\0")


def replace(path: Path) -> None:
    write_shard(path, np.arange(100)[::-1])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES = [
    (remove, "the shard was removed while it was in use"),
    (remove_folder, "the shard was removed while it was in use"),
    (cut, "changed while it was in use: it had 1,224 bytes and has 1,124 now"),
    (empty, "it had 1,224 bytes and has 0 now"),
    (append, "it had 1,224 bytes and has 1,226 now"),
    (overwrite, "it was written to, or another file took its place"),
    (replace, "it was written to, or another file took its place"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_shards_that_change_in_the_middle_of_a_stream(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    (tmp_path / "data").mkdir()
    paths = [tmp_path / "data" / "a.bin", tmp_path / "data" / "b.bin"]
    for path in paths:
        write_shard(path, np.arange(100))
        os.utime(path, ns=(0, 10**18))  # long ago, so that any later change shows, however coarse the clock
    shards = ShardSet(paths)
    fingerprint = shards.fingerprint()
    stream = BatchStream(shards, 60, 1, 30)
    assert stream.next()[0].ravel().tolist() == list(range(60))
    change(paths[1])
    name = "a" if change is remove_folder else "b"
    with pytest.raises(errors.FormatError, match=rf"{name}\.bin: .*{words}"):
        stream.next()
    assert stream.position == 61
    assert shards.fingerprint() == fingerprint  # so that a checkpoint can still be written


def test_a_shard_that_becomes_something_else_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [1, 2])
    shards = ShardSet([tmp_path / "a.bin"])
    replace_by_folder(tmp_path / "a.bin")
    with pytest.raises(OSError, match=r"a\.bin"):
        shards.read(0, 1)


def test_fingerprints_tell_data_apart(tmp_path: Path) -> None:
    def fingerprint(folder: str, **shards: object) -> object:
        (tmp_path / folder).mkdir()
        for name, tokens in shards.items():
            write_shard(tmp_path / folder / f"{name}.bin", tokens)
        made = ShardSet((tmp_path / folder).iterdir()).fingerprint()
        assert json.loads(json.dumps(made)) == made
        return made

    tokens = np.arange(20_000)
    first = fingerprint("first", a=tokens, b=[1, 2])
    assert first["shards"] == 2 and first["tokens"] == 20_002  # type: ignore[index]
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, ns=(0, 0))
    assert ShardSet((tmp_path / "copy").iterdir()).fingerprint() == first
    others = [
        fingerprint("renamed", a=tokens, c=[1, 2]),
        fingerprint("swapped", b=tokens, a=[1, 2]),
        fingerprint("beginning", a=np.where(tokens == 0, 1, tokens), b=[1, 2]),
        fingerprint("end", a=np.where(tokens == 19_999, 1, tokens), b=[1, 2]),
        fingerprint("last", a=tokens, b=[1, 3]),
        fingerprint("shorter", a=tokens[:-1], b=[1, 2]),
        fingerprint("more", a=tokens, b=[1, 2], c=[1]),
    ]
    assert len({json.dumps(made) for made in [first, *others]}) == 1 + len(others)


def fill(folder: Path) -> Path:
    """A data folder with two training shards and a validation shard."""
    write_shard(folder / "text_train_000001.bin", [3, 4])
    write_shard(folder / "text_train_000000.bin", [1, 2])
    write_shard(folder / "text_val_000000.bin", [9, 8, 7])
    return folder


def write_manifest(folder: Path, **changes: object) -> None:
    split = {"documents": 1, "tokens": 3, "source_bytes": 1, "text_bytes": 1, "changed_documents": 0, "shards": []}
    shard = {"file": "text_val_000000.bin", "tokens": 3, "sha256": "0"}
    manifest = {
        "format": "pgolf-data-1",
        "pgolf": "0",
        "sources": ["text.txt"],
        "tokenizer": {"file": "b.model", "sha256": "0", "vocab_size": 10, "normalization": "identity"},
        "train": split,
        "val": {**split, "shards": [shard]},
    }
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_find_data_lists_shards_in_order(tmp_path: Path) -> None:
    found = find_data(str(fill(tmp_path)))
    assert [path.name for path in found.train] == ["text_train_000000.bin", "text_train_000001.bin"]
    assert [path.name for path in found.val] == ["text_val_000000.bin"]
    assert (found.path, found.tokenizer, found.manifest) == (tmp_path, None, None)


def test_find_data_takes_the_only_model_else_the_manifests(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "a.model").touch()
    assert find_data(tmp_path).tokenizer == tmp_path / "a.model"
    (tmp_path / "b.model").touch()
    assert find_data(tmp_path).tokenizer is None
    write_manifest(tmp_path)
    found = find_data(tmp_path, splits=("val",))
    assert found.tokenizer == tmp_path / "b.model"
    assert found.manifest is not None and found.manifest.val.tokens == 3


def test_find_data_refuses_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such data folder"):
        find_data(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"holds no \*_train_\*\.bin shard"):
        find_data(tmp_path)
    fill(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"text_val_000000\.bin: this is a file"):
        find_data(tmp_path / "text_val_000000.bin")
    (tmp_path / "text_val_000000.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no \*_val_\*\.bin shard"):
        find_data(tmp_path)
    assert find_data(tmp_path, splits=("train",)).val == ()


def test_find_data_misses_a_shard_of_the_manifest(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "text_val_000000.bin").rename(tmp_path / "text_val_000001.bin")
    write_manifest(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lists the shard text_val_000000\.bin, which is missing"):
        find_data(tmp_path)


def test_broken_manifests_are_refused_and_foreign_ones_ignored(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b'{"format": "pgolf')
    with pytest.raises(errors.FormatError, match=r"manifest\.json: this is not JSON"):
        find_data(tmp_path)
    for changes in ({"train": {}}, {"tokenizer": None}, {"val": []}):
        write_manifest(tmp_path, **changes)
        with pytest.raises(errors.FormatError, match=r"manifest\.json: the manifest's fields"):
            find_data(tmp_path)
    (tmp_path / "manifest.json").write_text('["someone", "else"]')
    assert find_data(tmp_path).manifest is None


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b'{"format": ' + b"[" * 100_000, b'{"a":' * 100_000, b'{"tokens": ' + b"9" * 5000 + b"}"],
    ids=["empty", "no text", "deep lists", "deep objects", "an integer of 5,000 digits"],
)
def test_a_manifest_that_json_cannot_hold_is_refused(tmp_path: Path, content: bytes) -> None:
    (fill(tmp_path) / "manifest.json").write_bytes(content)
    with pytest.raises(errors.FormatError, match=r"manifest\.json: this is not JSON"):
        find_data(tmp_path)


TOKENIZER = {"file": "b.model", "sha256": "0", "vocab_size": 10, "normalization": "identity"}
SPLIT = {"documents": 1, "tokens": 3, "source_bytes": 1, "text_bytes": 1, "changed_documents": 0, "shards": []}
HUB = {"repo": "a/b", "revision": "c", "variant": "d", "train_shards": 2, "val_shards": 1}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pgolf": 1}, "pgolf is 1"),
        ({"sources": "text.txt"}, "sources is 'text.txt'"),
        ({"sources": ["text.txt", 7]}, "sources is "),
        ({"tokenizer": {**TOKENIZER, "sha256": None}}, "sha256 is None"),
        ({"tokenizer": {**TOKENIZER, "vocab_size": "10"}}, "vocab_size is '10'"),
        ({"tokenizer": {**TOKENIZER, "vocab_size": True}}, "vocab_size is True"),
        ({"tokenizer": {**TOKENIZER, "vocab_size": 10.0}}, "vocab_size is 10.0"),
        ({"tokenizer": {**TOKENIZER, "vocab_size": -1}}, "vocab_size is -1"),
        ({"tokenizer": {**TOKENIZER, "colour": "red"}}, "colour"),
        ({"tokenizer": {"file": "b.model"}}, "sha256"),
        ({"train": {**SPLIT, "tokens": None}}, "tokens is None"),
        ({"train": {**SPLIT, "source_bytes": -1}}, "source_bytes is -1"),
        ({"train": {**SPLIT, "shards": None}}, "NoneType"),
        ({"val": {**SPLIT, "shards": [[]]}}, "list"),
        ({"val": {**SPLIT, "shards": [{"file": 7, "tokens": 3, "sha256": "0"}]}}, "file is 7"),
        ({"val": {**SPLIT, "shards": [{"file": "a.bin", "tokens": [3], "sha256": "0"}]}}, r"tokens is \[3\]"),
        ({"hub": []}, ""),
        ({"hub": {**HUB, "revision": 7}}, "revision is 7"),
        ({"hub": {**HUB, "val_shards": False}}, "val_shards is False"),
    ],
)
def test_a_manifests_fields_have_their_types(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    write_manifest(fill(tmp_path), **changes)
    with pytest.raises(errors.FormatError, match=rf"manifest\.json: the manifest's fields are not those.*\(.*{named}"):
        find_data(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "../b.model", "/b.model", "a/b", "a\\b", "a\0b", "\ud800", "x" * 256])
@pytest.mark.parametrize("where", ["tokenizer", "shard"])
def test_a_manifest_names_files_of_its_own_folder(tmp_path: Path, name: str, where: str) -> None:
    shard = {"file": name, "tokens": 3, "sha256": "0"}
    changes = (
        {"tokenizer": {**TOKENIZER, "file": name}} if where == "tokenizer" else {"val": {**SPLIT, "shards": [shard]}}
    )
    write_manifest(fill(tmp_path), **changes)
    with pytest.raises(errors.FormatError, match=r"manifest\.json: the manifest's fields are not those.*file is "):
        find_data(tmp_path)


def test_what_a_damaged_manifest_holds_is_quoted_in_short(tmp_path: Path) -> None:
    write_manifest(fill(tmp_path), pgolf=["x"] * 10_000)
    with pytest.raises(errors.FormatError) as caught:
        find_data(tmp_path)
    assert len(str(caught.value)) < 700 + len(str(tmp_path))


def test_load_tokens_from_folder_file_and_array(tmp_path: Path) -> None:
    fill(tmp_path)
    assert load_tokens(tmp_path).tolist() == [9, 8, 7]
    assert load_tokens(str(tmp_path), split="train").tolist() == [1, 2, 3, 4]
    tokens = load_tokens(tmp_path / "text_train_000001.bin")
    assert tokens.dtype == np.uint16 and tokens.tolist() == [3, 4]
    given_array = np.arange(10, dtype=np.int64)[::3]
    tokens = load_tokens(given_array)
    assert tokens.dtype == np.int32 and tokens.flags.c_contiguous and tokens.tolist() == [0, 3, 6, 9]


def test_load_tokens_refuses_what_it_cannot_score(tmp_path: Path) -> None:
    fill(tmp_path)
    with pytest.raises(errors.FormatError, match=r"text_val_000000\.bin: token 0 is 9"):
        load_tokens(tmp_path, vocab_size=9)
    with pytest.raises(FileNotFoundError, match="no such data folder"):
        load_tokens(tmp_path / "absent")
    with pytest.raises(TypeError, match="float64"):
        load_tokens([0.5])
    for bad in (np.zeros((2, 2), int), np.zeros(0, int), []):
        with pytest.raises(ValueError, match="one dimension with at least one token"):
            load_tokens(bad)
    for low, high in ((-1, 3), (0, 9)):
        with pytest.raises(ValueError, match=f"from {low} to {high}; 0 to 8"):
            load_tokens([low, high], vocab_size=9)
