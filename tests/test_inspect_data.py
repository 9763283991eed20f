"""Inspecting data: counts that no cutting changes, and every contradiction named (docs/spec.md §6)."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgolf.common.errors import FormatError
from pgolf.data import inspection as inspect
from pgolf.data.folder import find_data
from pgolf.data.inspection import SAMPLE_TOKENS, inspect_data
from pgolf.data.preparation import prepare
from pgolf.data.shard_file import shard_header
from pgolf.data.shards import read_shard, write_shard
from pgolf.data.stats import TokenStats
from pgolf.data.tokenizer import ByteTable, Tokenizer
from pgolf.data.train_tokenizer import train_tokenizer

BOS = 1
# Tokens 0 and 1 are boundaries, 5 to 7 have a leading space, 8 and 9 have no entry.
TABLE = ByteTable(
    base_bytes=np.array([0, 0, 1, 2, 3, 1, 2, 4], np.int16),
    has_leading_space=np.array([0, 0, 0, 0, 0, 1, 1, 1], bool),
    is_boundary=np.array([1, 1, 0, 0, 0, 0, 0, 0], bool),
)
PIECES = st.lists(st.lists(st.integers(0, 7), max_size=12), max_size=6)


def stats_of(tokens: list[int], table: ByteTable | None = TABLE) -> TokenStats:
    return TokenStats.of(np.array(tokens, np.uint16), BOS, table)


@given(PIECES)
def test_counts_do_not_depend_on_the_cutting(pieces: list[list[int]]) -> None:
    whole = [token for piece in pieces for token in piece]
    assert sum((stats_of(piece) for piece in pieces), TokenStats()) == stats_of(whole)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=40))
def test_counts_are_what_they_say(tokens: list[int]) -> None:
    stats = stats_of(tokens)
    starts = [index for index, token in enumerate(tokens) if token == BOS]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], len(tokens)], strict=False)]
    assert (stats.tokens, stats.low, stats.high) == (len(tokens), min(tokens), max(tokens))
    assert stats.documents == len(starts)
    assert stats.mean_document == (pytest.approx(statistics.mean(lengths)) if lengths else None)
    assert stats.median_document == (statistics.median(lengths) if lengths else None)
    text_bytes = 0
    for previous, token in zip([2, *tokens], tokens, strict=False):
        space = TABLE.has_leading_space[token] and not TABLE.is_boundary[previous]
        text_bytes += int(TABLE.base_bytes[token]) + bool(space)
    assert stats.text_bytes == text_bytes


def test_bytes_are_unknown_without_a_table_that_has_every_token() -> None:
    assert stats_of([1, 2], None).text_bytes is None
    assert stats_of([1, 8]).text_bytes is None
    assert (stats_of([1, 2]) + stats_of([8]) + stats_of([2])).text_bytes is None
    assert TokenStats().documents == 0 and TokenStats().mean_document is None


TEXTS = [f"Text {n}: the same words over and over, {n} of {n * n}." for n in range(40)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 40 documents, 5 for validation, in shards of 400 tokens."""
    folder = tmp_path_factory.mktemp("inspected")
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare(source, folder / "data", vocab_size=300, normalization="identity", val_docs=5, shard_tokens=400, workers=1)
    return folder / "data"


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_folder_is_counted(prepared: Path) -> None:
    report = inspect_data(prepared, verify=True)
    made = report.manifest
    assert made is not None and report.problems == ()
    assert (report.path, report.tokenizer, report.vocab_size) == (prepared, next(prepared.glob("*.model")), 300)
    for name, split in (("train", made.train), ("val", made.val)):
        totals = report.totals[name]
        assert (totals.tokens, totals.documents, totals.text_bytes) == (
            split.tokens,
            split.documents,
            split.text_bytes,
        )
        assert [shard.file for shard in report.shards[name]] == [entry.file for entry in split.shards]
        assert [shard.sha256 for shard in report.shards[name]] == [entry.sha256 for entry in split.shards]
        assert [shard.counts.tokens for shard in report.shards[name]] == [entry.tokens for entry in split.shards]
        assert totals.mean_document == split.tokens / split.documents
    assert len(report.shards["train"]) > 2
    for shard in report.shards["train"]:
        tokens = read_shard(prepared / shard.file)
        assert shard.bytes == (prepared / shard.file).stat().st_size
        assert (shard.counts.min_id, shard.counts.max_id) == (tokens.min(), tokens.max())
        assert shard.counts.documents == np.count_nonzero(tokens == 1)


def test_samples_are_the_beginnings_of_documents(prepared: Path) -> None:
    report = inspect_data(prepared, samples=3)
    (shard,) = report.shards["val"]
    tokenizer = Tokenizer(next(prepared.glob("*.model")))
    for text, sample in zip(TEXTS[:3], shard.samples, strict=True):
        assert sample == tokenizer.decode(tokenizer.encode(text)[: SAMPLE_TOKENS - 1]) and sample
    assert all(shard.samples == () for shard in inspect_data(prepared, samples=0).shards["train"])


def test_samples_stop_where_the_document_does(prepared: Path, tmp_path: Path) -> None:
    model = next(prepared.glob("*.model"))
    ids = Tokenizer(model).encode("word")
    write_shard(tmp_path / "a.bin", [5, 5, 1, *ids, 1, *ids, *ids])
    (shard,) = inspect_data(tmp_path / "a.bin", model, samples=5).shards["shard"]
    assert shard.samples == ("word", "wordword")
    write_shard(tmp_path / "b.bin", ids)
    (shard,) = inspect_data(tmp_path / "b.bin", Tokenizer(model)).shards["shard"]
    assert shard.samples == ("word",) and shard.counts.documents == 0 and shard.counts.mean_document is None


def test_documents_over_a_shards_end_are_whole_in_the_totals(prepared: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "x_train_000000.bin", [1, 9, 9, 1, 9])
    write_shard(tmp_path / "x_train_000001.bin", [9, 9])
    write_shard(tmp_path / "x_train_000002.bin", [9, 1, 9])
    report = inspect_data(tmp_path, next(prepared.glob("*.model")))
    assert [shard.counts.documents for shard in report.shards["train"]] == [2, 0, 1]
    totals = report.totals["train"]
    assert (totals.documents, totals.mean_document, totals.median_document) == (3, 10 / 3, 3)
    assert list(report.shards) == ["train"]


def test_without_a_tokenizer_documents_are_unknown(tmp_path: Path) -> None:
    write_shard(tmp_path / "x_train_000000.bin", [1, 9, 9, 1, 9])
    report = inspect_data(tmp_path)
    totals = report.totals["train"]
    assert (report.tokenizer, report.vocab_size, totals.text_bytes) == (None, None, None)
    assert (totals.documents, totals.mean_document, totals.median_document) == (None, None, None)
    write_shard(tmp_path / "x_train_bytes_000000.bin", [0, 2, 2, 0, 2])
    assert [shard.file for shard in inspect_data(tmp_path).shards["train"]] == ["x_train_000000.bin"]
    with pytest.raises(ValueError, match=r"x_train_bytes_000000\.bin: this is a byte sidecar"):
        inspect_data(tmp_path / "x_train_bytes_000000.bin")


def test_one_shard_is_inspected_with_its_folders_tokenizer(prepared: Path) -> None:
    path = find_data(prepared).val[0]
    report = inspect_data(path, verify=True)
    assert list(report.shards) == ["shard"] and report.totals["shard"] == report.shards["shard"][0].counts
    assert report.tokenizer is not None and report.shards["shard"][0].samples and report.problems == ()


def test_a_report_is_json(prepared: Path) -> None:
    report = inspect_data(prepared, verify=True)
    values = json.loads(json.dumps(report.to_dict()))
    assert values["path"] == str(prepared) and values["tokenizer"] == str(report.tokenizer)
    assert values["totals"]["val"] == dataclasses.asdict(report.totals["val"])
    assert values["shards"]["val"][0]["file"] == "pgolf_val_000000.bin"
    assert inspect_data(next(prepared.glob("*_val_*")), samples=0).to_dict()["problems"] == ()


def test_a_changed_byte_is_found_by_the_checksums_only(data: Path) -> None:
    path = data / "pgolf_train_000001.bin"
    content = bytearray(path.read_bytes())
    content[1030] ^= 1
    path.write_bytes(content)
    assert inspect_data(data).problems == ()
    report = inspect_data(data, verify=True)
    (problem,) = report.problems
    assert "pgolf_train_000001.bin: the shard's SHA-256 is" in problem
    assert [shard.problem for shard in report.shards["train"]].count(problem) == 1


def test_contradictions_are_problems_and_the_rest_is_still_counted(data: Path) -> None:
    write_shard(data / "pgolf_train_000000.bin", [1, 2, 3])
    (data / "pgolf_train_000001.bin").write_bytes(shard_header(7) + b"\0")
    write_shard(data / "pgolf_val_000000.bin", [1, 300])
    write_shard(data / "pgolf_val_000001.bin", [1, 2])
    report = inspect_data(data, verify=True)
    words = [
        "pgolf_train_000000.bin: the shard has 3 tokens; manifest.json says 400.",
        "pgolf_train_000001.bin: the file has 1,025 bytes; its header says 7 tokens, which makes 1,038 bytes.",
        "has 300 tokens, up to 299.",
        "pgolf_val_000001.bin: manifest.json does not list this shard.",
    ]
    assert len(report.problems) == len(words)
    for problem, expected in zip(report.problems, words, strict=True):
        assert problem.endswith(expected)
    broken = report.shards["train"][1].counts
    assert (broken.tokens, broken.min_id, broken.text_bytes, broken.median_document) == (0, None, None, None)
    assert report.shards["train"][2].counts.tokens == read_shard(data / "pgolf_train_000002.bin").size
    assert report.totals["val"].text_bytes is None


def test_another_tokenizer_is_found_by_its_checksum(data: Path) -> None:
    model = next(data.glob("*.model"))
    train_tokenizer([text.upper() for text in TEXTS], model, 300, "identity")
    (problem,) = inspect_data(data, verify=True).problems
    assert f"{model}: the tokenizer's SHA-256 is" in problem


def test_a_shard_that_changes_meanwhile_is_a_problem(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data / "pgolf_train_000000.bin"
    count_shard = inspect.count_shard

    def cut_first(shard: inspect.ShardFile, *args: object) -> TokenStats:
        if shard.path == path:
            os.truncate(path, 1100)
        return count_shard(shard, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(inspect, "count_shard", cut_first)
    (problem,) = inspect_data(data).problems
    assert "pgolf_train_000000.bin: the shard changed while it was in use" in problem


def test_what_cannot_be_inspected_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent: no such data folder or shard"):
        inspect_data(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: the folder holds no \*_train_\*\.bin and no"):
        inspect_data(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        inspect_data(data, tmp_path / "absent.model")
    with pytest.raises(ValueError, match="samples is -1"):
        inspect_data(data, samples=-1)
    (data / "manifest.json").write_text("{")
    with pytest.raises(FormatError, match=r"manifest\.json: this is not JSON"):
        inspect_data(data)
    (data / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"there is no manifest\.json of pgolf's"):
        inspect_data(data, verify=True)


def test_large_shards_take_no_more_memory(prepared: Path, tmp_path: Path) -> None:
    """100 M tokens, 200 MB, of which one block at a time is in memory."""
    tokens = 100_000_000
    path = tmp_path / "large_train_000000.bin"
    with path.open("wb") as file:
        file.write(shard_header(tokens))
        for start in (5, 60_000_000):
            file.seek(1024 + 2 * start)
            file.write(b"\1\0")
        file.truncate(1024 + 2 * tokens)
    model = Tokenizer(next(prepared.glob("*.model")))
    tracemalloc.start()
    try:
        report = inspect_data(path, model)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    counts = report.totals["shard"]
    assert (counts.tokens, counts.documents, counts.mean_document) == (tokens, 2, (tokens - 5) / 2)
    assert (counts.min_id, counts.max_id, counts.text_bytes) == (0, 1, 0)
    assert peak < 30_000_000
