"""Ctrl-C while a run is at work: once stops it in good order, twice ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pgolf.cli.failures import INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console

_SHOW_CURSOR = b"\x1b[?25h"


@contextmanager
def watched_interrupts(console: Console) -> Iterator[None]:
    """A block, in the main thread, in which the first Ctrl-C is KeyboardInterrupt and the second ends the process.

    Python raises KeyboardInterrupt when native code returns, which can take seconds. So a thread reads the signals from
    the wakeup file descriptor, to which they are written the moment they arrive: the first is answered at once, and the
    second waits for nothing, not even for a checkpoint that is being written; files are renamed into place when they
    are whole.
    """
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    previous = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(receiver, console), name="pgolf interrupts", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(sender)  # the end of what the thread reads
        watcher.join()
        os.close(receiver)


def _watch(receiver: int, console: Console) -> None:
    seen = 0
    while received := os.read(receiver, 1):
        if received[0] != signal.SIGINT:
            continue
        seen += 1
        if seen == 1:
            console.print("Stopping as soon as the state is whole; Ctrl-C again ends at once.", soft_wrap=True)
        else:
            _end(console)


def _end(console: Console) -> None:
    # Straight to the descriptors: the main thread may hold the locks of Python's streams.
    if console.is_terminal:
        os.write(console.file.fileno(), _SHOW_CURSOR)
    os.write(2, b"\nInterrupted twice; ended at once.\n")
    os._exit(INTERRUPTED)
