"""Signals in `pgolf train`: one leaves a checkpoint, from which a run goes on to the same bits; two end it at once."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pkgutil
import re
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pgolf.cli.interrupts import watched_interrupts
from pgolf.data.batches import BatchStream
from pgolf.report.inspection import checkpoint_step
from pgolf.runs import checkpoint
from pgolf.training.trainer import Trainer
from tests.runs import log_of, pgolf_

# A child that stops before the given call of a function until a line arrives on its standard input.
HELD = """
import sys
from functools import reduce
from importlib import import_module

module, path, number = sys.argv[1:4]
*outer, name = path.split(".")
owner = reduce(getattr, outer, import_module(module))
function, calls = getattr(owner, name), 0

def held(*args, **named):
    global calls
    calls += 1
    if calls == int(number):
        print("held", flush=True)
        sys.stdin.readline()
    return function(*args, **named)

setattr(owner, name, held)
sys.argv[1:4] = []
from pgolf.cli import main
main()
"""
NEXT_BATCH = ("pgolf.data.batches", "BatchStream.next")

SECONDS = 600
"""What ends a child that hangs; the busiest machine takes less for any test here."""


@contextmanager
def child(program: list[str], arguments: tuple[object, ...], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python process of its own; it is gone when the block ends, or after SECONDS."""
    process = subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        text=True,
        env={**os.environ, "PGOLF_NUM_THREADS": "1", "PGOLF_TRACEBACK": ""},
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@contextmanager
def held(where: tuple[str, str], number: int, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, which stands still before the numbered call of a function."""
    with child(["-c", HELD], (*where, number, *arguments)) as process:
        wait_for(process, "held")
        yield process


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"{text!r} never came; on standard error: {process.stderr.read()}")


def train(config: Path, data: Path, run: Path, *changes: str) -> tuple[object, ...]:
    sets = [word for change in changes for word in ("--set", f"train.{change}")]
    return ("train", "--config", config, "--data", data, "--run-dir", run, *sets)


def command_in(text: str) -> list[str]:
    """The arguments of the command that was printed to go on with, on a line of its own."""
    found = re.search(r"^To go on after step [\d,]+:\n    (pgolf train .*)\n", text, re.MULTILINE)
    found = found or re.search(r"[.)] To go on after step [\d,]+:\n    (pgolf train .*)\n", text)
    assert found is not None, text
    return shlex.split(found[1])[1:]


def assert_same_run(run: Path, other: Path) -> None:
    """Equal artifacts, weights, moments, averages and log, but for what depends on the clock."""
    assert (run / "model.pgolf").read_bytes() == (other / "model.pgolf").read_bytes()
    (arrays, values), (others, other_values) = (
        checkpoint.load(folder / "checkpoint" / "step-00000016.npz") for folder in (run, other)
    )
    assert arrays.keys() == others.keys()
    assert all(np.array_equal(array, others[name]) for name, array in arrays.items())
    assert values["position"] == other_values["position"]
    assert log_of(run) == log_of(other)


# Once


@pytest.mark.parametrize("every", [0, 4])
def test_once_leaves_a_checkpoint_and_the_command_that_goes_on(
    every: int, config_file: Path, small_corpus: Path, plain: Path, tmp_path: Path
) -> None:
    run = tmp_path / "a run"
    arguments = train(config_file, small_corpus, run, f"checkpoint_every={every}")
    with held(NEXT_BATCH, 8, *arguments) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert re.fullmatch(r"Interrupted\. To go on after step 7:\n    pgolf train --run-dir '.*a run' --resume\n", err), (
        err
    )
    assert out == "Stopping as soon as the state is whole; Ctrl-C again ends at once.\n"
    newest = checkpoint.newest(run / "checkpoint")
    assert newest is not None and newest.name == "step-00000007.npz"
    assert [record["step"] for record in log_of(run)] == list(range(8)) and not (run / "model.pgolf").exists()
    with child(["-m", "pgolf"], tuple(command_in(err))) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, ""), err
    assert re.search(r"^step 8 of 16 ", out, re.MULTILINE) and "step 7 of 16" not in out
    assert_same_run(run, plain)


def interrupt_at(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function in whose numbered call Ctrl-C arrives, before it does its work."""
    calls = 0

    def interrupted(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **named)

    return interrupted


class Interrupting:
    """A native object in the numbered call of whose method Ctrl-C arrives."""

    def __init__(self, native: Any, method: str, number: int) -> None:
        self._native = native
        setattr(self, method, interrupt_at(number, getattr(native, method)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)


@pytest.mark.parametrize(
    ("attribute", "method", "number", "kept"),
    [
        ("_native", "begin_step", 1, 0),
        ("_native", "micro_step", 4 * 6 + 3, 6),
        ("_native", "end_step", 12, 11),
        ("_native", "losses", 2, 5),  # the validation after step 5
        ("_native", "losses", 4, 15),
        ("_optimizer", "step", 7, 7),  # the trainer holds Ctrl-C back while weights change
        ("_optimizer", "step", 10, 10),  # and is to validate after that
        ("_optimizer", "step", 16, 16),
    ],
)
def test_wherever_it_comes_the_run_is_the_same(
    attribute: str, method: str, number: int, kept: int, config_file: Path, small_corpus: Path, plain: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = Trainer.__init__

    def make(self: Trainer, *args: Any, **named: Any) -> None:
        made(self, *args, **named)
        setattr(self, attribute, Interrupting(getattr(self, attribute), method, number))
        if attribute == "_native":
            self.model._native = self._native

    monkeypatch.setattr(Trainer, "__init__", make)
    result = pgolf_(*train(config_file, small_corpus, tmp_path / "run"))
    monkeypatch.undo()
    assert result.exit_code == 130, result.output
    newest = checkpoint.newest(tmp_path / "run" / "checkpoint")
    assert newest is not None and newest.name == f"step-{kept:08d}.npz"
    result = pgolf_(*command_in(result.stderr))
    assert result.exit_code == 0, result.output
    assert_same_run(tmp_path / "run", plain)


@pytest.mark.parametrize(
    ("function", "number"),
    [
        ("numpy.savez", 2),  # while the checkpoint of step 8 is written
        ("json.dumps", 9),  # a line of the log
        ("pgolf.report.progress._print_record", 9),
        ("pgolf.training.trainer.Trainer.use_average", 1),  # in the end, before the weights become their average
        ("pgolf.artifacts.artifact.load", 1),  # and after
    ],
)
def test_outside_of_the_steps_the_run_is_the_same(
    function: str, number: int, config_file: Path, small_corpus: Path, plain: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(function, interrupt_at(number, pkgutil.resolve_name(function)))
    result = pgolf_(*train(config_file, small_corpus, tmp_path / "run"))
    monkeypatch.undo()
    assert result.exit_code == 130, result.output
    result = pgolf_(*command_in(result.stderr))
    assert result.exit_code == 0, result.output
    assert_same_run(tmp_path / "run", plain)


def test_the_command_repeats_the_options_that_are_not_in_the_configuration(
    config_file: Path, small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, run = tmp_path / "my script.py", tmp_path / "run"
    code.write_text("x" * 99)
    monkeypatch.setattr(
        "pgolf.report.progress._print_record",
        interrupt_at(3, pkgutil.resolve_name("pgolf.report.progress._print_record")),
    )
    options = ("--code", code, "--threads", 1, "--device", "cpu", "--json")
    result = pgolf_(*map(str, (*train(config_file, small_corpus, run), *options)))
    monkeypatch.undo()
    command = command_in(result.stderr)
    assert command == [
        "train",
        "--run-dir",
        str(run),
        "--resume",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--code",
        str(code),
        "--json",
    ]
    result = pgolf_(*command)
    assert result.exit_code == 0 and json.loads(result.stdout.splitlines()[-1])["code_bytes"] == 99


def test_without_a_run_folder_nothing_is_kept(
    config_file: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchStream, "next", interrupt_at(3, BatchStream.next))
    result = pgolf_("train", "--config", config_file, "--data", small_corpus, "--no-run-dir")
    assert result.exit_code == 130
    assert result.stderr == "Interrupted. Nothing of the run is kept, since it has no run folder (--run-dir).\n"


@pytest.mark.parametrize(("step", "kept"), [(3, None), (7, 4)])
def test_a_checkpoint_that_cannot_be_written_then(
    step: int, kept: int | None, config_file: Path, small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def next_batch(self: BatchStream, take: Any = BatchStream.next, calls: list[int] = []) -> Any:  # noqa: B006
        calls.append(1)
        if len(calls) == step:
            monkeypatch.setattr("pgolf.runs.checkpoint.atomic_write", no_space)
            os.kill(os.getpid(), signal.SIGINT)
        return take(self)

    def no_space(path: Path) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BatchStream, "next", next_batch)
    result = pgolf_(*train(config_file, small_corpus, tmp_path / "run"))
    assert result.exit_code == 130
    path = re.escape(str(tmp_path / "run" / "checkpoint" / f"step-{step - 1:08d}.npz"))
    start = rf"Interrupted\. The checkpoint {path}, \d+ MB, cannot be written \(No space left on device\); "
    if kept is None:
        assert re.fullmatch(
            start + r"there is none before it\. There is no checkpoint to go on from\.\n", result.stderr
        )
    else:
        rest = rf"step-{kept:08d}\.npz before it is whole\. To go on after step {kept}:\n    pgolf train .*\n"
        assert re.fullmatch(start + rest, result.stderr)


def test_resuming_needs_no_recipe_and_refuses_what_is_no_run(plain: Path, tmp_path: Path) -> None:
    result = pgolf_("train", "--resume", "--run-dir", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"Error: {tmp_path}: this folder is not a run folder, as it holds no config.toml.\n"
    result = pgolf_("train", "--resume", "--run-dir", plain, "--recipe", "tiny", "--set", "train.data_path=x")
    assert result.exit_code == 2 and "x: no such data folder" in result.stderr
    result = pgolf_("train", "--resume")
    assert result.exit_code == 2 and result.stderr == "Error: --resume needs the --run-dir of the run to go on with.\n"


# Twice

SLOW_CHECKPOINT = """
import time
from pgolf.training.trainer import Trainer

def save(self):
    print("saving", flush=True)
    time.sleep(10**6)

Trainer.save_checkpoint = save
"""
# A call that is native for minutes, and does not see a signal before it ends.
LONG_STEP = """
import numpy, pgolf
from pgolf.cli.interrupts import watched_interrupts
from pgolf.data.batches import BatchStream

def next(self):
    print("native", flush=True)
    pgolf.newton_schulz(numpy.eye(256), steps=10**9)

BatchStream.next = next
"""
MAIN = """
from pgolf.cli import main
main()
"""


@pytest.mark.parametrize("program", [SLOW_CHECKPOINT, LONG_STEP], ids=["while it is saving", "in native code"])
def test_twice_ends_at_once(program: str, config_file: Path, small_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = train(config_file, small_corpus, run, "checkpoint_every=0", "iterations=1000000")
    with child(["-c", program + MAIN], arguments) as process:
        wait_for(process, "native" if program is LONG_STEP else "step 3 of")
        process.send_signal(signal.SIGINT)
        wait_for(process, "Stopping as soon" if program is LONG_STEP else "saving")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert (process.returncode, err) == (130, "\nInterrupted twice; ended at once.\n")
    assert (run / "config.toml").is_file() and checkpoint.newest(run / "checkpoint") is None


def test_the_watch_ends_with_its_block() -> None:
    console = Console(file=io.StringIO())
    handler, before = signal.getsignal(signal.SIGINT), set(threading.enumerate())
    with watched_interrupts(console):
        started = set(threading.enumerate()) - before
        assert len(started) == 1
        os.kill(os.getpid(), signal.SIGWINCH)  # another signal is no business of its
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(SECONDS)
    assert signal.getsignal(signal.SIGINT) is handler and started.isdisjoint(threading.enumerate())
    assert signal.set_wakeup_fd(-1) == -1


# On a terminal


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, process: subprocess.Popen[str], screen: int) -> None:
        self.process, self._screen = process, screen
        self.text = ""
        self._deadline = time.monotonic() + SECONDS

    def read_until(self, pattern: str) -> None:
        while not re.search(pattern, self.text):
            assert self._read(), f"{pattern!r} never came: {self.text!r}"

    def read_to_the_end(self) -> int:
        """Reads what the process writes before it ends; returns its exit code."""
        while self._read():
            pass
        return self.process.wait(SECONDS)

    def _read(self) -> bool:
        """Whether there was something to read before nobody had the terminal open any more."""
        ready, _, _ = select.select([self._screen], [], [], max(self._deadline - time.monotonic(), 0))
        assert ready and time.monotonic() < self._deadline, f"no end after {SECONDS} s: {self.text!r}"
        try:
            self.text += os.read(self._screen, 65536).decode(errors="replace")
        except OSError:  # so Linux says it
            return False
        return True

    def press_control_c(self) -> None:
        os.write(self._screen, b"\x03")


@contextmanager
def terminal(program: list[str], *arguments: object) -> Iterator[Terminal]:
    screen, keyboard = os.openpty()
    fcntl.ioctl(keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    # The shell leads a new session, so that the terminal which it opens becomes its own and Ctrl-C a signal.
    opening = 'exec <"$0" >"$0" 2>&1; echo open; exec "$@"'
    process = subprocess.Popen(
        ["/bin/sh", "-c", opening, os.ttyname(keyboard), sys.executable, *program, *map(str, arguments)],
        text=True,
        env={**os.environ, "PGOLF_NUM_THREADS": "1", "TERM": "xterm"},
        start_new_session=True,
    )
    try:
        shown = Terminal(process, screen)
        shown.read_until("open")
        os.close(keyboard)
        yield shown
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(screen)


def cursor_is_shown(text: str) -> bool:
    return text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") > -1


def test_a_terminal_shows_progress_until_ctrl_c(config_file: Path, small_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with terminal(["-m", "pgolf"], *train(config_file, small_corpus, run, "iterations=1000000")) as shown:
        shown.read_until(r"step \d+ of 1,000,000 · loss \d\.\d{4} · [\d,]+ tokens/s · lr ×1\.00 · .* left")
        shown.read_until(r"step 5 · validation loss \d\.\d{4} · \d\.\d{4} bits per byte")
        shown.press_control_c()
        assert shown.read_to_the_end() == 130
    assert "Stopping as soon as the state is whole; Ctrl-C again ends at once." in shown.text
    assert cursor_is_shown(shown.text) and "Traceback" not in shown.text
    newest = checkpoint.newest(run / "checkpoint")
    assert newest is not None and checkpoint_step(newest) >= 5
    assert f"To go on after step {checkpoint_step(newest):,}:" in shown.text
    assert command_in(shown.text.replace("\r\n", "\n")) == ["train", "--run-dir", str(run), "--resume"]


def test_a_terminal_has_its_cursor_after_ctrl_c_twice(config_file: Path, small_corpus: Path, tmp_path: Path) -> None:
    arguments = train(config_file, small_corpus, tmp_path / "run", "iterations=1000000")
    with terminal(["-c", SLOW_CHECKPOINT + MAIN], *arguments, "--set", "train.checkpoint_every=3") as shown:
        shown.read_until("saving")
        shown.press_control_c()
        shown.read_until("Stopping as soon")
        shown.press_control_c()
        assert shown.read_to_the_end() == 130
    assert cursor_is_shown(shown.text) and "Interrupted twice; ended at once." in shown.text
