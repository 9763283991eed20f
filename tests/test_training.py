"""Training against the float64 reference: optimizers, schedules, averaging, and a whole run on real text.

Both start at one perturbed state, at which no gradient is zero, and see the same batches (docs/spec.md §3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pgolf
import pgolf.training.trainer
from pgolf.config import Config
from pgolf.data.batches import BatchStream
from pgolf.data.folder import find_data
from pgolf.data.shards import ShardSet
from pgolf.model import GPT
from pgolf.runs.records import StepRecord
from pgolf.scoring.evaluation import evaluate
from pgolf.training.trainer import Trainer
from tests.conftest import CORPUS_VOCAB
from tests.reference import evaluate as reference_evaluate
from tests.reference import model as reference_model
from tests.reference.model import ReferenceGPT, perturb
from tests.reference.quant import quantize_state
from tests.reference.rng import init_state
from tests.reference.trainer import ReferenceTrainer, Step

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "model.vocab_size": CORPUS_VOCAB,
    "model.num_layers": 3,
    "model.model_dim": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.bigram_vocab_size": 100,
    "model.bigram_dim": 12,
    "train.iterations": 5,
    "train.max_wallclock_seconds": 0,
    "train.train_batch_tokens": 240,
    "train.train_seq_len": 24,
    "train.grad_accum_steps": 2,
    "train.val_batch_tokens": 1000,
    "train.val_loss_every": 0,
    "train.warmdown_iters": 3,
    "train.swa_enabled": False,
    "eval.eval_stride": 8,
}


def batches(config: Config, data: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    train = config.train
    shards = ShardSet(find_data(data).train, config.model.vocab_size)
    stream = BatchStream(shards, train.train_batch_tokens, train.grad_accum_steps, train.train_seq_len)
    while True:
        yield stream.next()


class Pair:
    """A Trainer and a ReferenceTrainer of one configuration at one perturbed state."""

    def __init__(self, config: Config, data: Path) -> None:
        state = perturb(init_state(config.model, config.train.seed), 1)
        self.config = config
        self.trainer = Trainer(config, data)
        self.trainer.model.load_state_dict(state)
        if config.train.ema_decay > 0:
            self.trainer._optimizer.start_ema()
        self.reference = ReferenceTrainer(config.model, config.train, state)
        self._batches = batches(config, data)

    def train(self) -> list[tuple[StepRecord, Step]]:
        """Trains both to the end."""
        return [(record, self.reference.step([next(self._batches)])) for record in self.trainer]


def assert_weights_close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float) -> None:
    """‖error‖ ≤ tolerance · ‖expected‖, tensor by tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = np.linalg.norm(found[name].astype(np.float64) - value) / max(np.linalg.norm(value), 1e-30)
        assert value.size == 0 or error <= tolerance, f"{name}: {error:.3g}"


def use_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the Trainer make a float64 model, whose only difference from the reference is the order of sums."""
    monkeypatch.setattr(
        pgolf.training.trainer, "GPT", lambda *args, **named: GPT(*args, **{**named, "dtype": "float64"})
    )


# Five steps -----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "loops from the third step on": {"model.num_loops": 2, "model.loop_end": 1, "enable_looping_at": 0.4},
    "normalised rows, Polar Express": {"muon_row_normalize": True, "muon_coefficients": "polar_express"},
    "two polynomials for five iterations": {"muon_coefficients": [(2.0, -1.5, 0.5), (3.4445, -4.7750, 2.0315)]},
    "no clip, no decay": {"grad_clip_norm": 0.0, "weight_decay": 0.0, "muon_weight_decay": 0.0},
    "tight clip, strong decay": {"grad_clip_norm": 0.01, "weight_decay": 2.0, "muon_weight_decay": 3.0},
    "clip that never acts": {"grad_clip_norm": 1e3},
    "other Adam": {"beta1": 0.7, "beta2": 0.99, "adam_eps": 1e-3},
    "momentum warm-up": {"muon_momentum_warmup_start": 0.3, "muon_momentum": 0.9, "muon_momentum_warmup_steps": 3},
    "momentum at once": {"muon_momentum_warmup_steps": 0, "muon_momentum": 0.5},
    "two Newton-Schulz steps": {"muon_backend_steps": 2},
    "cosine warmdown": {"warmdown_shape": "cosine", "warmdown_frac": 0.8},
    "rates": {"tied_embed_lr": 0.001, "matrix_lr": 0.1, "scalar_lr": 0.005},
    "micro-batches of 4, 4 and 2": {"micro_batch_seqs": 4},
    "micro-batches of 1": {"micro_batch_seqs": 1, "grad_accum_steps": 1},
    "untied": {"model.tie_embeddings": False, "embed_lr": 0.05, "head_lr": 0.02, "weight_decay": 0.5},
    "bigram as wide as the model": {"model.bigram_dim": 32},
    "no bigram": {"model.bigram_vocab_size": 0},
    "one layer": {"model.num_layers": 1, "model.smear_reset_at_bos": True, "model.bos_id": 1},
}


def variant(name: str) -> Config:
    changes = {key if "." in key else f"train.{key}": value for key, value in VARIANTS[name].items()}
    return Config.from_recipe("base", {**SMALL, **changes})


@pytest.mark.parametrize("name", VARIANTS)
def test_five_steps_in_float32(small_corpus: Path, name: str) -> None:
    pair = Pair(variant(name), small_corpus)
    start = pair.trainer.model.state_dict()
    steps = pair.train()
    assert len(steps) == 5
    for record, step in steps:
        assert record.loss == pytest.approx(step.loss, rel=1e-5)
        assert record.grad_norm == pytest.approx(step.grad_norm, rel=1e-4)
        assert (record.lr_scale, record.momentum) == pytest.approx((step.lr_scale, step.momentum), rel=1e-12)
    assert_weights_close(pair.trainer.model.state_dict(), pair.reference.state(), 1e-4)
    moved = {name: np.linalg.norm(value - start[name]) for name, value in pair.trainer.model.state_dict().items()}
    assert all(distance > 1e-3 for name, distance in moved.items() if start[name].size), moved


@pytest.mark.parametrize("name", VARIANTS)
def test_five_steps_in_float64(small_corpus: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_float64(monkeypatch)
    pair = Pair(variant(name), small_corpus)
    for record, step in pair.train():
        assert record.loss == pytest.approx(step.loss, rel=1e-12)
        assert record.grad_norm == pytest.approx(step.grad_norm, rel=1e-10)
    assert_weights_close(pair.trainer.model.state_dict(), pair.reference.state(), 1e-10)
    for name, moment in pair.reference.m.items():
        kind = "momentum" if f"momentum.{name}" in pair.trainer._optimizer.state_names() else "adam_m"
        found = pair.trainer._optimizer.read(f"{kind}.{name}").reshape(moment.shape)
        assert_weights_close({name: found}, {name: moment.numpy()}, 1e-9)


# Averaging and late QAT -----------------------------------------------------------------------------------------------


def averaging(**changes: Any) -> Config:
    return Config.from_recipe(
        "base",
        {
            **SMALL,
            "train.iterations": 12,
            "train.warmdown_iters": 8,
            "train.swa_enabled": True,
            "train.swa_start_frac": 0.7,
            "train.swa_every": 2,
            **{f"train.{key}": value for key, value in changes.items()},
        },
    )


def test_swa(small_corpus: Path) -> None:
    pair = Pair(averaging(), small_corpus)
    steps = pair.train()
    assert [record.snapshot for record, _ in steps] == [step.snapshot for _, step in steps]
    assert pair.trainer.snapshots == pair.reference.snapshots == 3
    assert_weights_close(pair.trainer.model.state_dict(), pair.reference.state(), 1e-4)
    assert pair.trainer.use_average()
    final = pair.reference.final_state()
    assert_weights_close(pair.trainer.model.state_dict(), final, 1e-4)
    assert np.linalg.norm(final["tok_emb.weight"] - pair.reference.state()["tok_emb.weight"]) > 1e-2


@pytest.mark.parametrize(
    ("changes", "taken"), [({"swa_every": 12}, 1), ({"swa_enabled": False}, 0), ({"swa_start_frac": 0.0}, 0)]
)
def test_fewer_than_two_snapshots_average_nothing(small_corpus: Path, changes: dict[str, Any], taken: int) -> None:
    trainer = Trainer(averaging(iterations=12, **changes), small_corpus)
    for _ in trainer:
        pass
    before = trainer.model.state_dict()
    assert trainer.snapshots == taken
    assert not trainer.use_average()
    assert all(np.array_equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_ema(small_corpus: Path) -> None:
    pair = Pair(averaging(ema_decay=0.8), small_corpus)
    steps = pair.train()
    assert not any(record.snapshot for record, _ in steps) and pair.trainer.snapshots == 0
    assert_weights_close(pair.trainer.model.state_dict(), pair.reference.state(), 1e-4)
    assert pair.trainer.use_average()
    assert_weights_close(pair.trainer.model.state_dict(), pair.reference.final_state(), 1e-4)


@pytest.mark.parametrize("start", [0.0, 0.4])
def test_late_qat_in_float64(small_corpus: Path, start: float, monkeypatch: pytest.MonkeyPatch) -> None:
    use_float64(monkeypatch)
    pair = Pair(averaging(iterations=5, warmdown_iters=2, qat_start_frac=start), small_corpus)
    steps = pair.train()
    assert [record.qat for record, _ in steps] == [step.qat for _, step in steps] == [s >= 5 * start for s in range(5)]
    for record, step in steps:
        assert record.loss == pytest.approx(step.loss, rel=1e-12)
    assert_weights_close(pair.trainer.model.state_dict(), pair.reference.state(), 1e-10)


def test_late_qat_trains_on_the_export_s_grid(small_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP that is exported as int6 trains on the int6 grid, and attention that is not exported on one on none."""
    use_float64(monkeypatch)
    policy = [["blocks.0.mlp.*", "fp16"], ["*.mlp.*", "int6"], ["*.attn.*", "rms:4"], ["*", "int8"]]
    config = averaging(iterations=3, warmdown_iters=2, qat_start_frac=0.0).override({"export.policy": policy})

    def clips(cfg: Any) -> dict[str, int]:
        return {name: 31 for name, clip in reference_model.qat_clips(cfg).items() if ".mlp." in name}

    monkeypatch.setattr("tests.reference.trainer.qat_clips", clips)
    pair = Pair(config, small_corpus)
    for record, step in pair.train():
        assert record.qat and record.loss == pytest.approx(step.loss, rel=1e-12)
    assert_weights_close(pair.trainer.model.state_dict(), pair.reference.state(), 1e-10)


def test_late_qat_on_the_fixed_grid(small_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_float64(monkeypatch)
    changes = {"export.policy": [["*", "int8"]], "train.qat_grid": "fixed"}
    config = averaging(iterations=2, warmdown_iters=2, qat_start_frac=0.0).override(changes)
    for record, step in Pair(config, small_corpus).train():
        assert record.qat and record.loss == pytest.approx(step.loss, rel=1e-12)


def test_late_qat_in_float32(small_corpus: Path) -> None:
    """One step, from equal weights: after it some weight rounds to another level in float32 than in float64."""
    pair = Pair(averaging(iterations=1, warmdown_iters=0, qat_start_frac=0.0), small_corpus)
    ((record, step),) = pair.train()
    assert record.qat and record.loss == pytest.approx(step.loss, rel=1e-5)
    assert_weights_close(pair.trainer.model.state_dict(), pair.reference.state(), 1e-4)


def test_threads_change_no_bit(small_corpus: Path) -> None:
    config = averaging(iterations=6, warmdown_iters=6, micro_batch_seqs=3, qat_start_frac=0.5)
    runs = []
    for threads in (1, 2):
        pgolf.set_num_threads(threads)
        trainer = Trainer(config, small_corpus)
        losses = np.array([record.loss for record in trainer])
        assert trainer.use_average()
        runs.append([losses, *trainer.model.state_dict().values()])
    assert all(np.array_equal(one, two) for one, two in zip(*runs, strict=True))


# A whole run ----------------------------------------------------------------------------------------------------------

STEPS = 120
VALIDATION_TOKENS = 12_289  # 48 windows


def test_120_steps_on_real_text(corpus: Path, tmp_path: Path) -> None:
    """4 layers of width 128, T 256: momentum warm-up, clipping, warmdown and SWA; then pruning and int5/int6."""
    config = Config.from_recipe(
        "base",
        {
            "model.vocab_size": CORPUS_VOCAB,
            "model.num_layers": 4,
            "model.model_dim": 128,
            "model.num_heads": 4,
            "model.num_kv_heads": 2,
            "model.bigram_vocab_size": 1024,
            "model.bigram_dim": 64,
            "train.iterations": STEPS,
            "train.max_wallclock_seconds": 0,
            "train.train_batch_tokens": 2048,
            "train.train_seq_len": 256,
            "train.grad_accum_steps": 2,
            "train.micro_batch_seqs": 3,
            "train.val_batch_tokens": 8192,
            "train.val_loss_every": 0,
            "train.muon_momentum_warmup_steps": 60,
            "train.warmdown_iters": 50,
            "train.swa_every": 5,
        },
    )
    pair = Pair(config, corpus)
    steps = pair.train()
    assert len(steps) == STEPS
    errors = [abs(record.loss - step.loss) / step.loss for record, step in steps if record.loss is not None]
    assert max(errors) <= 1e-5, f"step {np.argmax(errors) + 1}: {max(errors):.3g}"
    assert steps[-1][1].loss < 0.6 * math.log(CORPUS_VOCAB)
    assert any(record.grad_norm > config.train.grad_clip_norm for record, _ in steps)
    assert pair.trainer.snapshots == pair.reference.snapshots == 4

    assert pair.trainer.use_average()
    final = pair.reference.final_state()
    assert_weights_close(pair.trainer.model.state_dict(), final, 1e-3)

    pgolf.export(pair.trainer.model, tmp_path / "model.pgolf", policy="base")
    loaded = pgolf.load(tmp_path / "model.pgolf")
    export = config.export
    quantised, encodings = quantize_state(final, export.policy, export.small_numel, export.prune)
    assert {"int5", "int6", "fp16"} <= set(encodings.values())
    (shard,) = find_data(corpus).val
    validation = pgolf.read_shard(shard)[:VALIDATION_TOKENS]
    windows = reference_evaluate.standard_windows(validation.size - 1, 256)
    for model, state in ((pair.trainer.model, final), (loaded, quantised)):
        expected = reference_evaluate.evaluate(ReferenceGPT(config.model, state), validation, windows)
        found = evaluate(model, validation, method="standard", seq_len=256)
        assert found.tokens == expected.tokens == VALIDATION_TOKENS - 1
        assert found.loss == pytest.approx(expected.loss, rel=1e-4)
