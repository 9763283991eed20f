"""Replay: a time-limited run, repeated from its log, has the same bits on any clock; bad logs are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pgolf.training.trainer
from pgolf.common.errors import FormatError
from pgolf.config import Config, TrainConfig
from pgolf.training.replay import Replay
from pgolf.training.trainer import Trainer
from tests.runs import Clock, assert_same_state, log_of, run, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


class UnevenClock(Clock):
    """Steps of 1, 2, 3, … seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0.0

    def perf_counter(self) -> float:
        self.step += 0.5
        self.now += self.step
        return self.now


def timed(**changes: Any) -> Config:
    return tiny(
        iterations=0,
        max_wallclock_seconds=40.0,
        warmdown_iters=6,
        swa_start_frac=0.9,
        swa_every=1,
        qat_start_frac=0.6,
        muon_momentum_warmup_steps=5,
        val_loss_every=3,
        model__num_loops=1,
        model__loop_end=1,
        enable_looping_at=0.4,
        **changes,
    )


@pytest.fixture
def logged(small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Trainer, Path]:
    """A time-limited run in which everything that the clock decides changes, and its log."""
    monkeypatch.setattr(pgolf.training.trainer, "time", UnevenClock())
    trainer, records = run(timed(), small_corpus, run_dir=tmp_path / "run")
    for decision in ("qat", "snapshot", "looping"):
        assert {getattr(record, decision) for record in records[1:]} == {False, True}
    assert len({record.lr_scale for record in records[1:]}) > 3
    monkeypatch.undo()
    return trainer, tmp_path / "run" / "log.jsonl"


def test_a_replayed_run_has_the_same_bits(logged: tuple[Trainer, Path], small_corpus: Path, tmp_path: Path) -> None:
    first, log = logged
    again, _ = run(timed(replay=str(log)), small_corpus, run_dir=tmp_path / "again")
    assert_same_state(first, again)
    assert log_of(log.parent) == log_of(tmp_path / "again")
    assert again.seconds != first.seconds
    assert first.use_average() and again.use_average()
    for name, value in first.model.state_dict().items():
        assert np.array_equal(again.model.state_dict()[name], value)


def test_a_replay_can_be_replayed_and_resumed(logged: tuple[Trainer, Path], small_corpus: Path, tmp_path: Path) -> None:
    first, log = logged
    config = timed(replay=str(log))
    stopped = Trainer(config, small_corpus, run_dir=tmp_path / "again")
    for record in stopped:
        if record.step == 4:
            break
    stopped.save_checkpoint()
    resumed = Trainer(config, small_corpus, run_dir=tmp_path / "again", resume=True)
    list(resumed)
    assert_same_state(first, resumed)
    third, _ = run(timed(replay=str(tmp_path / "again" / "log.jsonl")), small_corpus)
    assert_same_state(first, third)


def test_an_iteration_limited_run_replays_too(small_corpus: Path, tmp_path: Path) -> None:
    first, _ = run(tiny(), small_corpus, run_dir=tmp_path)
    again, _ = run(tiny(replay=str(tmp_path / "log.jsonl")), small_corpus)
    assert_same_state(first, again)


# Logs -----------------------------------------------------------------------------------------------------------------

STEP = {"step": 1, "lr_scale": 1.0, "momentum": 0.9, "qat": False, "snapshot": False, "val_loss": None}


def replay(path: Path, *lines: Any) -> Replay:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return Replay(TrainConfig(replay=str(path)))


def test_replay_answers_with_the_log(tmp_path: Path) -> None:
    second = {**STEP, "step": 2, "lr_scale": 1 / 3, "momentum": 0.95, "qat": True, "snapshot": True, "val_loss": 4.0}
    schedule = replay(tmp_path / "log.jsonl", {"step": 0, "val_loss": 5.0}, STEP, second)
    assert (schedule.lr_scale(0, 7.0), schedule.lr_scale(1, 7.0)) == (1.0, 1 / 3)
    assert (schedule.momentum(0), schedule.momentum(1)) == (0.9, 0.95)
    assert (schedule.qat(0, 7.0), schedule.qat(1, 7.0)) == (False, True)
    assert (schedule.snapshot(0, 0.0), schedule.snapshot(1, 1.0)) == (False, True)
    assert [schedule.done(step, 1e9) for step in (0, 1, 2)] == [False, False, True]
    assert [schedule.validate(step, False) for step in (0, 1, 2)] == [True, False, True]
    assert schedule.validate(1, True)


def test_whole_numbers_are_numbers(tmp_path: Path) -> None:
    assert replay(tmp_path / "log.jsonl", {**STEP, "lr_scale": 1}).lr_scale(0, 0.0) == 1.0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no training step to replay"),
        ([{"step": 0, "val_loss": 1.0}], "holds no training step to replay"),
        ([STEP, "no json\n"], r"line 2 is not JSON \(.*\); expected a step record"),
        ([STEP, '{"step": 2, "lr_sc'], "line 2 is not JSON"),
        (["[1, 2]\n"], "line 1 has no step; expected a step record"),
        (["{}\n"], "line 1 has no step"),
        ([{**STEP, "step": "1"}], "line 1 has no step"),
        ([{**STEP, "step": True}], "line 1 has no step"),
        ([{**STEP, "step": 2}], "line 1: step 2; expected 1"),
        ([STEP, {**STEP, "step": 3}], "line 2: step 3; expected 2"),
        ([STEP, STEP], "line 2: step 1; expected 2"),
        ([{**STEP, "step": -1}], "line 1: step -1; expected 1"),
        ([{**STEP, "lr_scale": None}], "line 1: lr_scale is None; expected a finite number"),
        ([{**STEP, "lr_scale": "1"}], "line 1: lr_scale is '1'; expected a finite number"),
        ([{**STEP, "lr_scale": True}], "line 1: lr_scale is True; expected a finite number"),
        ([{**STEP, "momentum": float("nan")}], "line 1: momentum is nan; expected a finite number"),
        ([{**STEP, "momentum": 10**400}], "line 1: momentum is 10+; expected a finite number"),
        ([{**STEP, "lr_scale": -(10**400)}], "line 1: lr_scale is -10+; expected a finite number"),
        ([STEP, '{"step": 2, "lr_scale": ' + "9" * 5000 + "}\n"], "line 2 is not JSON"),
        ([STEP, "[" * 100_000 + "\n"], "line 2 is not JSON"),
        ([STEP, '{"step":' * 100_000 + "\n"], "line 2 is not JSON"),
        ([{**STEP, "qat": 1}], "line 1: qat is 1; expected true or false"),
        ([{k: v for k, v in STEP.items() if k != "snapshot"}], "line 1: snapshot is None; expected true or false"),
    ],
)
def test_bad_logs_are_refused(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = tmp_path / "log.jsonl"
    with pytest.raises(FormatError, match=f"{path}.*{message}"):
        replay(path, *lines)


def test_a_log_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(FormatError, match=f"{path}.*line 1 is not JSON"):
        Replay(TrainConfig(replay=str(path)))


def test_a_missing_log_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "log.jsonl", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path}, which does not exist; expected the log.jsonl of a run"):
            Replay(TrainConfig(replay=str(path)))
