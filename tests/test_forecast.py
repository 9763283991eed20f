"""What a run will take, said before its first step, and signs of life within a step."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import pgolf.report.progress
from pgolf.cli.train import slow_run
from pgolf.config import Config
from pgolf.report.progress import training_progress
from pgolf.system.speed import Limit, flop_per_token
from pgolf.training.forecast import forecast
from pgolf.training.trainer import Trainer
from tests.runs import pgolf_, run, tiny

TWO_CORES = 2e11  # FLOP/s


def test_the_arithmetic_of_a_run() -> None:
    config = tiny(iterations=50, val_loss_every=10, eval__method="standard")
    token = flop_per_token(config.model, 16) / 1e6
    found = forecast(config, 1600, 1e6)
    assert found.step == pytest.approx(160 * token)
    assert found.training == pytest.approx(50 * found.step)
    assert found.scoring == pytest.approx(((4 + 5) * 1600 + 1600) * token / 3)
    assert found.run == found.training + found.scoring
    limited = forecast(tiny(iterations=50, max_wallclock_seconds=3 * found.step), 1600, 1e6)
    assert limited.training == pytest.approx(3 * found.step)
    # The first step begins in any time.
    assert forecast(tiny(max_wallclock_seconds=1e-9), 1600, 1e6).training == pytest.approx(found.step)


@pytest.mark.parametrize(("method", "tokens"), [("standard", 1600), ("sliding", 3184), ("ttt", 3 * 6400)])
def test_the_score_takes_its_windows(method: str, tokens: int) -> None:
    keys = {"eval__ttt_chunk_size": 16, "eval__ttt_eval_seq_len": 64}
    config = tiny(iterations=1, val_loss_every=0, eval__method=method, **keys)
    token = flop_per_token(config.model, 16) / 1e6
    assert forecast(config, 1600, 1e6).scoring == pytest.approx((4 * 1600 + tokens) * token / 3)


def test_base_is_slow_on_two_cores_and_tiny_is_not() -> None:
    base, small = (forecast(Config.from_recipe(name), 40_000, TWO_CORES) for name in ("base", "tiny"))
    assert base.is_slow and base.step > 300
    assert not small.is_slow and small.step < 1
    assert not forecast(Config.from_recipe("base"), 62_000_000, 7e14).is_slow  # an H100


def test_a_slow_run_is_warned_of_and_begins_all_the_same(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgolf.system.speed.known_limit", lambda device: Limit(1e3, "slow", ""))
    config = tmp_path / "config.toml"
    config.write_text(tiny(iterations=1, warmdown_iters=1).to_toml())
    result = pgolf_("train", "--config", config, "--data", small_corpus, "--no-run-dir", "--device", "cpu")
    assert result.exit_code == 0, result.output
    (warning,) = (line for line in result.stderr.splitlines() if line.startswith("Warning: "))
    assert "This run is large for this machine: a step takes at least" in warning and "--recipe tiny" in warning


def test_a_limit_is_measured_where_it_is_not_known(small_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgolf.system.speed.known_limit", lambda device: None)
    monkeypatch.setattr("pgolf.system.speed.measure_limit", lambda device: Limit(1e12, "fast", ""))
    trainer = Trainer(tiny(), small_corpus, device="cpu")
    assert slow_run(trainer) is None and trainer.limit is not None and trainer.limit.flops == 1e12


def test_a_step_and_validation_say_how_far_they_are(small_corpus: Path) -> None:
    trainer = Trainer(tiny(iterations=2, warmdown_iters=1, micro_batch_seqs=4), small_corpus, device="cpu")
    seen: list[tuple[str, int, int]] = []
    trainer.watch = lambda *call: seen.append(call)
    list(trainer)
    assert [call for call in seen if call[0] == "step 1"] == [("step 1", 4, 10), ("step 1", 8, 10), ("step 1", 10, 10)]
    assert ("validation", 124, 124) in seen
    assert run(tiny(iterations=1, warmdown_iters=1), small_corpus)[0].watch is None


def test_long_silences_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Clock:
        def monotonic(self) -> float:
            return now[0]

    monkeypatch.setattr(pgolf.report.progress, "time", Clock())
    out: Any = io.StringIO()
    with training_progress(tiny().train, Console(file=out, width=100)) as (_, watch):
        for seconds, done in ((1.0, 1), (29.0, 2), (31.0, 3), (40.0, 4), (62.0, 5)):
            now[0] = seconds
            watch("step 1", done, 96)
    assert out.getvalue() == "step 1: 3 of 96 sequences\nstep 1: 5 of 96 sequences\n"
