"""What people watch while pgolf works: live bars on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    import os

    from pgolf.config import TrainConfig
    from pgolf.runs.records import Report, StepRecord
    from pgolf.training.trainer import Trainer

_SILENCE = 30.0  # seconds without a line, from which people wonder

ShowStage = Callable[[str, int, int], None]
"""Called as show(what, done, total); another ``what`` begins another stage."""


def run_with_progress(trainer: Trainer, console: Console, code: str | os.PathLike[str] | None = None) -> Report:
    """Train to the end of the run and finish it, with progress on ``console``; arguments as `Trainer.finish`."""
    with training_progress(trainer.config.train, console) as (show, watch):
        trainer.watch = watch
        for record in trainer:
            show(record)
        trainer.watch = None
    with stages(console) as show_stage:
        return trainer.finish(show_stage, code)


@contextmanager
def training_progress(train: TrainConfig, console: Console) -> Iterator[tuple[Callable[[StepRecord], None], ShowStage]]:
    """A function that shows step records, and one that shows what goes on before a step's record is there.

    On a terminal a bar follows the steps, and every validation leaves a line above it. Elsewhere there is a line every
    ``train_log_every`` steps and for every validation, and what goes on leaves one every half minute.
    """
    if not console.is_terminal:
        spoke = time.monotonic()

        def print_record(record: StepRecord) -> None:
            nonlocal spoke
            spoke = time.monotonic()
            _print_record(record, train, console)

        def print_stage(what: str, done: int, total: int) -> None:
            nonlocal spoke
            if time.monotonic() - spoke >= _SILENCE:
                spoke = time.monotonic()
                console.print(f"{what}: {done:,} of {total:,} sequences", soft_wrap=True)

        yield print_record, print_stage
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with _TrainingProgress(*columns, console=console) as bar:
        task = bar.add_task("training", total=1.0, status="")

        def show(record: StepRecord) -> None:
            if record.val_loss is not None:
                console.print(_validation_line(record))
            status = " · ".join(_status(record, train))
            bar.machine = " · ".join(_machine(record))
            bar.update(task, completed=_share_done(record, train), status=status)

        def show_stage(what: str, done: int, total: int) -> None:
            bar.machine = "" if done == total else f"{what}: {done:,} of {total:,} sequences"

        yield show, show_stage


class _TrainingProgress(Progress):
    """A bar, and under it a line about the machine."""

    machine = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.machine:
            yield Text(self.machine, no_wrap=True, overflow="ellipsis")


@contextmanager
def stages(console: Console) -> Iterator[ShowStage]:
    """A function that shows how far each stage of some work has come: a bar each, or where nobody watches a line each.

    A stage is complete when the next one begins.
    """
    if not console.is_terminal:
        begun: set[str] = set()

        def name_once(what: str, done: int, total: int) -> None:
            if what not in begun:
                begun.add(what)
                console.print(f"{what} …")

        yield name_once
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, int] = {}

        def complete_all() -> None:
            for task in bar.tasks:
                bar.update(task.id, completed=task.total)

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                complete_all()
                tasks[what] = bar.add_task(what)
            bar.update(bar.tasks[tasks[what]].id, completed=done, total=total)

        yield show
        complete_all()


def seconds_left(record: StepRecord, train: TrainConfig) -> float | None:
    """The time until the run's limit, whichever comes first, at the pace so far; None before there is a pace."""
    if record.step == 0:
        return None
    left = []
    if train.iterations:
        left.append((train.iterations - record.step) * record.seconds / record.step)
    if train.max_wallclock_seconds:
        left.append(train.max_wallclock_seconds - record.seconds)
    return max(min(left), 0.0)


def _share_done(record: StepRecord, train: TrainConfig) -> float:
    """The part of the run that is over, from 0 to 1, by the limit that is nearer."""
    shares = []
    if train.iterations:
        shares.append(record.step / train.iterations)
    if train.max_wallclock_seconds:
        shares.append(record.seconds / train.max_wallclock_seconds)
    return min(max(shares), 1.0)


def _status(record: StepRecord, train: TrainConfig) -> list[str]:
    """Step, loss, speed, learning-rate multiplier and time left, where they are known."""
    by_time = train.max_wallclock_seconds > 0
    status = [f"step {record.step:,}" + ("" if by_time else f" of {train.iterations:,}")]
    if record.loss is not None:
        status.append(f"loss {record.loss:.4f}")
    if record.seconds:
        status.append(f"{record.tokens / record.seconds:,.0f} tokens/s")
    if record.lr_scale is not None:
        status.append(f"lr ×{record.lr_scale:.2f}")
    left = seconds_left(record, train)
    if left is not None:
        status.append(f"{duration(left)} left")
    return status


def _machine(record: StepRecord) -> list[str]:
    """How much of which machine the run so far has used, as far as it is known."""
    share = record.share_of_limit
    if share is not None and record.tokens_per_second and record.seconds:
        share *= record.tokens / record.seconds / record.tokens_per_second
    return machine_parts(share, record.memory_mib, record.device)


def machine_parts(share_of_limit: float | None, memory_mib: float | None, device: str | None) -> list[str]:
    """A StepRecord's fields of these names as people read them, those that are known."""
    parts = []
    if share_of_limit is not None:
        parts.append(f"{share_of_limit:.1%} of the limit")
    if memory_mib is not None:
        parts.append(f"{memory_mib:,.0f} MiB")
    if device is not None:
        parts.append(device)
    return parts


def _validation_line(record: StepRecord) -> str:
    line = f"step {record.step:,} · validation loss {record.val_loss:.4f}"
    return line if record.val_bpb is None else f"{line} · {record.val_bpb:.4f} bits per byte"


def _print_record(record: StepRecord, train: TrainConfig, console: Console) -> None:
    every = train.train_log_every
    if every and record.step and record.step % every == 0:
        console.print(" · ".join(_status(record, train) + _machine(record)), soft_wrap=True)
    if record.val_loss is not None:
        console.print(_validation_line(record), soft_wrap=True)


def duration(seconds: float) -> str:
    """A time as people read it: 4.2 s, 42 s, 3:05 min, 1:02:09 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h"
