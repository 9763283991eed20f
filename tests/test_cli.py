"""The command line: every verb on a tiny run; a wrong request gets a sentence, exit code 2, and writes nothing."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import pgolf
from pgolf.cli.app import app
from pgolf.common import errors
from pgolf.config import Config, TrainConfig
from pgolf.data.hub import Hub
from pgolf.data.inspection import inspect_data
from pgolf.report.progress import duration, seconds_left, stages, training_progress
from pgolf.runs.records import StepRecord
from tests import hub
from tests.runs import files, last_json, pgolf_, refused

CONFIG = """
extends = "tiny"

[model]
vocab_size = 512
num_layers = 2
model_dim = 32
num_heads = 2
num_kv_heads = 1
bigram_vocab_size = 64
bigram_dim = 16

[train]
iterations = 24
max_wallclock_seconds = 0
train_batch_tokens = 256
train_seq_len = 64
swa_every = 2
val_loss_every = 10
train_log_every = 8
"""


def process(*arguments: str | Path) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pgolf", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PGOLF_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def run(config_file: Path, small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    result = pgolf_("train", "--config", config_file, "--data", small_corpus, "--run-dir", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of another vocabulary than the model's."""
    from pgolf.data.train_tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "other.model"
    train_tokenizer(["the cat sat on the mat and the dog sat on the cat"] * 20, path, 300, "nmt_nfkc")
    return path


# Every verb


def test_train_leaves_a_whole_run_folder(run: Path, small_corpus: Path) -> None:
    assert set(files(run)) == {
        "config.toml",
        "log.jsonl",
        "checkpoint/step-00000024.npz",
        "model.pgolf",
        "run.json",
        "loss.png",
        "report.json",
    }
    config = Config.from_toml(run / "config.toml")
    assert (config.train.iterations, config.train.data_path) == (24, str(small_corpus))
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(25))
    report = json.loads((run / "report.json").read_text())
    assert report["artifact_bytes"] == (run / "model.pgolf").stat().st_size
    assert report["snapshots"] >= 2


def test_train_tells_what_it_does_where_nobody_watches(config_file: Path, small_corpus: Path, tmp_path: Path) -> None:
    code = tmp_path / "train.py"
    code.write_text("x" * 1234)
    folder = tmp_path / "run"
    result = pgolf_(
        "train", "--config", config_file, "--data", small_corpus, "--run-dir", folder, "--set", "train.iterations=9",
        "--set", "train.warmdown_frac=0.9", "--code", code, "--threads", 1, "--device", "cpu", "--json",
    )  # fmt: skip
    report = last_json(result)
    assert len(result.stdout.splitlines()) == 1
    assert (report["steps"], report["code_bytes"], report["run_dir"]) == (9, 1234, str(folder))
    assert report["total_bytes"] == report["artifact_bytes"] + 1234
    steps = [line for line in result.stderr.splitlines() if line.startswith("step")]
    assert [line.split(" · ")[0] for line in steps] == ["step 0", "step 8 of 9", "step 9"]
    assert re.search(r"loss \d\.\d{4} · [\d,]+ tokens/s · lr ×0\.\d\d · .* left", steps[1])
    assert re.fullmatch(r"step 9 · validation loss \d\.\d{4} · \d\.\d{4} bits per byte", steps[2])
    for expected in ("export …", "score …", "it fits", f"The run is in {folder}."):
        assert expected in result.stderr
    assert f"{report['score_bpb']:.4f}" in result.stderr


def test_train_repeats_the_schedule_of_a_log(run: Path, config_file: Path, small_corpus: Path, tmp_path: Path) -> None:
    result = pgolf_(
        "train", "--config", config_file, "--data", small_corpus, "--run-dir", tmp_path / "again",
        "--replay-schedule", run / "log.jsonl",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again" / "model.pgolf").read_bytes() == (run / "model.pgolf").read_bytes()


def test_train_resumes_a_finished_run_to_the_same_artifact(run: Path, config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "model.pgolf").unlink()
    result = pgolf_("train", "--config", folder / "config.toml", "--run-dir", folder, "--resume")
    assert result.exit_code == 0, result.output
    assert (folder / "model.pgolf").read_bytes() == (run / "model.pgolf").read_bytes()


def test_seeds_are_runs_of_their_own_and_end_in_a_test(config_file: Path, small_corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    words = ("train", "--config", config_file, "--run-dir", folder, "--set", "train.iterations=2")
    words += ("--data", small_corpus, "--seeds", "3,1", "--against", 99)
    first = pgolf_(*words, "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    scores = [found["runs"][seed]["score_bpb"] for seed in ("3", "1")]
    assert scores[0] != scores[1] and [found["runs"][seed]["seed"] for seed in ("3", "1")] == [3, 1]
    assert (found["unit"], found["mean"]) == ("bits per byte", statistics.fmean(scores))
    assert found["standard_deviation"] == statistics.stdev(scores)
    assert found["t_test"]["reference"] == 99 and found["t_test"]["p_value"] < 0.01
    alone = pgolf_(*words[:-4], "--run-dir", tmp_path / "alone", "--set", "train.seed=1")
    assert alone.exit_code == 0, alone.output
    artifact = (folder / "seed-1" / "model.pgolf").read_bytes()
    assert artifact == (tmp_path / "alone" / "model.pgolf").read_bytes()

    # A seed that is finished is not begun again; one that is not is.
    kept = (folder / "seed-3" / "report.json").stat().st_mtime_ns
    shutil.rmtree(folder / "seed-1")
    again = pgolf_("train", "--run-dir", folder, "--data", small_corpus, "--seeds", "3,1", "--resume")
    assert again.exit_code == 0, again.output
    assert (folder / "seed-3" / "report.json").stat().st_mtime_ns == kept
    assert (folder / "seed-1" / "model.pgolf").read_bytes() == artifact
    assert re.search(r"standard deviation +\d\.\d{5}", again.stdout) and f"{found['mean']:.5f}" in again.stdout
    taken = pgolf_(*words)
    assert taken.exit_code == 2 and "seed-3" in taken.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "1,x", "--run-dir", "r"], "'x' is not a seed"),
        (["--seeds", "1,", "--run-dir", "r"], "'' is not a seed"),
        (["--seeds", "1,2,1", "--run-dir", "r"], "a seed stands twice"),
        (["--seeds", "1,2"], "--seeds needs the --run-dir"),
        (["--against", "1.2", "--run-dir", "r"], "--against tests a mean"),
        (["--seeds", "1", "--against", "1.2", "--run-dir", "r"], "at least two"),
    ],
)
def test_seeds_that_cannot_be_run(config_file: Path, words: list[str], told: str) -> None:
    result = pgolf_("train", "--config", config_file, *words)
    assert result.exit_code == 2 and told in result.stderr


def test_train_says_what_a_picture_needs(
    config_file: Path, small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = pgolf_(
        "train", "--config", config_file, "--data", small_corpus, "--run-dir", tmp_path / "run", "--set",
        "train.iterations=1",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "pip install 'pgolf[plot]'" in result.stdout and not (tmp_path / "run" / "loss.png").exists()


def test_warnings_are_sentences(config_file: Path, small_corpus: Path) -> None:
    result = pgolf_(
        "train", "--config", config_file, "--data", small_corpus, "--no-run-dir",
        "--set", "train.warmdown_frac=1", "--set",
        "train.iterations=2", "--set", "train.warmdown_iters=50", "--set", "train.warmdown_frac=0",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Warning: The learning rate falls from the start" in result.stderr


def test_eval_of_a_run_is_its_report(run: Path) -> None:
    result = pgolf_("eval", run, "--json", "--audit", "full")
    score, report = last_json(result), json.loads((run / "report.json").read_text())
    assert (score["loss"], score["bpb"]) == (report["score_loss"], report["score_bpb"])
    assert (score["method"], score["seq_len"], score["stride"], score["tail"]) == ("sliding", 64, 64, "exact")
    assert score["tokens"] == score["audit"]["expected_tokens"] == 1999 and score["audit"]["bytes_checked"]
    assert f"{score['bpb']:.4f}" in result.stderr and "score …" in result.stderr


def test_eval_of_an_artifact_takes_its_settings_from_the_options(run: Path, small_corpus: Path) -> None:
    expected = pgolf.evaluate(
        pgolf.load(run / "model.pgolf"),
        small_corpus,
        method="sliding",
        seq_len=32,
        stride=24,
        tail="reference",
        batch_seqs=3,
    )
    options = (
        "--method sliding --seq-len 32 --stride 24 --tail reference --batch-seqs 3 --threads 1 --device cpu --json"
    )
    score = last_json(pgolf_("eval", run / "model.pgolf", "--data", small_corpus, *options.split()))
    assert (score["loss"], score["bpb"], score["windows"]) == (expected.loss, expected.bpb, expected.windows)


def test_eval_by_test_time_training(run: Path, small_corpus: Path) -> None:
    expected = pgolf.evaluate(pgolf.load(run / "model.pgolf"), small_corpus, method="ttt")
    score = last_json(pgolf_("eval", run, "--method", "ttt", "--ttt-batch-size", "3", "--json"))
    assert (score["loss"], score["bpb"], score["windows"]) == (expected.loss, expected.bpb, expected.windows)
    assert (score["method"], score["seq_len"], score["stride"], score["tokens"]) == ("ttt", 1024, None, 1999)
    shown = pgolf_("eval", run, "--method", "ttt").stdout
    assert re.search(rf"ttt, context 1,024, {expected.windows:,} chunks", shown)


def test_eval_of_a_shard_without_a_tokenizer_has_no_bits_per_byte(run: Path, small_corpus: Path) -> None:
    (shard,) = small_corpus.glob("*_val_*.bin")
    result = pgolf_("eval", run / "model.pgolf", "--data", shard, "--method", "standard")
    assert result.exit_code == 0, result.output
    assert re.search(r"bits per byte +–", result.stdout) and "bytes not (no tokenizer)" in result.stdout


def test_export_of_a_run_is_its_artifact(run: Path, tmp_path: Path) -> None:
    report = last_json(pgolf_("export", run, "--out", tmp_path / "again.pgolf", "--json"))
    assert (tmp_path / "again.pgolf").read_bytes() == (run / "model.pgolf").read_bytes()
    assert report["bytes"] == (run / "model.pgolf").stat().st_size and report["code_bytes"] is None


def test_export_of_an_average_that_decays(config_file: Path, small_corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = pgolf_(
        "train", "--config", config_file, "--data", small_corpus, "--run-dir", folder, "--set", "train.ema_decay=0.7",
        "--set", "train.iterations=5",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    last_json(pgolf_("export", folder, "--out", tmp_path / "again.pgolf", "--json"))
    assert (tmp_path / "again.pgolf").read_bytes() == (folder / "model.pgolf").read_bytes()


def test_export_takes_its_settings_from_the_options(run: Path, tmp_path: Path) -> None:
    code = tmp_path / "train.py"
    code.write_text("x" * 77)
    result = pgolf_(
        "export", run, "--out", tmp_path / "small.pgolf", "--policy", "pr465", "--prune", 0.5, "--small-numel", 64,
        "--code", code, "--threads", 1, "--json",
    )  # fmt: skip
    report = last_json(result)
    encodings = {tensor["name"]: tensor["encoding"] for tensor in report["tensors"]}
    assert encodings["tok_emb.weight"] == "int6" and encodings["blocks.0.mlp.fc.weight"] == "int5"
    assert (report["code_bytes"], report["total_bytes"]) == (77, report["bytes"] + 77)
    assert "blocks.1.attn.proj.weight" in result.stderr and "with 77 bytes of code" in result.stderr


def test_export_of_an_artifact_encodes_it_again(run: Path, tmp_path: Path) -> None:
    result = pgolf_("export", run / "model.pgolf", "--out", tmp_path / "again.pgolf")
    assert result.exit_code == 0, result.output
    ours, theirs = pgolf.load(tmp_path / "again.pgolf"), pgolf.load(run / "model.pgolf")
    assert (ours.train_seq_len, ours.provenance) == (theirs.train_seq_len, theirs.provenance)
    # Every tensor is below the base recipe's 8,192 elements or its embedding: fp16 of what was fp16 or less.
    assert all(np.array_equal(array, theirs.state_dict()[name]) for name, array in ours.state_dict().items())


def test_files_of_the_community_move_out_and_score_the_same(run: Path, small_corpus: Path, tmp_path: Path) -> None:
    unquantised = last_json(pgolf_("export", run, "--out", tmp_path / "m.safetensors", "--json"))
    assert unquantised == {
        "path": str(tmp_path / "m.safetensors"),
        "bytes": (tmp_path / "m.safetensors").stat().st_size,
    }
    report = last_json(pgolf_("export", run, "--out", tmp_path / "m.ptz", "--json"))
    artifact = last_json(pgolf_("export", run, "--out", tmp_path / "m.pgolf", "--json"))
    assert [t | {"path": 0} for t in report["tensors"]] == [t | {"path": 0} for t in artifact["tensors"]]
    assert pgolf_("export", run, "--out", tmp_path / "m.pt").exit_code == 0
    newest = run / "checkpoint" / "step-00000024.npz"
    data = ("--data", small_corpus, "--method", "standard", "--json")

    def loss(path: Path, *options: str | Path) -> float:
        return float(last_json(pgolf_("eval", path, *data, *options))["loss"])

    quantised = loss(run / "model.pgolf")
    assert loss(tmp_path / "m.ptz", "--config", run / "config.toml") == quantised
    assert loss(tmp_path / "m.ptz", "--seq-len", "64") == quantised
    weights = loss(tmp_path / "m.safetensors")
    assert weights != quantised
    assert loss(newest) == weights == loss(tmp_path / "m.pt", "--seq-len", "64")
    assert loss(tmp_path / "m.pt", "--recipe", "tiny", "--set", "train.train_seq_len=64") == weights
    assert loss(tmp_path / "m.pt", "--set", "model.rope_base=9", "--seq-len", "64") != weights
    text = pgolf_("generate", tmp_path / "m.pt", "--tokenizer", next(small_corpus.glob("*.model")), "--prompt", "The")
    assert text.exit_code == 0 and text.stdout.startswith("The")


def test_export_keeps_integers_when_only_the_container_changes(run: Path, tmp_path: Path) -> None:
    assert pgolf_("export", run, "--out", tmp_path / "a.ptz", "--policy", "pr465", "--small-numel", 64).exit_code == 0
    back = pgolf_("export", tmp_path / "a.ptz", "--out", tmp_path / "b.pgolf", "--config", run / "config.toml")
    assert back.exit_code == 0, back.output
    loaded = pgolf.load(tmp_path / "b.pgolf")
    assert loaded.train_seq_len == 64 and loaded.config == Config.from_toml(run / "config.toml").model
    report = last_json(pgolf_("export", tmp_path / "b.pgolf", "--out", tmp_path / "c.ptz", "--json"))
    assert (tmp_path / "c.ptz").read_bytes() == (tmp_path / "a.ptz").read_bytes()
    assert {tensor["max_error"] for tensor in report["tensors"]} == {0.0}
    assert {tensor["encoding"] for tensor in report["tensors"]} >= {"int5", "int6"}
    again = last_json(pgolf_("export", tmp_path / "c.ptz", "--out", tmp_path / "d.pgolf", "--policy", "tiny", "--json"))
    assert {tensor["encoding"] for tensor in again["tensors"]} == {"fp16"}


def test_generate_continues_the_prompt(run: Path) -> None:
    arguments = ("generate", run, "--prompt", "Return the", "--max-new-tokens", 12, "--seed", 7, "--top-k", 9)
    result = pgolf_(*arguments)
    assert result.exit_code == 0 and result.stdout.startswith("Return the")
    value = last_json(pgolf_(*arguments, "--json"))
    assert value["text"] == result.stdout.removesuffix("\n") and 1 <= len(value["new_tokens"]) <= 12
    greedy = [last_json(pgolf_(*arguments, "--temperature", 0, "--seed", seed, "--json")) for seed in (1, 2)]
    assert greedy[0]["new_tokens"] == greedy[1]["new_tokens"]


def test_generate_from_an_artifact_takes_the_given_tokenizer(run: Path, small_corpus: Path) -> None:
    (tokenizer,) = small_corpus.glob("*.model")
    words = ("--max-new-tokens", 8, "--top-p", 0.9)
    given = pgolf_("generate", run / "model.pgolf", "--tokenizer", tokenizer, *words)
    assert given.exit_code == 0 and given.stdout == pgolf_("generate", run, *words).stdout


def test_data_prepare(tmp_path: Path) -> None:
    source = tmp_path / "texts.jsonl"
    texts = [f"Document {i} says: the cat  sat on the mat, {i * 37 % 11} times." for i in range(40)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ("data", "prepare", source, "--vocab-size", 300, "--val-docs", 5, "--workers", 1)
    value = last_json(pgolf_(*arguments, "--out", tmp_path / "out", "--json"))
    assert value["manifest"] == {
        k: v for k, v in json.loads((tmp_path / "out/manifest.json").read_text()).items() if k != "format"
    }
    assert value["manifest"]["val"]["documents"] == 5
    assert "--normalization identity" in value["warning"]
    whole = pgolf_(*arguments, "--out", tmp_path / "whole", "--normalization", "identity")
    assert whole.exit_code == 0 and "normalis" not in whole.stdout
    assert re.search(r"validation +5 ", whole.stdout)
    again = pgolf_(
        "data", "prepare", source, "--out", tmp_path / "again", "--tokenizer", tmp_path / "out/pgolf_300_bpe.model"
    )
    assert again.exit_code == 0, again.output
    assert (tmp_path / "again/pgolf_300_bpe.model").read_bytes() == (tmp_path / "out/pgolf_300_bpe.model").read_bytes()


def test_recipes() -> None:
    listed = pgolf_("recipes")
    assert listed.exit_code == 0
    described = last_json(pgolf_("recipes", "--json"))
    assert list(described) == pgolf.recipes()
    for name, description in described.items():
        assert f" {name} " in listed.stdout and description.endswith(".") and len(description) > 30
    assert "the exact sliding tail." in described["pr286"]


@pytest.mark.parametrize("name", pgolf.recipes())
def test_a_printed_recipe_is_that_recipe(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(pgolf_("recipes", name).stdout)
    assert Config.from_toml(tmp_path / "mine.toml") == Config.from_recipe(name)
    assert last_json(pgolf_("recipes", name, "--json")) == Config.from_recipe(name).to_dict()


def test_help_teaches() -> None:
    text = pgolf_("--help").stdout
    verbs = ("train", "eval", "export", "generate", "inspect", "plot", "data", "submit", "check", "recipes", "doctor")
    for expected in (*verbs, "pgolf data prepare --builtin", "--install-completion", "130 interrupted"):
        assert expected in text
    data_verbs = (("data", verb) for verb in ("prepare", "download", "inspect"))
    for verb in (*((verb,) for verb in verbs if verb != "data"), *data_verbs):
        help_text = pgolf_(*verb, "--help")
        assert help_text.exit_code == 0 and f"Example: pgolf {' '.join(verb)}" in help_text.stdout
    assert pgolf_("--version").stdout == f"pgolf {pgolf.__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pgolf do", {"doctor"}),
        ("pgolf data ", {"prepare", "download", "inspect"}),
        ("pgolf train --rec", {"--recipe"}),
        ("pgolf train --recipe pr2", {"pr286", "pr289"}),
        ("pgolf export runs/demo --policy ti", {"tiny"}),
        ("pgolf recipes ba", {"base"}),
    ],
)
def test_the_shell_completes(words: str, expected: set[str]) -> None:
    environment = {
        **os.environ,
        "_PGOLF_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    arguments = [sys.executable, "-m", "pgolf"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected and done.stderr == ""


def test_data_inspect(small_corpus: Path) -> None:
    report = inspect_data(small_corpus, samples=2)
    value = last_json(pgolf_("data", "inspect", small_corpus, "--samples", 2, "--json"))
    assert value == {"kind": "data", **json.loads(json.dumps(report.to_dict()))}
    shown = pgolf_("data", "inspect", small_corpus)
    assert shown.exit_code == 0, shown.output
    for split, shards in report.shards.items():
        (line,) = (line for line in shown.stdout.splitlines() if line.split()[:1] == [shards[0].file])
        counts = shards[0].counts
        for number in (shards[0].bytes, counts.tokens, counts.documents, counts.text_bytes):
            assert f" {number:,} " in line
        assert f"{split}: {shards[0].samples[0]!r}" in shown.stdout
    (shard,) = small_corpus.glob("*_val_*.bin")
    one = last_json(pgolf_("data", "inspect", shard, "--json"))
    assert list(one["shards"]) == ["shard"] and one["totals"]["shard"] == value["totals"]["val"]


def test_data_inspect_of_several_shards_has_their_totals(small_corpus: Path, tmp_path: Path) -> None:
    tokens = pgolf.read_shard(next(small_corpus.glob("*_train_*.bin")))
    for index in range(3):
        pgolf.write_shard(tmp_path / f"part_train_{index}.bin", tokens[index * 50 : (index + 1) * 50])
    shown = pgolf_("data", "inspect", tmp_path)
    assert re.search(rf"train, together +{3 * (1024 + 100):,} +150 ", shown.stdout), shown.output
    assert re.search(r"tokenizer +none", shown.stdout)


def test_data_inspect_tells_what_is_wrong(small_corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(small_corpus, tmp_path / "data")
    (val,) = (tmp_path / "data").glob("*_val_*.bin")
    val.write_bytes(val.read_bytes()[:-2])
    result = pgolf_("data", "inspect", tmp_path / "data", "--json")
    refused_with = re.escape(f"Error: {val}: the file has 5,022 bytes; its header says 2,000 tokens")
    assert result.exit_code == 2 and re.search(refused_with, result.stderr)
    value = json.loads(result.stdout.splitlines()[-1])
    assert value["shards"]["train"][0]["problem"] is None and len(value["problems"]) == 1


def test_data_download(small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    (train,), (val,), (model,) = (list(small_corpus.glob(glob)) for glob in ("*_train_*", "*_val_*", "*.model"))
    folder = "datasets/datasets/fineweb10B_sp512"
    stats = {"files_train": 2, "files_val": 1, "tokens_train": 40_000, "tokens_val": 2_000}
    manifest = {
        "shard_size": 20_000,
        "tokenizers": [{"name": "sp512", "vocab_size": 512, "model_path": "tokenizers/fineweb_512_bpe.model"}],
        "datasets": [{"name": "fineweb10B_sp512", "tokenizer_name": "sp512", "vocab_size": 512, "stats": stats}],
    }
    export = {
        "datasets/manifest.json": json.dumps(manifest).encode(),
        "datasets/tokenizers/fineweb_512_bpe.model": model.read_bytes(),
        f"{folder}/fineweb_train_000000.bin": train.read_bytes(),
        f"{folder}/fineweb_train_000001.bin": train.read_bytes(),
        f"{folder}/fineweb_val_000000.bin": val.read_bytes(),
    }
    monkeypatch.chdir(tmp_path)
    with hub.serve(export) as standing_in:
        # The library reads HF_ENDPOINT when it is imported.
        monkeypatch.setattr("pgolf.data.downloading.Hub", lambda repo, endpoint: Hub(repo, standing_in.endpoint))
        options = ("--repo", hub.REPO, "--train-shards", 1)
        value = last_json(pgolf_("data", "download", "sp512", *options, "--json"))
        assert (value["path"], value["fetched_files"]) == ("data/sp512", 3)
        assert value["manifest"]["hub"]["revision"] == hub.COMMIT
        again = pgolf_("data", "download", "sp512", *options, "--revision", "main", "--out", "data/sp512")
        assert again.exit_code == 0 and "fetched: 0 files, 0 bytes" in again.stdout, again.output
        assert re.search(r"training +10 +20,000 ", again.stdout)
        refused(
            pgolf_("data", "download", "sp512", "--repo", hub.REPO, "--out", "x"), "--train-shards is 80; .* has 2 "
        )
        refused(
            pgolf_("data", "download", "sp9", "--repo", hub.REPO, "--out", "x"), "'sp9' is not there; there are: sp512"
        )
        refused(pgolf_("data", "download", "sp512", "--repo", "some/other", "--out", "x"), "has no dataset some/other")
        standing_in.status = 503
        failed = pgolf_("data", "download", "sp512", *options, "--out", "x")
    assert failed.exit_code == 1 and "answered with status 503" in failed.stderr and not Path("x").exists()
    (shard,) = Path("data/sp512").glob("*_train_*.bin")
    assert shard.read_bytes() == train.read_bytes()


def test_plot_lays_runs_over_each_other(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / run.name
    shutil.copytree(run, other)
    out = tmp_path / "runs.png"
    value = last_json(pgolf_("plot", run, tmp_path / "other" / run.name / "log.jsonl", "--out", out, "--json"))
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = {"step": 24, **{name: records[-1][name] for name in ("loss", "val_loss", "val_bpb")}}
    assert value == {"out": str(out), "runs": {str(run): last, str(other / "log.jsonl"): last}}
    assert out.read_bytes().startswith(b"\x89PNG")
    alone = pgolf_("plot", run, "--out", out)
    assert alone.exit_code == 0 and alone.stdout == f"The picture is {out}.\n"
    assert list(last_json(pgolf_("plot", run, "--out", out, "--json"))["runs"]) == [run.name]


# A wrong request: a sentence, exit code 2, nothing written


@pytest.fixture
def broken_data(small_corpus: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(what: str) -> Path:
        folder = tmp_path / "data"
        shutil.copytree(small_corpus, folder)
        (train,), (val,), (model,) = (folder.glob(glob) for glob in ("*_train_*.bin", "*_val_*.bin", "*.model"))
        shard = train.read_bytes()
        if what == "empty":
            shutil.rmtree(folder)
            folder.mkdir()
        elif what == "no validation":
            val.unlink()
        elif what == "magic":
            train.write_bytes(b"\x00" * 4 + shard[4:])
        elif what == "version":
            train.write_bytes(shard[:4] + b"\x07" + shard[5:])
        elif what == "short":
            train.write_bytes(shard[:-10])
        elif what == "odd":
            train.write_bytes(shard + b"\x00")
        elif what == "token":
            val.write_bytes(val.read_bytes()[:-2] + (600).to_bytes(2, "little"))
        elif what == "tokenizer":
            model.write_bytes(model.read_bytes()[:5000])
        return folder

    return make


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty", r"holds no \*_train_\*\.bin shard"),
        ("no validation", r"holds no \*_val_\*\.bin shard"),
        ("magic", r"_train_\S+: .*20240520"),
        ("version", r"_train_\S+: .*version"),
        ("short", r"_train_\S+: the file has .* bytes"),
        ("odd", r"_train_\S+: the file has .* bytes"),
        ("token", r"_val_\S+: token 1,999 is 600; a vocabulary of 512 ends at 511"),
        ("tokenizer", r"\.model: this is not a SentencePiece model"),
    ],
)
def test_broken_data(
    what: str, message: str, config_file: Path, broken_data: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = pgolf_("train", "--config", config_file, "--data", broken_data(what), "--run-dir", run)
    refused(result, message)
    assert files(run) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{tmp}/nowhere"], r"nowhere: no such data folder"),
        ([], "No training data was given"),
        (["--data", "{data}", "--tokenizer", "{tmp}/no.model"], r"no\.model: no such tokenizer"),
        (["--data", "{data}", "--tokenizer", "{other}"], "has 300 tokens; the model has 512"),
        (
            ["--data", "{data}", "--set", "train.iteration=3"],
            r"train\.iteration is not a key .* nearest is train\.iterations",
        ),
        (["--data", "{data}", "--set", "train.iterations"], r"must have the form table\.key=value"),
        (
            ["--data", "{data}", "--set", "model.num_heads=5"],
            r"model\.model_dim = 32: must be divisible by model\.num_heads",
        ),
        (["--data", "{data}", "--recipe", "tiny"], "--recipe and --config are both given"),
        (["--data", "{data}", "--device", "cuda:99"], "GPU|driver|CUDA"),
        (["--data", "{data}", "--device", "tpu"], "The device is 'tpu'; expected 'cpu'"),
        (["--data", "{data}", "--replay-schedule", "{tmp}/no.jsonl"], r"no\.jsonl"),
        (["--data", "{data}", "--code", "{tmp}/no.py"], r"no\.py: no such script"),
        (
            ["--data", "{data}", "--set", "train.train_seq_len=32768", "--set", "train.train_batch_tokens=32768"],
            "train_seq_len is 32,768, which needs 32,769 tokens",
        ),
    ],
)
def test_train_refuses(
    arguments: list[str], message: str, config_file: Path, small_corpus: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    words = [word.format(tmp=tmp_path, data=small_corpus, other=other_tokenizer) for word in arguments]
    refused(pgolf_("train", "--config", config_file, "--run-dir", tmp_path / "run", *words), message)
    assert files(tmp_path) == {}


def test_train_refuses_a_length_beyond_the_validation_data(
    config_file: Path, small_corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = pgolf_(
        "train", "--config", config_file, "--data", small_corpus, "--run-dir", run, "--set", "train.train_seq_len=2048",
        "--set", "train.train_batch_tokens=2048",
    )  # fmt: skip
    refused(result, "The data has 1,999 targets .* need at least 2,048")
    assert files(run).keys() <= {"config.toml"}, "it must be refused before it trains"


def test_train_leaves_another_run_alone(run: Path, config_file: Path, small_corpus: Path) -> None:
    before = files(run)
    result = pgolf_("train", "--config", config_file, "--data", small_corpus, "--run-dir", run)
    refused(result, "already holds a run; resume it .* or choose another folder")
    assert files(run) == before


def test_configuration_files_are_refused(tmp_path: Path) -> None:
    refused(pgolf_("train", "--config", tmp_path / "no.toml"), r"no configuration file .*no\.toml")
    path = tmp_path / "wrong.toml"
    path.write_text("[model]\nnum_layer = 3\n")
    refused(pgolf_("train", "--config", path), r"wrong\.toml: model\.num_layer is not a key .* model\.num_layers")
    path.write_text("[model\n")
    refused(pgolf_("train", "--config", path), r"wrong\.toml is not a TOML file")
    refused(pgolf_("train", "--recipe", "tinny"), "no recipe 'tinny'; the nearest is 'tiny'")
    refused(pgolf_("recipes", "bass"), "no recipe 'bass'; the nearest is 'base'")


@pytest.fixture
def damaged(run: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(what: str) -> Path:
        path = tmp_path / "damaged.pgolf"
        data = (run / "model.pgolf").read_bytes()
        if what == "truncated":
            path.write_bytes(data[:-100])
        elif what == "flipped":
            path.write_bytes(data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])
        elif what == "magic":
            path.write_bytes(b"x" + data[1:])
        return path

    return make


@pytest.mark.parametrize("what", ["truncated", "flipped", "magic", "missing"])
@pytest.mark.parametrize("verb", ["eval", "export", "generate"])
def test_damaged_artifacts(
    verb: str, what: str, damaged: Callable[[str], Path], small_corpus: Path, tmp_path: Path
) -> None:
    (tokenizer,) = small_corpus.glob("*.model")
    path = damaged(what)
    before = files(tmp_path)
    options = {
        "eval": ("--data", small_corpus),
        "export": ("--out", tmp_path / "out.pgolf"),
        "generate": ("--tokenizer", tokenizer),
    }
    refused(pgolf_(verb, path, *options[verb]), r"damaged\.pgolf")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "{tmp}/nothing"], "no such file or folder"),
        (["eval", "{tmp}"], r"not a run folder, as it holds no config\.toml"),
        (["eval", "{run}/model.pgolf"], "does not say on which data it was trained; give --data"),
        (["eval", "{run}", "--data", "{tmp}/no"], "no: no such data folder"),
        (["eval", "{run}", "--method", "tt"], "method is 'tt'"),
        (["eval", "{run}", "--tail", "both"], "tail"),
        (["eval", "{run}", "--audit", "some"], "audit is 'some'"),
        (["eval", "{run}", "--stride", "65"], "stride"),
        (["eval", "{run}", "--method", "standard", "--seq-len", "4000"], "1,999 targets .* at least 4,000"),
        (["eval", "{run}", "--tokenizer", "{other}"], "has 300 tokens; the model has 512"),
        (["eval", "{run}", "--device", "cuda:99"], "GPU|driver|CUDA"),
        (["export", "{run}", "--out", "{tmp}/no/x.pgolf"], r"There is no folder .*no for the artifact x\.pgolf"),
        (["export", "{run}", "--out", "{tmp}/x.pgolf", "--policy", "pr28"], "no recipe 'pr28'"),
        (["export", "{run}", "--out", "{tmp}/x.pgolf", "--prune", "1"], r"export\.prune = 1\.0"),
        (["export", "{run}", "--out", "{tmp}/x.pgolf", "--small-numel", "-1"], r"export\.small_numel = -1"),
        (["export", "{run}", "--out", "{tmp}/x.pgolf", "--code", "{tmp}/no.py"], r"no script .*no\.py"),
        (["eval", "{run}", "--recipe", "base"], "has a configuration; --recipe, --config and --set are for single"),
        (["eval", "{run}/model.pgolf", "--recipe", "pr28"], "no recipe 'pr28'"),
        (["eval", "{run}/model.pgolf", "--recipe", "base", "--config", "x.toml"], "both given"),
        (["eval", "{run}/model.pgolf", "--set", "model.rope=1"], "nearest is model.rope"),
        (["eval", "{run}/model.pgolf", "--set", "rope"], "must have the form table.key=value"),
        (["eval", "{run}/log.jsonl", "--data", "{run}"], r"log\.jsonl: the file begins with"),
        (["export", "{run}", "--out", "{tmp}/x.pt", "--prune", "0.1"], r"x\.pt holds weights as they are"),
        (["export", "{run}", "--out", "{tmp}/no/x.safetensors"], r"There is no folder .*no for the state dict"),
        (["generate", "{run}/model.pgolf"], "No tokenizer is known .* give --tokenizer"),
        (["generate", "{run}", "--tokenizer", "{other}"], "has 300 tokens; the model has 512"),
        (["generate", "{run}", "--tokenizer", "{run}/log.jsonl"], r"log\.jsonl: this is not a SentencePiece model"),
        (["generate", "{run}", "--temperature", "-1"], "temperature is -1"),
        (["generate", "{run}", "--top-p", "2"], "--top-p is 2"),
        (["generate", "{run}", "--top-k", "0"], "--top-k is 0"),
        (["generate", "{run}", "--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        (["generate", "{run}", "--seed", "-1"], "seed is -1"),
        (["inspect", "{tmp}/nothing"], "no such file or folder"),
        (["plot", "{run}", "--out", "{tmp}/x.svg"], r"x\.svg: the picture is a PNG"),
        (["plot", "{run}", "{run}", "--out", "{tmp}/x.png"], "is given twice"),
        (["plot", "{tmp}/no", "--out", "{tmp}/x.png"], "no: no such run folder or log"),
        (["plot", "{tmp}", "--out", "{tmp}/x.png"], r"log\.jsonl: no such log"),
        (["plot", "{run}/config.toml", "--out", "{tmp}/x.png"], r"config\.toml, line 1: this is not a step record"),
        (["data", "inspect", "{tmp}/no"], "no: no such data folder or shard"),
        (["data", "inspect", "{tmp}"], "the folder holds no"),
        (["data", "inspect", "{run}/config.toml"], "a shard starts with a header|the first header field"),
        (["data", "prepare", "--out", "{tmp}/d"], "either source files or the built-in corpus"),
        (["data", "prepare", "{tmp}/no.txt", "--out", "{tmp}/d"], r"no\.txt: no such source file"),
        (["data", "prepare", "{other}", "--out", "{tmp}/d", "--workers", "1"], r"other\.model, line .* is not UTF-8"),
        (["data", "prepare", "{run}/config.toml", "--out", "{tmp}/d", "--vocab-size", "9"], "--vocab-size is 9"),
        (
            ["data", "prepare", "{run}/config.toml", "--out", "{tmp}/d", "--normalization", "nfd"],
            "normalization is 'nfd'",
        ),
        (["data", "prepare", "{run}/config.toml", "--out", "{run}/log.jsonl"], r"log\.jsonl: this is a file"),
    ],
)
def test_refusals(arguments: list[str], message: str, run: Path, other_tokenizer: Path, tmp_path: Path) -> None:
    before = files(run)
    refused(pgolf_(*(word.format(tmp=tmp_path, run=run, other=other_tokenizer) for word in arguments)), message)
    assert files(tmp_path) == {} and files(run) == before


def test_a_run_without_an_artifact(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.toml", tmp_path)
    refused(pgolf_("eval", tmp_path), "the run folder holds no artifact")
    refused(pgolf_("export", tmp_path, "--out", tmp_path / "x.pgolf"), "the run folder holds no artifact")
    checkpoint = tmp_path / "checkpoint" / "step-00000024.npz"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes((run / "checkpoint" / checkpoint.name).read_bytes()[1000:])
    refused(
        pgolf_("export", tmp_path, "--out", tmp_path / "x.pgolf"), r"step-00000024\.npz is not a whole pgolf checkpoint"
    )
    (tmp_path / "config.toml").write_text((run / "config.toml").read_text().replace("model_dim = 32", "model_dim = 64"))
    shutil.copy(run / "checkpoint" / checkpoint.name, checkpoint)
    refused(pgolf_("export", tmp_path, "--out", tmp_path / "x.pgolf"), r"step-00000024\.npz: .*has shape")
    assert not (tmp_path / "x.pgolf").exists()


def test_usage_errors() -> None:
    for words in (["eval"], ["trane"], ["train", "--no-such-option"], ["train", "--threads", "0"], ["data", "prepare"]):
        result = pgolf_(*words)
        assert result.exit_code == 2 and "Traceback" not in result.stderr and "Usage: " in result.stderr


# Failing while working


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (errors.NonFiniteError("The loss is nan."), 1, "Error: The loss is nan."),
        (errors.DeviceError("The device is gone."), 1, "Error: The device is gone."),
        (OSError(28, "No space left on device", "x.bin"), 1, "Error: x.bin: No space left on device."),
        (OSError(13, "The folder x cannot be written."), 1, "Error: The folder x cannot be written."),
        (MemoryError(), 1, "Error: The memory is not enough."),
        (ImportError("Install it."), 1, "Error: Install it."),
        (KeyError("k"), 1, "Error: an unexpected KeyError ('k'). This is a defect in pgolf; PGOLF_TRACEBACK=1"),
        (errors.FormatError("x is broken."), 2, "Error: x is broken."),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "Error: x: No such file or directory."),
        (KeyboardInterrupt(), 130, "Interrupted."),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[str]:
        raise error

    monkeypatch.setattr("pgolf.cli.recipes.recipes", fail)
    result = pgolf_("recipes")
    assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1)
    assert result.stderr.startswith(sentence) and ".." not in result.stderr


def test_developers_get_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner(env={"PGOLF_TRACEBACK": "1"}).invoke(app, ["recipes", "bass"])
    assert isinstance(result.exception, ValueError) and result.exc_info is not None


# In a process of its own


def test_exit_codes_of_the_process(run: Path, small_corpus: Path, tmp_path: Path) -> None:
    done = process("generate", run, "--max-new-tokens", 3, "--json")
    out, err = done.communicate()
    assert (done.returncode, err) == (0, "") and json.loads(out.splitlines()[-1])["prompt"] == ""
    wrong = process("train", "--recipe", "tiny", "--data", tmp_path / "no", "--run-dir", tmp_path / "run")
    out, err = wrong.communicate()
    assert (wrong.returncode, out) == (2, "") and err == f"Error: {tmp_path / 'no'}: no such data folder.\n"
    assert not (tmp_path / "run").exists()


def test_a_reader_that_leaves_the_pipe_is_no_error() -> None:
    script = textwrap.dedent("""
        import sys, pgolf.cli.recipes as verb
        verb.recipes = lambda: ["base"] * 20000
        sys.argv = ["pgolf", "recipes"]
        from pgolf.cli import main
        main()
    """)
    arguments = [sys.executable, "-c", script]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stderr is not None
        writer.stdout.readline()
        writer.stdout.close()
        assert writer.stderr.read() == ""


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, pgolf.cli.app; print([m for m in ('torch', 'matplotlib', 'sentencepiece') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Progress on a terminal


def record(step: int, seconds: float, **others: Any) -> StepRecord:
    values: dict[str, Any] = {
        "loss": 2.5,
        "lr_scale": 0.5,
        "momentum": 0.9,
        "grad_norm": 1.0,
        "tokens_per_second": 100.0,
    }
    return StepRecord(step=step, tokens=step * 10, qat=False, snapshot=False, seconds=seconds, **{**values, **others})


def terminal() -> Any:
    from rich.console import Console

    return Console(force_terminal=True, width=120, record=True, file=io.StringIO(), color_system=None)


def test_a_terminal_shows_a_bar_and_every_validation() -> None:
    console = terminal()
    train = TrainConfig(iterations=100, max_wallclock_seconds=0.0)
    with training_progress(train, console) as (show, _):
        show(record(0, 0.0, loss=None, lr_scale=None, val_loss=6.9, val_bpb=3.5))
        show(record(50, 5.0))
        show(record(100, 10.0, val_loss=2.0))
    text = console.export_text()
    assert "step 0 · validation loss 6.9000 · 3.5000 bits per byte" in text
    assert "step 100 · validation loss 2.0000\n" in text
    assert "step 100 of 100 · loss 2.5000 · 100 tokens/s · lr ×0.50 · 0.0 s left" in text


def test_under_the_bar_stands_what_the_machine_does() -> None:
    console = terminal()
    train = TrainConfig(iterations=100, max_wallclock_seconds=0.0)
    machine = {"tokens_per_second": 80.0, "share_of_limit": 0.32, "memory_mib": 9012.4, "device": "NVIDIA H200"}
    with training_progress(train, console) as (show, _):
        show(record(50, 5.0, **machine))
    text = console.export_text()  # 100 tokens/s since the start, 80 in this step
    assert re.search(r"100 tokens/s · lr ×0\.50 · 5\.0 s left *\n40\.0% of the limit · 9,012 MiB · NVIDIA H200", text)


def test_lines_end_with_the_machine(tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=40, color_system=None)
    train = TrainConfig(iterations=100, max_wallclock_seconds=0.0, train_log_every=50)
    with training_progress(train, console) as (show, _):
        show(record(0, 0.0, loss=None, lr_scale=None, tokens_per_second=None, val_loss=6.9, device="cpu avx2"))
        show(record(50, 5.0, share_of_limit=0.4, memory_mib=90.0, device="cpu avx2"))
        show(record(100, 10.0))
    assert console.file.getvalue() == (
        "step 0 · validation loss 6.9000\n"
        "step 50 of 100 · loss 2.5000 · 100 tokens/s · lr ×0.50 · 5.0 s left · 40.0% of the limit · 90 MiB · cpu avx2\n"
        "step 100 of 100 · loss 2.5000 · 100 tokens/s · lr ×0.50 · 0.0 s left\n"
    )


def test_a_stage_is_complete_when_the_next_one_begins() -> None:
    console = terminal()
    with stages(console) as show:
        show("export", 0, 1)
        show("score", 1, 4)
        show("score", 2, 4)
    text = console.export_text()
    assert re.search(r"export .* 100% ", text) and re.search(r"score .* 100% ", text)


def test_time_left_is_that_of_the_nearer_limit() -> None:
    both = TrainConfig(iterations=100, max_wallclock_seconds=60.0)
    assert seconds_left(record(0, 0.0), both) is None
    assert seconds_left(record(50, 20.0), both) == pytest.approx(20.0)
    assert seconds_left(record(50, 50.0), both) == pytest.approx(10.0)
    assert seconds_left(record(20, 61.0), both) == 0.0
    assert seconds_left(record(10, 5.0), TrainConfig(iterations=0, max_wallclock_seconds=60.0)) == pytest.approx(55.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (185, "3:05 min"),
        (3729, "1:02:09 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
