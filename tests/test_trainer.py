"""The Trainer: its records and log, limits, warnings, interruptions, and the end of a run."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pgolf
import pgolf.training.trainer
from pgolf.common.errors import FormatError, NonFiniteError
from pgolf.config import Config
from pgolf.data.batches import BatchStream
from pgolf.data.folder import find_data
from pgolf.data.shards import ShardSet
from pgolf.data.tokenizer import Tokenizer
from pgolf.runs.records import Report
from pgolf.scoring.evaluation import evaluate
from pgolf.training.trainer import Trainer
from tests.conftest import CORPUS_VOCAB
from tests.runs import TINY, Clock, assert_same_state, run, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

VAL_BATCH_SEQS = TINY["train.val_batch_tokens"] // TINY["train.train_seq_len"]
"""Windows that a run's own validation computes at once; other numbers may round otherwise."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replaces the Trainer's clock: every step takes one second."""
    made = Clock()
    monkeypatch.setattr(pgolf.training.trainer, "time", made)
    return made


# Records --------------------------------------------------------------------------------------------------------------


def test_records_and_log(small_corpus: Path, tmp_path: Path, clock: Clock) -> None:
    config = tiny(val_loss_every=4, muon_momentum_warmup_steps=4, qat_start_frac=0.5)
    trainer, records = run(config, small_corpus, run_dir=tmp_path / "run")
    assert [record.step for record in records] == [0, 1, 2, 3, 4, 5, 6]
    first, *steps = records
    assert (first.loss, first.lr_scale, first.momentum, first.grad_norm, first.tokens_per_second) == (None,) * 5
    assert (first.tokens, first.seconds, first.qat, first.snapshot) == (0, 0.0, False, False)
    assert [record.tokens for record in steps] == [160, 320, 480, 640, 800, 960]
    assert [record.seconds for record in steps] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert all(record.tokens_per_second == 160.0 for record in steps)
    assert [record.lr_scale for record in steps] == [trainer.schedule.lr_scale(s, s) for s in range(6)]
    assert [record.lr_scale for record in steps] == [1.0, 1.0, 1.0, 1.0, 2 / 3, 1 / 3]
    assert [record.momentum for record in steps] == [trainer.schedule.momentum(s) for s in range(6)]
    assert [record.qat for record in steps] == [False, False, False, True, True, True]
    assert [record.snapshot for record in steps] == [False, False, False, False, False, True]
    assert [record.step for record in records if record.val_loss is not None] == [0, 4, 6]
    assert all((record.val_loss is None) == (record.val_bpb is None) for record in records)
    assert steps[0].loss == pytest.approx(first.val_loss, rel=0.05)
    assert all(record.loss is not None and record.grad_norm is not None and record.grad_norm > 0 for record in steps)

    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [asdict(record) for record in records]
    assert trainer.config == config.override({"train.data_path": str(small_corpus), "model.bos_id": 1})
    assert Config.from_toml(tmp_path / "run" / "config.toml") == trainer.config
    assert (trainer.step, trainer.tokens, trainer.seconds, trainer.done) == (6, 960, 6.0, True)
    assert trainer.model.provenance == {"steps": 6, "tokens": 960, "seed": 42}
    assert trainer.model.train_seq_len == 16
    assert list(trainer) == []


def test_the_first_step_trains_on_the_first_tokens(small_corpus: Path) -> None:
    """grad_accum_steps spans of n + 1 tokens each; the loss is the mean over all of them before the update."""
    config = tiny()
    trainer = Trainer(config, small_corpus)
    (shard,) = find_data(small_corpus).train
    spans = pgolf.read_shard(shard)[:162].astype(np.int64).reshape(2, 81)
    expected = trainer.model.loss(spans[:, :-1].reshape(10, 16), spans[:, 1:].reshape(10, 16))
    assert next(iter(trainer)).loss == pytest.approx(expected, rel=1e-6)


def test_a_learning_run_learns(small_corpus: Path) -> None:
    _, records = run(tiny(iterations=60, warmdown_iters=30, val_loss_every=60), small_corpus)
    assert records[-1].val_loss < records[0].val_loss - 0.5
    assert records[0].val_loss == pytest.approx(math.log(CORPUS_VOCAB), rel=0.1)


def test_validation_is_evaluate_on_the_validation_shards(small_corpus: Path) -> None:
    trainer, records = run(tiny(), small_corpus)
    score = evaluate(trainer.model, small_corpus, method="standard", batch_seqs=VAL_BATCH_SEQS)
    assert (records[-1].val_loss, records[-1].val_bpb) == (score.loss, score.bpb)
    assert trainer.last_validation == records[-1]


def test_validation_only_at_the_end(small_corpus: Path) -> None:
    _, records = run(tiny(val_loss_every=0), small_corpus)
    assert [record.step for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record.val_loss is not None for record in records] == [False] * 5 + [True]


def test_validation_takes_no_training_time(small_corpus: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: Trainer, model: Any = None) -> tuple[float, None]:
        clock.now += 1000.0
        return 1.0, None

    monkeypatch.setattr(Trainer, "validation_loss", slow)
    _, records = run(tiny(val_loss_every=1), small_corpus)
    assert [record.seconds for record in records] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_a_run_without_a_tokenizer_has_no_bits_per_byte(small_corpus: Path, tmp_path: Path) -> None:
    for shard in small_corpus.glob("*.bin"):
        shutil.copy(shard, tmp_path)
    trainer, records = run(tiny(), tmp_path)
    assert trainer.tokenizer is None and records[-1].val_bpb is None and records[-1].val_loss is not None


# Limits and warnings --------------------------------------------------------------------------------------------------


def test_time_limit(small_corpus: Path, clock: Clock) -> None:
    """Stops after the first step whose end is at or past the limit; the multiplier falls with the time left."""
    config = tiny(iterations=0, max_wallclock_seconds=6.5, warmdown_iters=3, qat_start_frac=0.5)
    _, records = run(config, small_corpus)
    assert [record.seconds for record in records] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert [record.lr_scale for record in records] == pytest.approx([1, 1, 1, 1, 2.5 / 3, 1.5 / 3, 0.5 / 3])
    assert [record.qat for record in records] == [False, False, False, False, True, True, True]


def test_both_limits(small_corpus: Path, clock: Clock) -> None:
    _, records = run(tiny(iterations=2, max_wallclock_seconds=100.0), small_corpus)
    assert len(records) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmdown_iters": 12}, r"multiplier at step 0 is 0\.5: .*exceeds train\.iterations = 6"),
        (
            {"iterations": 0, "max_wallclock_seconds": 10.0, "warmdown_iters": 90},
            r"multiplier at step 1 is 0\.1: .* 90 steps of 1 s each exceed the 9 s left.*train\.warmdown_frac",
        ),
    ],
)
@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_one_warning_of_a_warmdown_from_the_start(
    small_corpus: Path, clock: Clock, changes: dict[str, Any], message: str, warmup_steps: int
) -> None:
    with pytest.warns(UserWarning, match=message) as caught:
        run(tiny(warmup_steps=warmup_steps, **changes), small_corpus)
    assert len(caught) == 1


@pytest.mark.parametrize("changes", [{"warmdown_iters": 6}, {"warmdown_iters": 0}, {"warmdown_frac": 1.0}])
def test_no_warning_where_the_first_step_has_the_full_rate(small_corpus: Path, changes: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, records = run(tiny(**changes), small_corpus)
    assert records[0].lr_scale == 1.0


# How the work is cut --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 10, 64])
def test_micro_batches_only_partition_the_step(small_corpus: Path, size: int) -> None:
    whole, records = run(tiny(micro_batch_seqs=10), small_corpus)
    cut, others = run(tiny(micro_batch_seqs=size), small_corpus)
    for record, other in zip(records, others, strict=True):
        assert other.loss == pytest.approx(record.loss, rel=1e-6)
        assert other.grad_norm == pytest.approx(record.grad_norm, rel=1e-4)
    for name, value in whole.model.state_dict().items():
        np.testing.assert_allclose(cut.model.state_dict()[name], value, atol=1e-3)


def test_automatic_micro_batches(small_corpus: Path) -> None:
    """The largest of 64, 32, … 1 sequences that holds at most 8,192 tokens and no more than the step has."""
    assert Trainer(tiny(), small_corpus).micro_batch_seqs == 8
    assert Trainer(tiny(train_batch_tokens=32 * 100), small_corpus).micro_batch_seqs == 64
    assert (
        Trainer(
            tiny(train_batch_tokens=1500 * 20, train_seq_len=1500, val_batch_tokens=1500), small_corpus
        ).micro_batch_seqs
        == 4
    )
    assert Trainer(tiny(micro_batch_seqs=5), small_corpus).micro_batch_seqs == 5
    assert pgolf.training.trainer._largest((64, 8, 1), 8_192, 2, 10_000) == 1


@pytest.mark.parametrize("size", [10, 4])
def test_nothing_is_allocated_while_training(small_corpus: Path, size: int) -> None:
    """From the second step on; a partial last micro-batch and a validation in between have plans of their own."""
    config = tiny(iterations=12, micro_batch_seqs=size, val_loss_every=5, warmdown_iters=8, qat_start_frac=0.0)
    trainer = Trainer(config, small_corpus)
    counts = {record.step: trainer._native.step_allocations for record in trainer if record.step > 0}
    assert counts[1] > 0  # the counter counts
    assert {step: count for step, count in counts.items() if step > 1} == dict.fromkeys(range(2, 13), 0)


def test_priming_changes_no_bit(small_corpus: Path, tmp_path: Path) -> None:
    plain, records = run(tiny(ema_decay=0.5), small_corpus)
    primed, others = run(tiny(ema_decay=0.5, warmup_steps=3), small_corpus, run_dir=tmp_path)
    assert [record.loss for record in records] == [record.loss for record in others]
    assert_same_state(plain, primed)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6


def test_priming_leaves_no_snapshot(small_corpus: Path) -> None:
    """The whole run is below swa_start_frac, the priming steps too."""
    config = tiny(swa_start_frac=1.0, warmdown_iters=7)
    with pytest.warns(UserWarning, match="falls from the start"):
        plain, _ = run(config, small_corpus)
    with pytest.warns(UserWarning, match="falls from the start"):
        primed, _ = run(config.override({"train.warmup_steps": 2}), small_corpus)
    assert plain.snapshots == 6
    assert_same_state(plain, primed)


def test_priming_leaves_a_new_trainer(small_corpus: Path) -> None:
    trainer = Trainer(tiny(warmup_steps=2), small_corpus)
    assert (trainer.step, trainer.seconds, trainer.snapshots, trainer.model.provenance) == (0, 0.0, 0, None)
    assert_same_state(trainer, Trainer(tiny(), small_corpus))


def test_memory_table(small_corpus: Path) -> None:
    rows = dict(Trainer(tiny(), small_corpus).memory_table())
    assert {"weights", "gradients", "training arena, 8×16 tokens", "optimizer"} <= set(rows)
    assert rows["optimizer"] >= rows["weights"]


def test_repr(small_corpus: Path, tmp_path: Path, clock: Clock) -> None:
    trainer, _ = run(tiny(iterations=2, warmdown_iters=0), small_corpus, run_dir=tmp_path)
    assert repr(trainer) == f"Trainer(step 2, 2.0 s trained, {trainer.model!r}, run folder {tmp_path})"


# What goes wrong while it trains --------------------------------------------------------------------------------------


class Native:
    """A native model whose method `name` does something else at its call number `at`."""

    def __init__(self, native: Any, name: str, at: int, action: Callable[[], None]) -> None:
        self._native, self._name, self._left, self._action = native, name, at, action

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            self._left -= 1
            if self._left == 0:
                self._action()
        return getattr(self._native, name)


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("place", ["begin_step", "micro_step", "end_step"])
def test_an_interrupted_step_can_be_taken_again(small_corpus: Path, place: str) -> None:
    config = tiny(micro_batch_seqs=4)
    plain, records = run(config, small_corpus)
    trainer = Trainer(config, small_corpus)
    native = trainer._native
    trainer._native = Native(native, place, {"begin_step": 3, "micro_step": 8, "end_step": 3}[place], interrupt)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        for record in trainer:
            seen.append(record)
    assert (trainer.step, len(seen)) == (2, 2)
    trainer._native = native
    seen += list(trainer)
    assert [record.loss for record in seen] == [record.loss for record in records]
    assert_same_state(plain, trainer)


def test_an_interrupted_validation_loses_no_record(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(val_loss_every=2)
    plain, _ = run(config, small_corpus)
    trainer = Trainer(config, small_corpus, run_dir=tmp_path)
    measure = Trainer.validation_loss
    left = [3]  # the validation after step 4

    def interrupted(self: Trainer, model: Any = None) -> tuple[float, float | None]:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return measure(self, model)

    monkeypatch.setattr(Trainer, "validation_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(trainer)
    assert trainer.step == 4
    list(trainer)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [0, 1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in log if record["val_loss"] is not None] == [0, 2, 4, 6]
    assert_same_state(plain, trainer)


def test_an_interruption_waits_for_the_whole_step(small_corpus: Path, tmp_path: Path) -> None:
    """Ctrl-C while the optimizer changes the weights: the step is finished, and logged when the loop goes on."""
    config = tiny(ema_decay=0.5)
    plain, _ = run(config, small_corpus)
    trainer = Trainer(config, small_corpus, run_dir=tmp_path)
    optimizer = trainer._optimizer
    trainer._optimizer = Native(optimizer, "step", 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        list(trainer)
    trainer._optimizer = optimizer
    assert trainer.state()[1]["step"] == 3
    list(trainer)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5, 6]
    assert_same_state(plain, trainer)


def test_a_lost_device_leaves_the_last_checkpoint(small_corpus: Path, tmp_path: Path) -> None:
    """As a GPU that fails in the middle of a run: the error shows, and the run goes on from what was saved."""
    config = tiny(checkpoint_every=2)
    plain, _ = run(config, small_corpus)
    trainer = Trainer(config, small_corpus, run_dir=tmp_path)

    def lost() -> None:
        raise pgolf.DeviceError("The GPU was lost.")

    trainer._optimizer = Native(trainer._optimizer, "wait", 5, lost)
    with pytest.raises(pgolf.DeviceError, match="lost"):
        list(trainer)
    resumed = Trainer(config, small_corpus, run_dir=tmp_path, resume=True)
    assert resumed.step == 4
    list(resumed)
    assert_same_state(plain, resumed)


def test_a_loop_that_was_left_can_be_taken_up(small_corpus: Path) -> None:
    plain, _ = run(tiny(val_loss_every=2), small_corpus)
    trainer = Trainer(tiny(val_loss_every=2), small_corpus)
    steps = []
    while not trainer.done:
        for record in trainer:
            steps.append(record.step)
            if record.step % 2 == 1:
                break
    assert steps == [0, 1, 2, 3, 4, 5, 6]
    assert_same_state(plain, trainer)


def test_a_gradient_that_is_no_number_changes_nothing(small_corpus: Path) -> None:
    config = tiny(ema_decay=0.5)
    plain, _ = run(config, small_corpus)
    trainer = Trainer(config, small_corpus)
    steps = iter(trainer)
    next(steps), next(steps)
    before = trainer.state()
    name = "blocks.1.attn.proj.weight"
    weight = trainer._native.read(name)
    trainer._native.write(name, np.full_like(weight, 3e38))
    with pytest.raises(
        NonFiniteError, match=r"gradient of \S+ became NaN or infinite in step 3; no weight was changed"
    ):
        next(steps)
    trainer._native.write(name, weight)
    after = trainer.state()
    assert before[1] == after[1]
    assert all(np.array_equal(array, after[0][key]) for key, array in before[0].items())
    list(trainer)
    assert_same_state(plain, trainer)


def test_float16_ends_where_no_loss_scale_helps(small_corpus: Path, tmp_path: Path) -> None:
    """After ten overflows in a row at the least scale, which a checkpoint counts too; a run that is mended goes on."""
    config = tiny(dtype="float16", iterations=40, checkpoint_every=8)
    name = "blocks.1.attn.proj.weight"

    def ending(overflows: int, step: int) -> str:
        return (
            f"^The gradients overflowed float16 in {overflows} steps in a row, the last of them step {step}, although "
            r"the losses were scaled by 2\*\*-14, the least factor; no weight was changed by them. Set train.dtype to "
            "'bfloat16' or 'float32', or lower the learning rates.$"
        )

    trainer = Trainer(config, small_corpus, run_dir=tmp_path / "run")
    weight = trainer._native.read(name)
    trainer._native.write(name, np.full_like(weight, 3e38))
    trainer._optimizer.counts = (0, 2.0**-12, 0)
    before = trainer.model.state_dict()
    records = []
    with pytest.raises(NonFiniteError, match=ending(10, 12)):
        records.extend(trainer)  # two steps halve the scale, ten find it at its least
    assert [record.step for record in records] == list(range(1, 13)) and all(record.skipped for record in records)
    assert all(np.array_equal(array, before[key]) for key, array in trainer.model.state_dict().items())
    with pytest.raises(NonFiniteError, match=ending(11, 13)):
        list(trainer)
    resumed = Trainer(config, small_corpus, run_dir=tmp_path / "run", resume=True)
    assert resumed.step == 8
    with pytest.raises(NonFiniteError, match=ending(10, 12)):
        list(resumed)
    resumed._native.write(name, weight)
    assert not any(record.skipped for record in resumed)
    assert resumed.done and resumed._optimizer.counts == (28, 2.0**-14, 28)


def test_the_tensor_with_the_bad_gradient_is_named(small_corpus: Path) -> None:
    trainer = Trainer(tiny(), small_corpus)
    native = trainer._native
    bad = ["blocks.0.mlp.fc.weight", "smear.gate"]

    def read_grad(name: str) -> np.ndarray:
        gradient = native.read_grad(name)
        return np.full_like(gradient, np.nan) if name in bad else gradient

    trainer._native = SimpleNamespace(read_grad=read_grad)
    assert "The gradient of smear.gate became NaN" in trainer._describe_non_finite(7, False)
    bad.clear()
    assert "The gradient norm overflowed in step 7" in trainer._describe_non_finite(7, False)


# The end of a run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Report, list[str]]:
    folder = tmp_path_factory.mktemp("finished")
    trainer, _ = run(tiny(iterations=10, warmdown_iters=5, swa_start_frac=0.9), small_corpus, run_dir=folder)
    code = folder / "script.py"
    code.write_text("print('the script')\n")
    seen: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        seen.append(what)

    return trainer, trainer.finish(progress, code=code), seen


def test_report(finished: tuple[Trainer, Report, list[str]], small_corpus: Path) -> None:
    trainer, report, seen = finished
    assert list(dict.fromkeys(seen)) == ["validate", "average", "export", "validate the artifact", "score"]
    assert trainer.last_validation is not None
    assert (report.val_loss, report.val_bpb) == (trainer.last_validation.val_loss, trainer.last_validation.val_bpb)
    # The model now holds the average.
    averaged = evaluate(trainer.model, small_corpus, method="standard", batch_seqs=VAL_BATCH_SEQS)
    assert (report.val_loss_averaged, report.val_bpb_averaged) == (averaged.loss, averaged.bpb)
    assert report.val_loss_averaged != report.val_loss
    assert report.snapshots == trainer.snapshots == 4
    assert (report.steps, report.tokens, report.seconds) == (10, 1600, trainer.seconds)
    assert report.tokens_per_second == 1600 / trainer.seconds
    assert (report.parameters, report.seed, report.micro_batch_seqs) == (trainer.model.num_parameters, 42, 8)
    assert report.code_bytes == 20
    assert report.total_bytes == report.artifact_bytes + 20
    assert report.limit_bytes == 16_000_000 and report.fits
    assert report.device.split(", ")[:2] == trainer.model.description.split(", ")[:2]  # then the threads
    assert {"pgolf", "zstd", "python", "numpy"} <= set(report.versions)
    assert report.score_method == "sliding" and report.score_seconds > 0


def test_the_artifact_scores_as_reported(finished: tuple[Trainer, Report, list[str]], small_corpus: Path) -> None:
    trainer, report, _ = finished
    assert trainer.run_dir is not None
    artifact = trainer.run_dir / "model.pgolf"
    assert artifact.stat().st_size == report.artifact_bytes
    loaded = pgolf.load(artifact)
    assert (loaded.train_seq_len, loaded.provenance) == (16, {"steps": 10, "tokens": 1600, "seed": 42})
    standard = evaluate(loaded, small_corpus, method="standard", batch_seqs=VAL_BATCH_SEQS)
    assert (report.val_loss_quantised, report.val_bpb_quantised) == (standard.loss, standard.bpb)
    score = evaluate(loaded, small_corpus, method="sliding", stride=8, tail="exact")
    assert report.score_loss == pytest.approx(score.loss, rel=1e-6)
    assert report.score_bpb == pytest.approx(score.bpb, rel=1e-6)


def test_run_folder(finished: tuple[Trainer, Report, list[str]]) -> None:
    trainer, report, _ = finished
    assert trainer.run_dir is not None
    written = json.loads((trainer.run_dir / "report.json").read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert {"config.toml", "log.jsonl", "checkpoint", "model.pgolf", "report.json"} <= {
        path.name for path in trainer.run_dir.iterdir()
    }


def test_finish_without_a_run_folder_or_an_average(small_corpus: Path) -> None:
    trainer, records = run(tiny(swa_enabled=False), small_corpus)
    report = trainer.finish()
    assert (report.val_loss_averaged, report.val_bpb_averaged, report.snapshots) == (None, None, 0)
    assert (report.code_bytes, report.total_bytes) == (None, None)
    assert report.val_loss == records[-1].val_loss


def test_finish_scores_by_test_time_training(small_corpus: Path, tmp_path: Path) -> None:
    keys = {"lora_rank": 2, "lora_lr": 0.02, "chunk_size": 48, "eval_seq_len": 64, "batch_size": 5}
    ways = {f"ttt_{name}": value for name, value in keys.items()}
    config = tiny(swa_enabled=False, eval__method="ttt", **{f"eval__{name}": value for name, value in ways.items()})
    trainer, _ = run(config, small_corpus, run_dir=tmp_path)
    report = trainer.finish()
    score = evaluate(pgolf.load(tmp_path / "model.pgolf"), small_corpus, method="ttt", **ways)
    assert (report.score_method, report.score_loss, report.score_bpb) == ("ttt", score.loss, score.bpb)
    assert score.tokens == 1999 and score.bpb is not None


def test_finish_refuses_weights_that_are_no_numbers(small_corpus: Path, tmp_path: Path) -> None:
    trainer, _ = run(tiny(swa_enabled=False), small_corpus, run_dir=tmp_path)
    name = "blocks.0.mlp.fc.weight"
    trainer._native.write(name, np.full_like(trainer._native.read(name), np.nan))
    with pytest.raises(NonFiniteError):
        trainer.finish()
    assert not (tmp_path / "model.pgolf").exists() and not (tmp_path / "report.json").exists()


# What cannot be trained -----------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_refused(small_corpus: Path, tmp_path: Path) -> None:
    run(tiny(), small_corpus, run_dir=tmp_path)
    kept = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"{tmp_path} already holds a run; resume it"):
        Trainer(tiny(), small_corpus, run_dir=tmp_path)
    assert (tmp_path / "log.jsonl").read_bytes() == kept


def test_a_run_folder_that_cannot_be_made(small_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"The run folder {tmp_path}/file/run cannot be written"):
        Trainer(tiny(), small_corpus, run_dir=tmp_path / "file" / "run")


def test_data_that_does_not_fit(small_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No training data was given: pass data= or set train\.data_path"):
        Trainer(tiny())
    with pytest.raises(FileNotFoundError, match="no such data folder"):
        Trainer(tiny(), tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no \*_train_\*\.bin shard"):
        Trainer(tiny(), tmp_path)
    too_long = tiny(train_seq_len=30_000, train_batch_tokens=60_000, val_batch_tokens=30_000)
    with pytest.raises(ValueError, match=r"train_seq_len is 30,000, which needs 30,001 tokens; .* holds 20,000"):
        Trainer(too_long, small_corpus)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_seq_len": 3000, "train_batch_tokens": 6000, "val_batch_tokens": 3000},
            "The data has 1,999 targets .* standard windows of seq_len 3,000 need at least 3,000",
        ),
        ({"eval__eval_seq_len": 4000, "eval__tail": "reference"}, "4,000"),
    ],
)
def test_what_could_not_be_scored_is_not_trained(
    small_corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(tiny(**changes), small_corpus, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_vocabulary(small_corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"has 512 tokens; the model has 600"):
        Trainer(tiny(model__vocab_size=600), small_corpus)


def test_a_tokenizer_that_cannot_be_read(small_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.model"):
        Trainer(tiny(), small_corpus, tokenizer=tmp_path / "missing.model")
    (tmp_path / "broken.model").write_bytes(b"no model")
    with pytest.raises(FormatError, match=r"broken\.model"):
        Trainer(tiny(tokenizer_path=str(tmp_path / "broken.model")), small_corpus)


def test_tokens_beyond_the_vocabulary(small_corpus: Path, tmp_path: Path) -> None:
    for shard in small_corpus.glob("*.bin"):
        shutil.copy(shard, tmp_path)
    (train,) = tmp_path.glob("*_train_*.bin")
    tokens = pgolf.read_shard(train).copy()
    tokens[400] = CORPUS_VOCAB
    pgolf.write_shard(train, tokens)
    trainer = Trainer(tiny(), tmp_path)
    steps = iter(trainer)
    next(steps), next(steps)  # 324 tokens
    with pytest.raises(FormatError, match=f"{train}: token 400 is 512; a vocabulary of 512 ends at 511"):
        next(steps)
    assert trainer.step == 2


def test_an_opened_tokenizer_is_used(small_corpus: Path, tmp_path: Path) -> None:
    for shard in small_corpus.glob("*.bin"):
        shutil.copy(shard, tmp_path)
    (model,) = small_corpus.glob("*.model")
    opened = Tokenizer(model)
    trainer, records = run(tiny(), tmp_path, tokenizer=opened)
    assert trainer.tokenizer is opened
    assert records[-1].val_bpb == run(tiny(), small_corpus)[1][-1].val_bpb


def test_impossible_configurations_and_devices(small_corpus: Path) -> None:
    config = tiny()
    config.train.grad_accum_steps = 7
    with pytest.raises(ValueError, match=r"train\.train_batch_tokens = 160: must be a multiple"):
        Trainer(config, small_corpus)
    with pytest.raises(pgolf.DeviceError):
        Trainer(tiny(), small_corpus, device="cuda:99")
    with pytest.raises(ValueError, match="resume=True needs the run_dir"):
        Trainer(tiny(), small_corpus, resume=True)
    with pytest.raises(FileNotFoundError, match=r"train\.replay names .*nolog\.jsonl, which does not exist"):
        Trainer(tiny(replay="nolog.jsonl"), small_corpus)


def test_data_from_the_configuration(small_corpus: Path) -> None:
    trainer = Trainer(tiny(data_path=str(small_corpus)))
    assert trainer.data.path == small_corpus
    ids, _ = BatchStream(ShardSet(find_data(small_corpus).train), 160, 2, 16).next()
    assert ids.shape == (10, 16)
