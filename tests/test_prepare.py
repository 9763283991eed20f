"""Data preparation: documents, corpus, tokenizer, shards and manifest, and every broken source refused by name."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from pgolf.common import errors
from pgolf.data import documents as documents_module
from pgolf.data import encode as encode_module
from pgolf.data import preparation as prepare_module
from pgolf.data.corpus import MIN_VAL_BYTES, MIN_VAL_FRACTION, builtin_corpus
from pgolf.data.documents import FileReader
from pgolf.data.folder import find_data
from pgolf.data.preparation import prepare
from pgolf.data.progress import Progress
from pgolf.data.shards import ShardSet, read_shard, write_shard
from pgolf.data.train_tokenizer import train_tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "the", "a", "café"]
WORDS += ["of,", "and.", "1984", "said", "she", "he", "it", "was"]
TEXTS = [
    " ".join(WORDS[(i * k + k * k // 3) % len(WORDS)] for k in range(40 + i)) + ("\n\nThe  end…" if i % 3 == 0 else ".")
    for i in range(60)
]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "given.model"
    train_tokenizer(TEXTS, path, 320, "nmt_nfkc")
    return path


def encoded(model: Path, texts: list[str]) -> list[int]:
    """What the shards must hold, by SentencePiece alone."""
    processor = SentencePieceProcessor(model_file=str(model))
    return [token for text in texts for token in (1, *processor.encode(text))]


def tokens(folder: Path, split: str) -> list[int]:
    shards = ShardSet(getattr(find_data(folder), split))
    return shards.read(0, len(shards)).tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# What comes out


def test_jsonl_with_a_given_tokenizer(jsonl: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    report = prepare(jsonl, out, tokenizer=model, val_docs=7, shard_tokens=1000)
    assert tokens(out, "val") == encoded(model, TEXTS[:7])
    assert tokens(out, "train") == encoded(model, TEXTS[7:])
    found = find_data(out)
    assert found.manifest == report.manifest and report.path == out
    assert found.tokenizer == out / "given.model" and found.tokenizer.read_bytes() == model.read_bytes()
    assert len(found.train) > 2 and all(read_shard(path).size == 1000 for path in found.train[:-1])
    made = report.manifest
    assert made.sources == ("texts.jsonl",)
    assert (made.val.documents, made.train.documents) == (7, 53)
    assert made.train.tokens == len(tokens(out, "train"))
    assert made.val.source_bytes == sum(len(text.encode()) for text in TEXTS[:7])
    assert (made.tokenizer.vocab_size, made.tokenizer.normalization) == (320, "nmt_nfkc")
    entries = [*made.train.shards, *made.val.shards, made.tokenizer]
    assert {entry.file for entry in entries} | {"manifest.json"} == set(contents(out))
    for entry in entries:
        assert entry.sha256 == hashlib.sha256((out / entry.file).read_bytes()).hexdigest()


def test_normalisation_is_counted_and_named(jsonl: Path, model: Path, tmp_path: Path) -> None:
    report = prepare(jsonl, tmp_path / "out", tokenizer=model, val_docs=4)
    processor = SentencePieceProcessor(model_file=str(model))
    spelled = [processor.decode(processor.encode(text)) for text in TEXTS]
    changed = [text != back for text, back in zip(TEXTS, spelled, strict=True)]
    made = report.manifest
    assert (made.val.changed_documents, made.train.changed_documents) == (sum(changed[:4]), sum(changed[4:]))
    assert made.train.text_bytes == sum(len(text.encode()) for text in spelled[4:]) < made.train.source_bytes
    assert report.warning is not None
    assert "20 of 60 documents" in report.warning and "--normalization identity" in report.warning


def test_identity_keeps_every_byte(tmp_path: Path) -> None:
    source = tmp_path / "code.txt"
    source.write_bytes("".join(f"  def  f{i}(x):\r\n\n\treturn '½…ﬁ' *  x \n" for i in range(2000)).encode())
    report = prepare(source, tmp_path / "out", vocab_size=300, normalization="identity", val_docs=2)
    assert report.warning is None
    made = report.manifest
    assert made.train.changed_documents == made.val.changed_documents == 0
    assert made.train.text_bytes + made.val.text_bytes == source.stat().st_size
    ids = tokens(tmp_path / "out", "val") + tokens(tmp_path / "out", "train")
    processor = SentencePieceProcessor(model_file=str(tmp_path / "out" / "pgolf_300_bpe.model"))
    parts = [list(part) for bos, part in itertools.groupby(ids, lambda token: token == 1) if not bos]
    assert "".join(processor.decode(part) for part in parts).encode() == source.read_bytes()


def test_a_trained_tokenizer_has_the_specified_settings(jsonl: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        prepare(jsonl, tmp_path / name, vocab_size=330)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    processor = SentencePieceProcessor(model_file=str(tmp_path / "a" / "pgolf_330_bpe.model"))
    assert processor.vocab_size() == 330
    ids = (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id())
    assert ids == (0, 1, 2, 3)
    assert processor.is_byte(4) and processor.is_byte(259)
    assert processor.encode("1984", out_type=str) == ["1", "9", "8", "4"]
    assert processor.encode("the", out_type=str)[0][0] == "t"  # no dummy prefix
    assert processor.decode(processor.encode("ﬁne  日本")) == "fine 日本"
    assert find_data(tmp_path / "a").manifest.val.documents == 3  # 5 % of 60


def test_any_number_of_workers_writes_the_same_bytes(
    jsonl: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(jsonl, tmp_path / "whole", tokenizer=model, val_docs=5, workers=1)
    monkeypatch.setattr(encode_module, "CHUNK_BYTES", 1500)
    for workers in (1, 2, 3):
        prepare(jsonl, tmp_path / str(workers), tokenizer=model, val_docs=5, workers=workers)
        assert contents(tmp_path / str(workers)) == contents(tmp_path / "whole")


def test_the_tokenizer_sample_is_spread_over_the_training_documents(
    jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampled(val_docs: int | None) -> list[int]:
        _, sample = prepare_module._survey(FileReader([jsonl]), val_docs, lambda progress: None)
        return [TEXTS.index(document.text()) for document in sample]

    assert sampled(10) == list(range(10, 60))
    monkeypatch.setattr(prepare_module, "TOKENIZER_SAMPLE_BYTES", jsonl.stat().st_size // 6)
    assert sampled(10) == [15, 23, 31, 39, 47, 55]
    assert sampled(None) == [7, 15, 23, 31, 39, 47, 55]
    monkeypatch.setattr(prepare_module, "TOKENIZER_SAMPLE_BYTES", 1)
    assert sampled(10) == [31]


def test_progress_is_reported(jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Progress] = []
    prepare(jsonl, tmp_path / "a", vocab_size=330, progress=seen.append)
    assert [stage for stage, _ in itertools.groupby(p.stage for p in seen)] == [
        "reading",
        "training the tokenizer",
        "encoding",
    ]
    encoding = [p for p in seen if p.stage == "encoding"]
    assert [p.done for p in encoding] == sorted(p.done for p in encoding)
    assert encoding[-1].done == encoding[-1].total == jsonl.stat().st_size
    assert encoding[-1].text_bytes == sum(len(text.encode()) for text in TEXTS)
    prepare(jsonl, tmp_path / "b", vocab_size=330, progress=True)
    captured = capsys.readouterr()
    assert "encoding" in captured.err and "MB/s" in captured.err and captured.out == ""


# Sources


def pack(data: bytes, how: str) -> bytes:
    if how == ".gz":
        return gzip.compress(data[:1000]) + gzip.compress(data[1000:])
    if how == ".zst":
        long = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=27))
        frame = long.compressobj()  # without the content's size, so that the frame asks for its whole window
        return zstandard.compress(data[:1000]) + frame.compress(data[1000:]) + frame.flush()
    return data


@pytest.mark.parametrize("how", ["", ".gz", ".zst"])
def test_compressed_sources_read_the_same(jsonl: Path, tmp_path: Path, how: str) -> None:
    path = tmp_path / f"packed.v2.jsonl{how}"
    path.write_bytes(pack(jsonl.read_bytes(), how))
    reader = FileReader([path])
    assert [document.text() for document in reader.documents()] == TEXTS
    assert reader.read_bytes == reader.total_bytes == path.stat().st_size
    text = tmp_path / f"plain.txt{how}"
    text.write_bytes(pack(b"x" * 1500, how))
    assert [document.text() for document in FileReader([text]).documents()] == ["x" * 1500]


@pytest.mark.parametrize("how", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "junk", "flipped"])
def test_damaged_compressed_sources_are_refused(jsonl: Path, tmp_path: Path, how: str, damage: str) -> None:
    packed = pack(jsonl.read_bytes(), how)
    middle = len(packed) // 2
    broken = {
        "truncated": packed[:middle],
        "junk": b"this is not a compressed file at all",
        "flipped": packed[:2] + bytes([packed[2] ^ 0xFF]) + packed[3:],
    }[damage]
    path = tmp_path / f"broken.jsonl{how}"
    path.write_bytes(broken)
    with pytest.raises(errors.FormatError, match=r"broken\.jsonl.*: the compressed file is damaged or ends early"):
        list(FileReader([path]).documents())


def test_sources_are_read_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("first")
    (tmp_path / "a.jsonl").write_text('\n{"text": "second"}\n\n  \n{"text": ""}')
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfthird")
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "fourth"}\r\n')
    reader = FileReader([tmp_path / name for name in ("b.txt", "a.jsonl", "empty.txt", "bom.txt", "bom.jsonl")])
    found = [(document.text(), document.line) for document in reader.documents()]
    assert found == [("first", 1), ("second", 2), ("", 5), ("third", 1), ("fourth", 1)]


@given(st.lists(st.sampled_from(["word ", "é", "日本", "\n", "\n\n", "𝔘"]), max_size=120).map("".join))
def test_long_texts_are_cut_without_loss(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "TEXT_DOCUMENT_BYTES", 32)
        found = list(FileReader([path]).documents())
    assert "".join(document.text() for document in found) == text
    for before, after in itertools.pairwise(found):
        assert 16 < len(before.raw) <= 32
        assert after.line == before.line + before.text().count("\n")
        second_half = before.raw[16:]
        if b"\n" not in second_half:
            assert len(before.raw) >= 29
        else:
            assert before.raw.endswith(b"\n\n" if b"\n\n" in second_half else b"\n")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"fine\nfine\nnot \xff fine", r"a\.txt, line 3: the byte 0xff is not UTF-8"),
        ("a.txt", "naïve".encode("utf-16"), r"a\.txt, line 1: the byte 0xff is not UTF-8"),
        ("a.txt", b"cut off \xc3", r"a\.txt, line 1: the byte 0xc3 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', r"a\.jsonl, line 2: the byte 0xe9 is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl, line 3: this is not JSON .*one JSON object a line"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: this is not JSON"),
        ("a.jsonl", b'["text"]', r"a\.jsonl, line 1: this is a JSON list; an object with the field 'text'"),
        ("a.jsonl", b'{"txt": "x", "id": 1}', r"line 1: the field 'text' is missing; .* are: 'txt', 'id'\."),
        ("a.jsonl", b'{"text": null}', r"line 1: the field 'text' is of type NoneType; a string is expected"),
        ("a.jsonl", rb'{"text": "\ud800"}', r"line 1: the field 'text' has a lone surrogate"),
    ],
)
def test_broken_documents_are_named_by_file_and_line(
    tmp_path: Path, model: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / "good.txt").write_text("good text")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.FormatError, match=words):
        prepare([tmp_path / "good.txt", tmp_path / name], tmp_path / "out", tokenizer=model, val_docs=1, workers=1)
    assert not (tmp_path / "out").exists()


def test_broken_documents_are_named_from_other_processes(
    jsonl: Path, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl.write_bytes(jsonl.read_bytes() + b'{"text": 3}\n')
    monkeypatch.setattr(encode_module, "CHUNK_BYTES", 3000)
    with pytest.raises(errors.FormatError, match=r"texts\.jsonl, line 61: the field 'text' is of type int"):
        prepare(jsonl, tmp_path / "out", tokenizer=model, val_docs=1, workers=2)
    assert not (tmp_path / "out").exists()


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.txt: no such source file"):
        prepare([tmp_path / "absent.txt"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"the folder holds no text; .* \.txt, .*\.json, alone or with \.gz or"):
        prepare(tmp_path, tmp_path / "out")


# Arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"builtin": True}, "either source files or the built-in corpus"),
        ({"sources": []}, "either source files or the built-in corpus"),
        ({"sources": [], "builtin": True, "val_docs": 3}, "val_docs is 3; the built-in corpus has a validation split"),
        ({"val_docs": 0}, "val_docs is 0; it must be at least 1"),
        ({"workers": 0}, "workers is 0; it must be at least 1"),
        ({"shard_tokens": 0}, "shard_tokens is 0; it must be at least 1"),
        ({"val_docs": 60}, r"60 for validation at least 61 are needed\. Give more text, .*: val_docs=59\."),
        ({"val_docs": 60, "tokenizer": "given"}, "hold 60 documents; with the first 60 for validation"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be from 261 to 65,536"),
        ({"vocab_size": 100}, "vocab_size is 100; it must be from 261 to 65,536"),
        ({"vocab_size": 65_537}, "vocab_size is 65537; it must be from 261 to 65,536"),
        ({"vocab_size": 262}, r"vocab_size is 262; the text's characters need at least (\d+). Give vocab_size=\1."),
        ({"vocab_size": 30_000}, r"30,000; the text is enough for at most (\d+)\. Give vocab_size=\1, or more text"),
        ({"normalization": "nfd"}, "normalization is 'nfd'; it must be one of nmt_nfkc, identity"),
        ({"tokenizer": "given", "vocab_size": 500}, r"vocab_size is 500; the tokenizer .*given\.model has 320 tokens"),
        ({"tokenizer": "given", "normalization": "identity"}, r"'identity'; the tokenizer .* has 'nmt_nfkc'"),
        ({"tokenizer": "without_bos"}, r"without_bos\.model: the tokenizer has no BOS"),
    ],
)
def test_impossible_requests_are_refused(
    jsonl: Path, model: Path, tmp_path: Path, arguments: dict[str, Any], words: str
) -> None:
    if arguments.get("tokenizer") == "without_bos":
        content = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=content, vocab_size=40, bos_id=-1, minloglevel=2
        )
        (tmp_path / "without_bos.model").write_bytes(content.getvalue())
        arguments = {**arguments, "tokenizer": tmp_path / "without_bos.model"}
    elif "tokenizer" in arguments:
        arguments = {**arguments, "tokenizer": model}
    with pytest.raises(ValueError, match=words):
        prepare(**{"sources": jsonl, "out_dir": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


def test_too_few_documents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("just one")
    with pytest.raises(ValueError, match=r"first 1 for validation at least 2 are needed\. Give more text\.$"):
        prepare(tmp_path / "one.txt", tmp_path / "out")
    (tmp_path / "blank.txt").write_text("\0")
    with pytest.raises(ValueError, match="no tokenizer could be trained"):
        prepare([tmp_path / "one.txt", tmp_path / "blank.txt"], tmp_path / "out")


# The output folder


def test_a_second_run_replaces_the_first(jsonl: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(jsonl, out, vocab_size=330, shard_tokens=500)
    assert len(find_data(out).train) > 3
    prepare(jsonl, out, tokenizer=model, val_docs=3)
    found = find_data(out)
    assert (len(found.train), len(found.val)) == (1, 1)
    assert found.tokenizer == out / "given.model"
    assert [path.name for path in out.glob("*.model")] == ["given.model"]  # the first run's is gone
    prepare(jsonl, out, tokenizer=out / "given.model", val_docs=3)
    assert tokens(out, "train") == encoded(model, TEXTS[3:])


def test_a_second_run_leaves_tokenizers_that_are_not_the_first_runs(jsonl: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(jsonl, out, vocab_size=330)
    (out / "pgolf_330_bpe.model").write_bytes(b"changed since")
    (out / "another.model").write_bytes(b"never of a run")
    prepare(jsonl, out, tokenizer=model)
    assert {path.name for path in out.glob("*.model")} == {"given.model", "pgolf_330_bpe.model", "another.model"}


def test_other_data_in_the_folder_is_refused_and_kept(jsonl: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_shard(out / "fineweb_train_000000.bin", [1, 2])
    (out / "manifest.json").write_text('{"by": "another program"}')
    (out / "given.model").write_text("another tokenizer")
    before = contents(out)
    with pytest.raises(FileExistsError, match=r"holds fineweb_train_000000\.bin and 2 more files"):
        prepare(jsonl, out, tokenizer=model)
    assert contents(out) == before
    with pytest.raises(NotADirectoryError, match=r"texts\.jsonl: this is a file; the output is a folder"):
        prepare(jsonl, jsonl, tokenizer=model)


class Stop(BaseException):
    """Like a KeyboardInterrupt."""


@pytest.mark.parametrize("earlier", [False, True])
def test_a_stopped_run_leaves_what_was_there(jsonl: Path, model: Path, tmp_path: Path, earlier: bool) -> None:
    out = tmp_path / "out"
    before = {}
    if earlier:
        prepare(jsonl, out, tokenizer=model, val_docs=9)
        before = contents(out)
        (out / ".partial").mkdir()
        (out / ".partial" / "pgolf_val_000000.bin").write_text("left by a run that was killed")

    def stop(progress: Progress) -> None:
        if progress.stage == "encoding":
            raise Stop

    with pytest.raises(Stop):
        prepare(jsonl, out, tokenizer=model, val_docs=2, progress=stop)
    assert out.exists() == earlier
    assert not earlier or contents(out) == before


@pytest.mark.parametrize("earlier", [False, True])
def test_a_stop_while_publishing_leaves_nothing_that_looks_whole(
    jsonl: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    really, seen = os.replace, set()
    for moves in range(7):
        out = tmp_path / f"out_{moves}"
        if earlier:
            prepare(jsonl, out, vocab_size=330, val_docs=9)
        left = iter(range(moves))

        def replace(source: Path, target: Path, left: Any = left) -> None:
            if next(left, None) is None:
                raise Stop
            really(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with contextlib.suppress(Stop):
                prepare(jsonl, out, tokenizer=model, val_docs=2)
        if not any(out.glob("*_val_*.bin")):
            seen.add("between")
            with pytest.raises(FileNotFoundError):
                find_data(out)
        else:  # at most the manifest is missing
            seen.add("after")
            assert len(tokens(out, "val")) == len(encoded(model, TEXTS[:2]))
            assert len(tokens(out, "train")) == len(encoded(model, TEXTS[2:]))
    assert seen == {"between", "after"}


def test_a_script_needs_no_main_guard(jsonl: Path, model: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        from pgolf.data import encode
        from pgolf.data.preparation import prepare
        encode.CHUNK_BYTES = 1000
        print("begun")
        prepare({str(jsonl)!r}, {str(tmp_path / "out")!r}, tokenizer={str(model)!r}, val_docs=2, workers=2)
        """)
    )
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "begun\n", "")  # the script ran once
    assert tokens(tmp_path / "out", "train") == encoded(model, TEXTS[2:])


def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that encode starts from here on."""
    seen: list[subprocess.Popen[bytes]] = []

    class Seen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            seen.append(self)

    monkeypatch.setattr(encode_module.subprocess, "Popen", Seen)
    monkeypatch.setattr(encode_module, "CHUNK_BYTES", 1000)
    return seen


@pytest.mark.parametrize("stop", [KeyboardInterrupt, GeneratorExit])
def test_a_stop_leaves_no_process_behind(
    jsonl: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    processes = started(monkeypatch)

    def answer(progress: Progress) -> None:
        if progress.stage == "encoding":
            raise stop

    with pytest.raises(stop):
        prepare(jsonl, tmp_path / "out", tokenizer=model, val_docs=2, workers=2, progress=answer)
    assert len(processes) == 2 and all(process.poll() is not None for process in processes)


def test_a_process_that_dies_is_named(
    jsonl: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(encode_module, "_COMMAND", "import sys; sys.exit(7)")
    with pytest.raises(ChildProcessError, match=r"ended before its work was done \(exit code 7\).*workers=1"):
        prepare(jsonl, tmp_path / "out", tokenizer=model, val_docs=2, workers=2)
    assert not (tmp_path / "out").exists()


def test_what_a_site_prints_at_start_up_is_no_answer(
    jsonl: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode_module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(encode_module, "_COMMAND", "print('a banner');" + encode_module._COMMAND)
    prepare(jsonl, tmp_path / "out", tokenizer=model, val_docs=2, workers=2)
    assert tokens(tmp_path / "out", "train") == encoded(model, TEXTS[2:])


# The built-in corpus


def test_the_builtin_corpus_of_this_python() -> None:
    corpus = builtin_corpus()
    train, val = ([document.text for document in split] for split in (corpus.train, corpus.val))
    sizes = [sum(len(text.encode()) for text in split) for split in (train, val)]
    assert sizes[0] > 1_000_000
    assert sizes[1] >= max(MIN_VAL_BYTES, MIN_VAL_FRACTION * sum(sizes))
    assert sizes[1] <= 0.1 * sum(sizes)
    assert len(set(train + val)) == len(train) + len(val)
    assert any(document.name.startswith("pydoc topic") for document in corpus.train)
    assert builtin_corpus() == corpus


def library(folder: Path, modules: int, size: int = 900) -> Path:
    """A made-up standard library: every module refuses to be imported."""
    for i in range(modules):
        own = f"Module {i}. " + f"m{i} " * (size // len(f"m{i} "))
        source = f'"""{own}"""\nraise SystemExit\nclass A:\n    def f(self):\n        """Shared by all."""\n'
        path = folder / f"package{i % 7}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder


def test_corpus_rules_on_a_made_up_library(tmp_path: Path) -> None:
    folder = library(tmp_path, 300)
    (folder / "order.py").write_text(
        'class B:\n    "second"\n    def z(self): "third"\n"no docstring"\ndef a(): "last"\n'
    )
    (folder / "broken.py").write_text("def (")
    (folder / "twin.py").write_bytes((folder / "order.py").read_bytes())
    (folder / "escape.py").write_text('"\\ud800 and \\d"')
    for skipped in ("test", "site-packages"):
        library(folder / skipped, 1)
    corpus = builtin_corpus(folder)
    names = {document.name: document.text for document in (*corpus.train, *corpus.val)}
    assert names.keys().isdisjoint({"test/package0/module0.py", "site-packages/package0/module0.py", "broken.py"})
    assert ("order.py" in names) != ("twin.py" in names)
    assert names.get("order.py", names.get("twin.py")) == "second\n\nthird\n\nlast"
    assert names["escape.py"] == "? and \\d"
    assert all(document.text.endswith("Shared by all.") for document in corpus.train if document.name[:7] == "package")
    assert corpus.val and not any("Shared" in document.text for document in corpus.val)


def test_a_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing or stripped"):
        builtin_corpus(library(tmp_path, 10))


def test_the_builtin_corpus_becomes_a_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = builtin_corpus(library(tmp_path / "library", 300))
    monkeypatch.setattr(prepare_module, "builtin_corpus", lambda: corpus)
    report = prepare([], tmp_path / "out", builtin=True, vocab_size=400)
    made = report.manifest
    assert (made.train.documents, made.val.documents) == (len(corpus.train), len(corpus.val))
    assert made.val.source_bytes == sum(len(document.text.encode()) for document in corpus.val)
    assert made.sources[0].startswith("standard library of Python 3.")
    model = tmp_path / "out" / "pgolf_400_bpe.model"
    assert tokens(tmp_path / "out", "val") == encoded(model, [document.text for document in corpus.val])
    assert np.count_nonzero(np.array(tokens(tmp_path / "out", "train")) == 1) == len(corpus.train)
