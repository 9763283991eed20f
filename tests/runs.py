"""Small runs that several files make, what is the same about two of them, and the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner, Result

from pgolf.cli.app import app
from pgolf.common.files import file_sha256
from pgolf.config import Config
from pgolf.data.manifest import Manifest, ShardEntry, SplitEntry, TokenizerEntry
from pgolf.data.shards import read_shard, shards_of
from pgolf.data.tokenizer import Tokenizer
from pgolf.runs.records import MEASURED, StepRecord
from pgolf.scoring.audit import check_bytes, document_starts
from pgolf.training.trainer import Trainer
from tests.conftest import CORPUS_VOCAB

SMALL_MODEL = {
    "model.vocab_size": CORPUS_VOCAB,
    "model.num_layers": 2,
    "model.model_dim": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.bigram_vocab_size": 64,
    "model.bigram_dim": 16,
}
TINY = {
    "model.vocab_size": CORPUS_VOCAB,
    "model.num_layers": 2,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.bigram_vocab_size": 50,
    "model.bigram_dim": 8,
    "train.iterations": 6,
    "train.max_wallclock_seconds": 0,
    "train.train_batch_tokens": 160,
    "train.train_seq_len": 16,
    "train.grad_accum_steps": 2,
    "train.val_batch_tokens": 1000,
    "train.val_loss_every": 0,
    "train.warmdown_iters": 3,
    "train.swa_every": 1,
    "eval.eval_stride": 8,
}

# A run of 16 steps that validates and saves often: to be interrupted, and to go on to the same bits.
INTERRUPTIBLE = """
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
iterations = 16
max_wallclock_seconds = 0
train_batch_tokens = 256
train_seq_len = 64
micro_batch_seqs = 1
swa_every = 2
val_loss_every = 5
train_log_every = 1
checkpoint_every = 4
"""


def tiny(**changes: Any) -> Config:
    """A configuration; `model__`, `eval__` and `export__` lead to the other tables, plain names to [train]."""
    keys = {key.replace("__", ".") if "__" in key else f"train.{key}": value for key, value in changes.items()}
    return Config.from_recipe("tiny", {"train.warmdown_frac": 0, "model.tied_embed_init_std": 0.1, **TINY, **keys})


def run(config: Config, data: Path, **arguments: Any) -> tuple[Trainer, list[StepRecord]]:
    trainer = Trainer(config, data, **arguments)
    return trainer, list(trainer)


def assert_same_state(one: Trainer, two: Trainer) -> None:
    """Weights, moments, averages, counters and data position are equal, bit for bit."""
    (arrays, values), (others, other_values) = one.state(), two.state()
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert np.array_equal(array, others[name]), name
    timed = {"seconds", "config"}
    assert {k: v for k, v in values.items() if k not in timed} == {
        k: v for k, v in other_values.items() if k not in timed
    }


def log_of(run_dir: Path) -> list[dict[str, Any]]:
    """The log's records without what depends on clock and machine."""
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


class Clock:
    """A clock that advances whenever it is read, which a step does at its beginning and its end: it takes `pace`."""

    def __init__(self, pace: float = 1.0) -> None:
        self.now, self.pace = 0.0, pace

    def perf_counter(self) -> float:
        self.now += self.pace
        return self.now


def pgolf_(*arguments: str | Path) -> Result:
    """The command in this process."""
    return CliRunner(env={"PGOLF_TRACEBACK": "", "COLUMNS": "120"}).invoke(app, [str(word) for word in arguments])


def last_json(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return value


def files(folder: Path) -> dict[str, bytes]:
    """Every file in a folder that holds something, by its path there."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def refused(result: Result, pattern: str) -> None:
    """Exit code 2, and on standard error one message and nothing else."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1 and re.search(pattern, result.stderr), result.stderr


def declare(folder: Path) -> None:
    """Gives a folder of shards and a tokenizer pgolf's manifest."""
    (model,) = folder.glob("*.model")
    tokenizer = Tokenizer(model)
    splits = {}
    for split in ("train", "val"):
        paths = shards_of(folder, split)
        tokens = np.concatenate([read_shard(path) for path in paths])
        starts = document_starts(tokens, tokenizer.bos_id)
        text = check_bytes(tokens, tokenizer.stream_bytes(tokens), starts, tokenizer)
        entries = tuple(ShardEntry(path.name, read_shard(path).size, file_sha256(path)) for path in paths)
        splits[split] = SplitEntry(starts.size, tokens.size, text.text_bytes, text.text_bytes, 0, entries)
    Manifest("0", (), TokenizerEntry.of(tokenizer), **splits).write(folder / "manifest.json")
