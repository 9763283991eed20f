"""SIGTERM and SIGHUP in `pgolf train` do as Ctrl-C does; a terminal that is closed loses nothing."""

from __future__ import annotations

import errno
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pgolf.cli.failures import Signalled
from pgolf.cli.interrupts import Watch
from pgolf.runs import checkpoint
from tests.runs import log_of, pgolf_
from tests.test_interrupt import (
    HELD,
    MAIN,
    NEXT_BATCH,
    SECONDS,
    SLOW_CHECKPOINT,
    Interrupting,
    assert_same_run,
    child,
    command_in,
    held,
    train,
    wait_for,
)

SIGNALS = {
    signal.SIGTERM: (143, r"Terminated \(SIGTERM\)\."),
    signal.SIGHUP: (129, r"The terminal was closed \(SIGHUP\)\."),
}


@pytest.fixture(scope="module", autouse=True)
def as_on_a_terminal() -> Iterator[None]:
    """Under nohup SIGHUP is ignored, by all children too, and pgolf leaves it so; these tests send it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in (number for number in SIGNALS if before[number] is signal.SIG_IGN):
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in SIGNALS:
        signal.signal(number, before[number])


def newest(run: Path) -> str | None:
    path = checkpoint.newest(run / "checkpoint")
    return None if path is None else path.name


@pytest.mark.parametrize("number", SIGNALS)
def test_once_leaves_a_checkpoint_and_the_command_that_goes_on(
    number: signal.Signals, config_file: Path, small_corpus: Path, plain: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, sentence = SIGNALS[number]
    with held(NEXT_BATCH, 8, *train(config_file, small_corpus, run, "checkpoint_every=0")) as process:
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == code
    assert re.fullmatch(rf"{sentence} To go on after step 7:\n    pgolf train --run-dir .*run --resume\n", err), err
    assert out == f"{number.name}: stopping as soon as the state is whole; a second signal ends at once.\n"
    assert newest(run) == "step-00000007.npz" and len(log_of(run)) == 8
    assert pgolf_(*command_in(err)).exit_code == 0
    assert_same_run(run, plain)


@pytest.mark.parametrize("method", ["micro_step", "step"])
@pytest.mark.parametrize("number", SIGNALS)
def test_wherever_it_comes_the_run_is_the_same(
    number: signal.Signals, method: str, config_file: Path, small_corpus: Path, plain: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also while weights change, which nothing may interrupt."""
    from pgolf.training.trainer import Trainer

    made, attribute, at = Trainer.__init__, "_optimizer" if method == "step" else "_native", 7
    sent = os.kill
    monkeypatch.setattr("tests.test_interrupt.os.kill", lambda process, _: sent(process, number))

    def make(self: Trainer, *args: Any, **named: Any) -> None:
        made(self, *args, **named)
        setattr(self, attribute, Interrupting(getattr(self, attribute), method, at))
        if attribute == "_native":
            self.model._native = self._native

    monkeypatch.setattr(Trainer, "__init__", make)
    result = pgolf_(*train(config_file, small_corpus, tmp_path / "run"))
    monkeypatch.undo()
    assert result.exit_code == SIGNALS[number][0], result.output
    assert newest(tmp_path / "run") == ("step-00000007.npz" if method == "step" else "step-00000001.npz")
    assert pgolf_(*command_in(result.stderr)).exit_code == 0
    assert_same_run(tmp_path / "run", plain)


def test_what_was_ignored_stays_ignored(config_file: Path, small_corpus: Path, plain: Path, tmp_path: Path) -> None:
    """As under nohup: the run goes on to its end."""
    ignoring = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)"
    )
    run = tmp_path / "run"
    with child(["-c", ignoring + HELD], (*NEXT_BATCH, 8, *train(config_file, small_corpus, run))) as process:
        wait_for(process, "held")
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate("\n")
    assert (process.returncode, err) == (0, "")
    assert_same_run(run, plain)


def test_where_ctrl_c_is_ignored_sigterm_is_not(config_file: Path, small_corpus: Path, tmp_path: Path) -> None:
    """As in the background of a script."""
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    run = tmp_path / "run"
    with child(["-c", ignoring + HELD], (*NEXT_BATCH, 8, *train(config_file, small_corpus, run))) as process:
        wait_for(process, "held")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 143 and newest(run) == "step-00000007.npz"


@pytest.mark.parametrize(
    ("first", "second", "code", "word"),
    [
        (signal.SIGTERM, signal.SIGTERM, 143, "Stopped"),
        (signal.SIGTERM, signal.SIGINT, 130, "Stopped"),
        (signal.SIGHUP, signal.SIGTERM, 143, "Stopped"),
    ],
)
def test_twice_ends_at_once(
    first: signal.Signals, second: signal.Signals, code: int, word: str, config_file: Path, small_corpus: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    arguments = train(config_file, small_corpus, tmp_path / "run", "checkpoint_every=0", "iterations=1000000")
    with child(["-c", SLOW_CHECKPOINT + MAIN], arguments) as process:
        wait_for(process, "step 3 of")
        process.send_signal(first)
        wait_for(process, "saving")
        process.send_signal(second)
        _, err = process.communicate()
    assert (process.returncode, err) == (code, f"\n{word} twice; ended at once.\n")


@pytest.mark.parametrize(("seconds", "code"), [(1e9, 143), (-1.0, 129)])
def test_hangups_close_together_are_one(
    seconds: float, code: int, config_file: Path, small_corpus: Path, tmp_path: Path
) -> None:
    """A closed terminal sends two: through its shell, and when that ends."""
    program = f"import pgolf.cli.interrupts; pgolf.cli.interrupts._HANGUP_SECONDS = {seconds}" + SLOW_CHECKPOINT + MAIN
    arguments = train(config_file, small_corpus, tmp_path / "run", "checkpoint_every=0", "iterations=1000000")
    with child(["-c", program], arguments) as process:
        wait_for(process, "step 3 of")
        process.send_signal(signal.SIGHUP)
        wait_for(process, "saving")
        process.send_signal(signal.SIGHUP)
        if code == 143:
            process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == code


def test_signals_have_their_handlers_back_after_the_block(config_file: Path, small_corpus: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *SIGNALS)}
    assert pgolf_("train", "--config", config_file, "--data", small_corpus, "--no-run-dir").exit_code == 0
    assert {number: signal.getsignal(number) for number in before} == before


# A terminal that is closed


def test_a_closed_terminal_leaves_a_checkpoint(config_file: Path, small_corpus: Path, tmp_path: Path) -> None:
    """Its session's leader ends, and everything on it is told; then writing to it fails."""
    run = tmp_path / "run"
    screen, keyboard = os.openpty()
    arguments = train(config_file, small_corpus, run, "iterations=1000000")
    # The shell leads the session; the run is its child, in the foreground of the terminal.
    script = 'exec <"$0" >"$0" 2>&1; echo open; "$@"; true'
    process = subprocess.Popen(
        ["/bin/sh", "-c", script, os.ttyname(keyboard), sys.executable, "-m", "pgolf", *map(str, arguments)],
        env={**os.environ, "PGOLF_NUM_THREADS": "1", "TERM": "xterm", "PGOLF_TRACEBACK": ""},
        start_new_session=True,
    )
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    text = b""
    try:
        while b"validation loss" not in text.partition(b"step 5")[2]:
            text += os.read(screen, 65536)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (run_id,) = map(int, children)
        handle = os.pidfd_open(run_id)
        os.close(keyboard)
        os.close(screen)
        process.wait()
        assert select.select([handle], [], [], SECONDS)[0], "the run goes on without its terminal"
        os.close(handle)
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
    step = newest(run)
    assert step is not None and int(step[5:13]) >= 5
    # The record of the last step may still have waited for its line: then the checkpoint holds it.
    assert len(log_of(run)) - int(step[5:13]) in (0, 1)


def test_a_terminal_that_fails_before_its_signal(
    config_file: Path, small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing to it fails a moment before SIGHUP comes, or where none comes."""
    monkeypatch.setattr(Watch, "hung_up", lambda self, error: getattr(error, "errno", None) == errno.EIO)
    calls = 0

    def shown(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pgolf.report.progress._print_record", shown)
    result = pgolf_(*train(config_file, small_corpus, tmp_path / "run", "checkpoint_every=0"))
    assert result.exit_code == 129
    assert newest(tmp_path / "run") == "step-00000003.npz"


def test_only_a_terminal_that_was_there_can_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr("os.isatty", lambda number: number == 1)
    watch = Watch()
    monkeypatch.setattr("os.dup2", lambda _, number: left.append(number))
    assert not watch.hung_up(OSError(errno.EIO, "a disk's"))
    assert not watch.hung_up(KeyboardInterrupt())
    monkeypatch.setattr("os.isatty", lambda number: False)
    assert not watch.hung_up(OSError(errno.ENOSPC, "full")) and not watch.stopping
    assert watch.hung_up(OSError(errno.EIO, "the terminal's")) and watch.stopping
    assert left == [1]


def test_exit_codes_are_the_shells() -> None:
    codes = {number: Signalled(number).code for number in (signal.SIGINT, *SIGNALS)}
    assert codes == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
    assert str(Signalled(signal.SIGINT)) == "Interrupted."
