"""The schedules against docs/spec.md §3: hand-computed values, a literal second derivation, and properties."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pgolf.config import TrainConfig
from pgolf.training.schedule import Schedule


def timed(limit: float = 600.0, iters: int = 3000, **other: object) -> Schedule:
    return Schedule(TrainConfig(max_wallclock_seconds=limit, warmdown_iters=iters, **other))  # type: ignore[arg-type]


def counted(iterations: int = 100, iters: int = 20, **other: object) -> Schedule:
    return timed(0.0, iters, iterations=iterations, **other)


def literal_lr_scale(train: TrainConfig, s: int, t: float, timed_steps: int) -> float:
    """The formulas of docs/spec.md §3, one case after the other."""
    n, w, limit, frac = train.iterations, float(train.warmdown_iters), train.max_wallclock_seconds, train.warmdown_frac
    if limit > 0 and frac > 0:
        m = min(1.0, max(limit - t, 0.0) / (frac * limit))
    elif limit > 0:
        m = 1.0 if w <= 0 or t == 0 else min(1.0, max(limit - t, 0.0) / (w * t / max(timed_steps, 1)))
    else:
        if frac > 0:
            w = frac * n
        if w <= 0:
            m = 1.0
        elif s >= max(n - w, 0):
            m = (n - s) / w
        else:
            m = 1.0
    return 0.5 * (1 - math.cos(math.pi * m)) if train.warmdown_shape == "cosine" else m


@pytest.mark.parametrize(
    ("step", "seconds", "scale"),
    [
        (0, 0.0, 1.0),
        (1000, 100.0, 1.0),  # 3000 steps take 300 s, 500 s are left
        (3000, 300.0, 1.0),
        (4000, 400.0, 2 / 3),
        (5000, 500.0, 1 / 3),
        (5999, 599.9, 0.1 / 300),
        (6000, 600.0, 0.0),
        (6010, 601.0, 0.0),
        (0, 300.0, 300 / 900_000),  # no step finished counts as one
    ],
)
def test_time_form(step: int, seconds: float, scale: float) -> None:
    assert timed().lr_scale(step, seconds) == pytest.approx(scale, rel=1e-9)


@pytest.mark.parametrize(("step", "scale"), [(0, 1.0), (79, 1.0), (80, 1.0), (81, 0.95), (90, 0.5), (99, 0.05)])
def test_iteration_form(step: int, scale: float) -> None:
    assert counted().lr_scale(step, 1e9) == scale


def test_iteration_form_falls_from_the_start_where_the_warmdown_is_longer_than_the_run() -> None:
    assert [counted(iters=200).lr_scale(step, 0.0) for step in (0, 50, 99)] == [0.5, 0.25, 0.005]


def test_warmdown_frac_replaces_the_step_count() -> None:
    clock = timed(150.0, 3000, warmdown_frac=0.5)
    assert [clock.lr_scale(7, t) for t in (0.0, 75.0, 112.5, 150.0)] == [1.0, 1.0, 0.5, 0.0]
    steps = counted(iters=3000, warmdown_frac=0.25)
    assert [steps.lr_scale(s, 0.0) for s in (0, 75, 80, 95)] == [1.0, 1.0, 0.8, 0.2]


def test_cosine_shape() -> None:
    schedule = counted(warmdown_shape="cosine")
    assert [schedule.lr_scale(step, 0.0) for step in (0, 80, 90)] == pytest.approx([1.0, 1.0, 0.5], rel=1e-15)
    assert timed(warmdown_shape="cosine").lr_scale(4000, 400.0) == pytest.approx(0.75, rel=1e-12)


@pytest.mark.parametrize("iters", [0, -5])
def test_no_warmdown_keeps_the_full_rate(iters: int) -> None:
    assert timed(iters=iters).lr_scale(5, 599.0) == 1.0
    assert counted(iters=iters).lr_scale(99, 0.0) == 1.0


def test_a_host_that_runs_ahead_divides_by_the_steps_finished_at_its_time() -> None:
    schedule = timed(100.0, 10)
    assert schedule.lr_scale(198, 98.0, timed_steps=196) == pytest.approx(0.4, rel=1e-12)  # 10 steps take 5 s, 2 s left
    assert schedule.lr_scale(196, 98.0) == schedule.lr_scale(198, 98.0, timed_steps=196)


trains = st.builds(
    TrainConfig,
    iterations=st.integers(1, 500),
    max_wallclock_seconds=st.sampled_from([0.0, 0.5, 10.0, 600.0]),
    warmdown_iters=st.integers(-2, 700),
    warmdown_frac=st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0]),
    warmdown_shape=st.sampled_from(["linear", "cosine"]),
)


@given(trains, st.integers(0, 499), st.floats(0, 700, allow_subnormal=False), st.integers(0, 2))
def test_lr_scale_is_the_literal_formula(train: TrainConfig, step: int, seconds: float, lag: int) -> None:
    assume(step < train.iterations)
    timed_steps = max(step - lag, 0)
    found = Schedule(train).lr_scale(step, seconds, timed_steps)
    assert found == pytest.approx(literal_lr_scale(train, step, seconds, timed_steps), rel=1e-12, abs=1e-15)
    assert 0.0 <= found <= 1.0


@given(trains, st.floats(1e-3, 5.0))
def test_with_even_steps_the_rate_is_full_until_the_warmdown_and_then_only_falls(
    train: TrainConfig, pace: float
) -> None:
    schedule = Schedule(train)
    scales = [schedule.lr_scale(step, step * pace) for step in range(train.iterations + 1)]
    warmdown = train.warmdown_frac * (train.max_wallclock_seconds or train.iterations)
    if not train.warmdown_frac:
        warmdown = max(train.warmdown_iters, 0) * (pace if train.max_wallclock_seconds else 1)
    for step, (before, after) in enumerate(pairwise(scales)):
        assert after <= before + 1e-12
        left = train.max_wallclock_seconds - step * pace if train.max_wallclock_seconds else train.iterations - step
        if left > warmdown * (1 + 1e-9) or warmdown == 0:
            assert before == 1.0
        elif left < warmdown * (1 - 1e-6) and (step > 0 or not train.max_wallclock_seconds):
            assert before < 1.0


@pytest.mark.parametrize(("step", "momentum"), [(0, 0.92), (1, 0.92 + 0.07 / 1500), (750, 0.955), (1500, 0.99)])
def test_momentum_rises_linearly(step: int, momentum: float) -> None:
    assert Schedule(TrainConfig()).momentum(step) == pytest.approx(momentum, rel=1e-14)


def test_momentum_ends_exactly_at_its_end() -> None:
    assert [Schedule(TrainConfig()).momentum(step) for step in (1500, 1501, 20_000)] == [0.99] * 3
    assert Schedule(TrainConfig(muon_momentum_warmup_steps=0)).momentum(0) == 0.99


def test_late_qat_by_time_and_by_steps() -> None:
    by_time = timed(qat_start_frac=0.85)
    assert [by_time.qat(0, t) for t in (0.0, 509.9, 510.0, 599.0)] == [False, False, True, True]
    by_steps = counted(qat_start_frac=0.85)
    assert [by_steps.qat(s, 1e9) for s in (0, 84, 85, 99)] == [False, False, True, True]


def test_qat_start_frac_0_is_always_and_1_never() -> None:
    assert counted(qat_start_frac=0.0).qat(0, 0.0)
    assert timed(qat_start_frac=0.0).qat(0, 0.0)
    assert not counted(qat_start_frac=1.0).qat(99, 0.0)
    assert not timed(qat_start_frac=1.0).qat(10**6, math.nextafter(600.0, 0.0))


@pytest.mark.parametrize(
    ("step", "scale", "taken"),
    [(49, 0.39, True), (49, 0.4, False), (50, 0.39, False), (48, 0.39, False), (99, 0.0, True), (99, 1.0, False)],
)
def test_snapshots(step: int, scale: float, taken: bool) -> None:
    assert Schedule(TrainConfig(swa_start_frac=0.4, swa_every=50)).snapshot(step, scale) is taken


def test_snapshots_are_off_without_swa_and_with_an_exponential_average() -> None:
    assert not Schedule(TrainConfig(swa_enabled=False)).snapshot(49, 0.1)
    assert not Schedule(TrainConfig(ema_decay=0.99)).snapshot(49, 0.1)


def test_a_cosine_warmdown_is_compared_after_shaping() -> None:
    schedule = counted(iterations=100, iters=100, warmdown_shape="cosine", swa_start_frac=0.4, swa_every=1)
    # m = 0.45 is shaped to 0.4218, m = 0.4 to 0.3455.
    assert [schedule.snapshot(s, schedule.lr_scale(s, 0.0)) for s in (55, 60)] == [False, True]


def test_base_at_its_published_speed_takes_24_snapshots() -> None:
    schedule, pace = timed(), 600 / 6709
    taken = [s + 1 for s in range(6709) if schedule.snapshot(s, schedule.lr_scale(s, s * pace))]
    assert taken == list(range(5550, 6701, 50))  # the multiplier is below 0.4 from step 6709 - 0.4 * 3000 on


def test_done() -> None:
    assert [counted().done(s, 1e9) for s in (0, 99, 100, 101)] == [False, False, True, True]
    both = timed(600.0, iterations=100)
    assert [both.done(s, t) for s, t in ((99, 599.9), (100, 1.0), (1, 600.0))] == [False, True, True]
    assert not timed(600.0, iterations=0).done(10**6, 599.9)


def test_validation() -> None:
    every = Schedule(TrainConfig(val_loss_every=500))
    assert [every.validate(s, False) for s in (0, 1, 499, 500, 1000)] == [True, False, False, True, True]
    assert every.validate(777, True)
    at_end = Schedule(TrainConfig(val_loss_every=0))
    assert [at_end.validate(0, False), at_end.validate(500, False), at_end.validate(500, True)] == [False, False, True]


@pytest.mark.parametrize(
    ("schedule", "step", "seconds", "told"),
    [
        (timed(), 1, 0.5, ("3000 steps of 0.5 s", "599.5 s left", "train.warmdown_frac", "0.4")),
        (counted(iters=400), 0, 0.0, ("train.warmdown_iters = 400", "train.iterations = 100", "0.25")),
        (timed(warmdown_frac=1.0), 1, 6.0, ("train.warmdown_frac = 1", "0.99", "Lower")),
    ],
)
def test_early_warmdown_is_told_with_its_remedy(
    schedule: Schedule, step: int, seconds: float, told: tuple[str, ...]
) -> None:
    warning = schedule.early_warmdown(step, seconds)
    assert warning is not None
    assert [part for part in told if part not in warning] == []


def test_no_warning_at_the_full_rate_or_with_the_remedy_applied() -> None:
    assert timed().early_warmdown(0, 0.0) is None
    assert timed().early_warmdown(1, 0.1) is None
    assert timed(warmdown_frac=0.5).early_warmdown(1, 0.5) is None
    assert counted(iters=400, warmdown_frac=0.5).early_warmdown(0, 0.0) is None


def test_the_warning_divides_by_the_steps_finished_at_its_time() -> None:
    warning = timed().early_warmdown(3, 0.5, timed_steps=1)
    assert warning is not None
    assert "3000 steps of 0.5 s" in warning
    assert timed().early_warmdown(3, 0.5) is None
