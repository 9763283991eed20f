"""Signals while a run is at work: the first one stops it in good order, the second one ends it at once.

They are Ctrl-C, SIGTERM, which schedulers and containers send, and SIGHUP, which a terminal sends when it is closed.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from pgolf.cli.failures import Signalled

if TYPE_CHECKING:
    from rich.console import Console

_SHOW_CURSOR = b"\x1b[?25h"
_STOPPING = "stopping as soon as the state is whole; a second signal ends at once."
_HANGUP_SECONDS = 1.0
"""A terminal that is closed sends SIGHUP twice, through its shell and when that ends: within this time it is one."""


class Watch:
    """Whether the process is stopping, and its terminals, which may be closed while it works."""

    def __init__(self) -> None:
        self.stopping = False
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def hung_up(self, error: BaseException) -> bool:
        """Whether an error comes from writing to a terminal that was closed, of which SIGHUP may not have told yet.

        Then it is as if the signal had come.
        """
        closed = isinstance(error, OSError) and error.errno == errno.EIO and not all(map(os.isatty, self._terminals))
        if closed:
            self.stopping = True
            self.leave_terminals()
        return closed

    def leave_terminals(self) -> None:
        """From now on what would be written to terminals goes nowhere, since writing to a closed one fails."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number in self._terminals:
            os.dup2(nowhere, number)
        self._terminals = []
        os.close(nowhere)


@contextmanager
def watched_interrupts(console: Console) -> Iterator[Watch]:
    """A block, in the main thread, in which the first signal is a KeyboardInterrupt and the second ends the process.

    Python runs its handlers when native code returns, which can take seconds. So a thread reads the signals from the
    wakeup file descriptor, to which they are written the moment they arrive: the first is answered at once, and the
    second waits for nothing, not even for a checkpoint that is being written; files are renamed into place when they
    are whole.

    A signal that the process was started to ignore, as `nohup` does with SIGHUP, stays ignored. SIGTERM and SIGHUP go
    to whatever handles SIGINT, which the trainer replaces where it must not be interrupted.
    """
    watch = Watch()
    handled = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    before = {number: signal.getsignal(number) for number in handled}
    watched = frozenset(number for number in handled if before[number] is not signal.SIG_IGN)

    def stop(number: int, frame: FrameType | None) -> None:
        if number in watched and not watch.stopping:
            watch.stopping = True
            raise Signalled(number)

    def relay(number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGHUP", None):
            watch.leave_terminals()
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(number, frame)

    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    previous = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    watcher = threading.Thread(
        target=_watch, args=(receiver, watched, console, watch), name="pgolf interrupts", daemon=True
    )
    watcher.start()
    signal.signal(signal.SIGINT, stop)
    for number in handled:
        if number != signal.SIGINT and number in watched:
            signal.signal(number, relay)
    try:
        yield watch
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous)
        os.close(sender)  # the end of what the thread reads
        watcher.join()
        os.close(receiver)


def _watch(receiver: int, watched: frozenset[int], console: Console, watch: Watch) -> None:
    first, began = 0, 0.0
    while received := os.read(receiver, 1):
        number = received[0]
        if number not in watched:
            continue
        hangup = number == getattr(signal, "SIGHUP", None)
        if not first:
            first, began = number, time.monotonic()
            if hangup:
                watch.leave_terminals()
            with suppress(OSError):  # a terminal that is gone, before its signal has come
                console.print(_answer(number), soft_wrap=True)
        elif not (hangup and first == number and time.monotonic() - began < _HANGUP_SECONDS):
            _end(number, first, console)


def _answer(number: int) -> str:
    if number == signal.SIGINT:
        return "Stopping as soon as the state is whole; Ctrl-C again ends at once."
    return f"{signal.Signals(number).name}: {_STOPPING}"


def _end(number: int, first: int, console: Console) -> None:
    # Straight to the descriptors: the main thread may hold the locks of Python's streams.
    with suppress(OSError):
        if console.is_terminal:
            os.write(console.file.fileno(), _SHOW_CURSOR)
        word = "Interrupted" if number == first == signal.SIGINT else "Stopped"
        os.write(2, f"\n{word} twice; ended at once.\n".encode())
    os._exit(Signalled(number).code)
