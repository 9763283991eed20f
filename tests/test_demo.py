"""The demo: the whole of it on a little text, and the numbers that the model is compared with."""

from __future__ import annotations

import io
import json
import lzma
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import zstandard
from rich.console import Console

import pgolf
from pgolf.cli.demo import measure_baselines, run_demo, spelled_text
from pgolf.data import preparation as prepare_module
from pgolf.data.corpus import Corpus, Document
from pgolf.data.folder import find_data
from pgolf.data.tokenizer import Tokenizer


@pytest.fixture
def little_corpus(monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Some of the standard library's sources, in place of all its prose."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[10:50:2]
    documents = tuple(Document(path.name, path.read_text(encoding="utf-8")[:12_000]) for path in sources)
    corpus = Corpus(train=documents[:-2], val=documents[-2:])
    monkeypatch.setattr(prepare_module, "builtin_corpus", lambda: corpus)
    return corpus


def demo(folder: Path) -> tuple[dict[str, object], str]:
    console = Console(file=io.StringIO(), width=120)
    results = run_demo(folder, 1.0, console)
    assert isinstance(console.file, io.StringIO)
    return json.loads(json.dumps(results)), console.file.getvalue()


@pytest.mark.filterwarnings("ignore:The learning rate falls")  # a second is too short for the schedule
def test_the_demo_ends_with_its_table_and_can_be_run_again(little_corpus: Corpus, tmp_path: Path) -> None:
    results, text = demo(tmp_path)
    data, run = tmp_path / "data" / "demo", tmp_path / "runs" / "demo"
    report, baselines = results["report"], results["baselines"]
    assert isinstance(report, dict) and isinstance(baselines, dict)

    # Byte-identical text: what the tokens spell, what the compressors get, what the score counts.
    found = find_data(data)
    assert found.manifest is not None and found.tokenizer is not None
    assert baselines["text_bytes"] == found.manifest.val.text_bytes
    score = pgolf.evaluate(pgolf.load(run / "model.pgolf"), data, method="sliding", stride=64, tail="exact")
    assert (score.bytes, score.bpb) == (baselines["text_bytes"], report["score_bpb"])

    assert report["artifact_bytes"] == (run / "model.pgolf").stat().st_size
    lines = {line[:48].strip(): line.split() for line in text.splitlines()}
    for name, bpb in {
        "zstd -22": baselines["zstd"],
        "xz -9": baselines["xz"],
        "xz -9e, given the training text": baselines["xz_given_training_text"],
        "pgolf, as trained": report["val_bpb"],
        "pgolf, quantised artifact": report["val_bpb_quantised"],
        "pgolf, quantised artifact, sliding windows": report["score_bpb"],
    }.items():
        assert lines[name][-2:] == [f"{bpb:.4f}", f"{bpb / baselines['xz']:.0%}"]
    for expected in (f"{report['artifact_bytes']:,} bytes for", "tokens/s", "Return the", f"The run is in {run};"):
        assert expected in text
    assert (run / "loss.png").is_file()
    assert str(results["sample"]).startswith("Return the")

    made = {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    _, text = demo(tmp_path)
    assert "prepared before; used again" in text
    assert {path.name: path.stat().st_mtime_ns for path in data.iterdir()} == made
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(len(log)))  # of one run, not of two


@pytest.mark.parametrize("change", ["shard", "tokenizer", "manifest"])
def test_data_that_is_not_what_its_manifest_says_is_prepared_anew(
    change: str, little_corpus: Corpus, tmp_path: Path
) -> None:
    from pgolf.cli import demo as module

    def show(what: str, done: int, total: int) -> None:
        pass

    assert module.prepare_data(tmp_path, show) and not module.prepare_data(tmp_path, show)
    found = find_data(tmp_path)
    assert found.tokenizer is not None
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if change == "manifest":
        manifest = tmp_path / "manifest.json"
        manifest.write_text(manifest.read_text().replace("standard library of Python", "standard library of Perl"))
    else:
        path = found.train[0] if change == "shard" else found.tokenizer
        path.write_bytes(path.read_bytes()[:-2] + b"ab")
    assert module.prepare_data(tmp_path, show)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_the_text_is_what_the_tokens_spell(small_corpus: Path, tmp_path: Path) -> None:
    found = find_data(small_corpus)
    assert found.tokenizer is not None
    tokenizer = Tokenizer(found.tokenizer)
    (shard,) = found.val
    tokens = pgolf.read_shard(shard)
    text = spelled_text(found.val, tokenizer, bos_id=1)
    assert len(text) == tokenizer.target_bytes(tokens[:-1], tokens[1:]).sum()
    assert text.decode().replace(" ", "") == tokenizer.decode(tokens).replace(" ", "")
    pgolf.write_shard(tmp_path / "x_val_0.bin", tokens[1:])
    with pytest.raises(ValueError, match=r"the tokens count [\d,]+ bytes and spell [\d,]+; the two must be equal"):
        spelled_text((tmp_path / "x_val_0.bin",), tokenizer, bos_id=1)


def test_the_baselines_are_those_of_the_tools(small_corpus: Path) -> None:
    found = find_data(small_corpus)
    assert found.tokenizer is not None
    train, val = (spelled_text(shards, Tokenizer(found.tokenizer), bos_id=1) for shards in (found.train, found.val))
    got = measure_baselines(train, val)
    assert got.text_bytes == len(val)
    assert got.xz == 8 * len(lzma.compress(val, preset=9)) / len(val)
    assert got.zstd == pytest.approx(8 * len(zstandard.ZstdCompressor(level=22).compress(val)) / len(val), rel=0.01)
    assert got.xz_given_training_text < got.xz
    known = measure_baselines(train + val, val)  # all of it has been seen, further back than most dictionaries reach
    assert known.xz_given_training_text < 0.1 * got.xz
    with pytest.raises(ValueError, match="validation text is empty"):
        measure_baselines(train, b"")


def test_the_demo_is_a_command(tmp_path: Path) -> None:
    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pgolf.cli.demo", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    helped = process("--help")
    assert helped.returncode == 0 and "--seconds" in helped.stdout
    assert process("--seconds", "0").returncode == 2
    manifest = tmp_path / "data" / "demo" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{")
    refused = process(str(tmp_path))
    assert refused.returncode == 2 and re.fullmatch(r"Error: .*manifest\.json: this is not JSON .*\n", refused.stderr)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [manifest]
