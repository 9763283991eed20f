"""How far the preparation of data has come, and the bar that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One report: `done` of `total` bytes of the source files in this stage, `text_bytes` of text seen so far."""

    stage: str
    """"reading", "training the tokenizer" or "encoding"."""
    done: int
    total: int
    text_bytes: int


ProgressCallback = Callable[[Progress], None]


@contextmanager
def progress_bar() -> Iterator[ProgressCallback]:
    """A bar on standard error for each stage, with MB/s of text and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks = {}
    with Bar(*columns, console=Console(stderr=True)) as bar:

        def show(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bar.add_task(progress.stage, rate="")
            task = tasks[progress.stage]
            seconds = bar.tasks[task].elapsed or 0.0
            rate = f"{progress.text_bytes / seconds / 1e6:.1f} MB/s" if seconds > 0 and progress.text_bytes else ""
            bar.update(task, completed=progress.done, total=progress.total, rate=rate)

        yield show
