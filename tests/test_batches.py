"""Batches: which tokens each step sees (docs/spec.md §6)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf.common import errors
from pgolf.data.batches import BatchStream
from pgolf.data.shards import ShardSet, write_shard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with every length from 2 to 60 whose tokens are their own positions."""
    path = tmp_path_factory.mktemp("batches")
    for size in range(2, 61):
        write_shard(path / f"{size}.bin", np.arange(size))
    return path


def test_a_step_by_hand(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.arange(7))
    write_shard(tmp_path / "b.bin", np.arange(7, 16))
    stream = BatchStream(ShardSet([tmp_path / "a.bin", tmp_path / "b.bin"]), 8, 2, 2)
    ids, targets = stream.next()
    assert (ids.dtype, targets.dtype) == (np.int32, np.int32)
    assert ids.tolist() == [[0, 1], [2, 3], [5, 6], [7, 8]]
    assert targets.tolist() == [[1, 2], [3, 4], [6, 7], [8, 9]]
    assert stream.position == 10
    ids, targets = stream.next()
    assert ids.tolist() == [[10, 11], [12, 13], [15, 0], [1, 2]]
    assert targets.tolist() == [[11, 12], [13, 14], [0, 1], [2, 3]]
    assert stream.position == 4


@given(st.data())
def test_spans_follow_each_other_without_overlap_and_wrap(folder: Path, data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 60))
    seq_len = data.draw(st.integers(1, size - 1))
    spans, sequences = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    stream = BatchStream(ShardSet([folder / f"{size}.bin"]), spans * sequences * seq_len, spans, seq_len)
    stream.position = start = data.draw(st.integers(0, size - 1))
    n = sequences * seq_len
    seen: list[int] = []
    for _ in range(data.draw(st.integers(1, 4))):
        ids, targets = stream.next()
        assert ids.shape == targets.shape == (spans * sequences, seq_len)
        for span_ids, span_targets in zip(ids.reshape(spans, n), targets.reshape(spans, n), strict=True):
            assert span_ids[1:].tolist() == span_targets[:-1].tolist()
            seen += [*span_ids.tolist(), int(span_targets[-1])]
    # Each span's inputs and last target, one behind the other, are the data read once through, again and again.
    assert seen == [(start + i) % size for i in range(len(seen))]
    assert stream.position == (start + len(seen)) % size


@given(st.data())
def test_a_stream_resumes_from_its_position(folder: Path, data: st.DataObject) -> None:
    shards = ShardSet([folder / "57.bin"])
    stream = BatchStream(shards, 24, 2, 4)
    for _ in range(data.draw(st.integers(0, 9))):
        stream.next()
    resumed = BatchStream(shards, 24, 2, 4)
    resumed.position = json.loads(json.dumps(stream.position))
    for _ in range(3):
        np.testing.assert_array_equal(resumed.next(), stream.next())


def test_the_step_may_be_longer_than_the_data(folder: Path) -> None:
    ids, _ = BatchStream(ShardSet([folder / "5.bin"]), 32, 1, 4).next()
    assert ids.ravel().tolist() == [i % 5 for i in range(32)]


def test_a_sequence_longer_than_the_data_is_refused(folder: Path) -> None:
    shards = ShardSet([folder / "5.bin"])
    BatchStream(shards, 4, 1, 4)
    with pytest.raises(ValueError, match=r"train_seq_len is 5, which needs 6 tokens; .* holds 5\."):
        BatchStream(shards, 5, 1, 5)


def test_a_batch_that_does_not_divide_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"train_batch_tokens is 100; .* = 8 · 16 = 128\."):
        BatchStream(ShardSet([folder / "60.bin"]), 100, 8, 16)


@pytest.mark.parametrize(
    ("sizes", "name"),
    [((0, 1, 4), "train_batch_tokens"), ((8, -1, 4), "grad_accum_steps"), ((8, 1, 0), "train_seq_len")],
)
def test_sizes_below_one_are_refused(folder: Path, sizes: tuple[int, int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is .* at least 1"):
        BatchStream(ShardSet([folder / "60.bin"]), *sizes)


def test_positions_outside_the_data_are_refused(folder: Path) -> None:
    stream = BatchStream(ShardSet([folder / "9.bin"]), 4, 1, 4)
    for bad in (-1, 9):
        with pytest.raises(ValueError, match=f"position is {bad}; the data holds 9 tokens"):
            stream.position = bad
    for wrong in (2.0, True, "3"):
        with pytest.raises(TypeError, match="an integer is expected"):
            stream.position = wrong  # type: ignore[assignment]


def test_a_bad_token_leaves_the_position(folder: Path) -> None:
    stream = BatchStream(ShardSet([folder / "9.bin"], vocab_size=8), 4, 1, 4)
    stream.next()
    with pytest.raises(errors.FormatError, match="token 8 is 8"):
        stream.next()
    assert stream.position == 5
