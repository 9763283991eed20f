"""From errors to one sentence on standard error and an exit code; a traceback only for developers who ask for it."""

from __future__ import annotations

import errno
import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import typer

from pgolf.cli.typed import print_any_name, signature_of
from pgolf.cli.words import in_shell_words, options_of
from pgolf.common.errors import DeviceError, NonFiniteError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FAILED, WRONG_REQUEST, INTERRUPTED = 1, 2, 130
_SIGNALLED = 128
"""Plus a signal's number: the exit code of a process that it ended, as shells have it; 130 is Ctrl-C's."""

# What a request, its files included, can be wrong in.
_WRONG_REQUEST = (
    ValueError,
    TypeError,
    IndexError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)
# What can fail in a right request: devices, disks, arithmetic, memory, a missing optional package.
_FAILED = (OSError, DeviceError, NonFiniteError, MemoryError, ImportError)

_SIGNALS: dict[int, str] = {signal.SIGTERM: "Terminated (SIGTERM)."}
if hasattr(signal, "SIGHUP"):  # not on Windows
    _SIGNALS[signal.SIGHUP] = "The terminal was closed (SIGHUP)."


class Signalled(KeyboardInterrupt):
    """A signal asks the process to end: SIGINT, which is Ctrl-C, SIGTERM or SIGHUP."""

    def __init__(self, number: int) -> None:
        super().__init__(_SIGNALS.get(number, "Interrupted."))
        self.code = _SIGNALLED + number


class Stopped(Exception):
    """A failure or an interruption, and what to do now: ``advice``, whole sentences."""

    def __init__(self, cause: BaseException, advice: str) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.advice = advice


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose errors become exit codes, and whose warnings become sentences.

    With PGOLF_TRACEBACK=1 in the environment, errors pass through with their tracebacks.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        print_any_name()
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _show_warning
            try:
                command(*args, **options)
            except (KeyboardInterrupt, Exception) as error:
                # typer itself ends quietly where the reader of a pipe has gone.
                if isinstance(error, (typer.Exit, BrokenPipeError)) or os.environ.get("PGOLF_TRACEBACK") == "1":
                    raise
                code, sentence = _verdict(error)
                sentence = in_shell_words(sentence, options_of(command))
                with suppress(OSError):  # a terminal that is gone changes no exit code
                    typer.echo(sentence, err=True)
                raise typer.Exit(code) from None

    run.__signature__ = signature_of(command, _refuse)  # type: ignore[attr-defined]
    return run


def _refuse(sentence: str) -> None:
    typer.echo(f"Error: {sentence}", err=True)
    raise typer.Exit(WRONG_REQUEST)


@contextmanager
def requested_device() -> Iterator[None]:
    """Around the opening of a model: a device that cannot be used there was asked for in the request."""
    try:
        yield
    except DeviceError as error:
        raise ValueError(str(error)) from None


def _verdict(error: BaseException) -> tuple[int, str]:
    """The exit code and the sentence for an error."""
    if isinstance(error, Stopped):
        code, sentence = _verdict(error.cause)
        return code, f"{sentence} {error.advice}"
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "code", INTERRUPTED), str(error) or "Interrupted."
    if isinstance(error, _WRONG_REQUEST):
        return WRONG_REQUEST, f"Error: {_sentence(error)}"
    if isinstance(error, _FAILED):
        return FAILED, f"Error: {_sentence(error)}"
    return FAILED, (
        f"Error: an unexpected {type(error).__name__} ({error}). This is a defect in pgolf; PGOLF_TRACEBACK=1 in the "
        "environment shows where."
    )


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:  # the system's: "[Errno 28] No space left on device: 'x'"
        sentence = error.strerror.removesuffix(".") + "."
        if error.filename:
            return f"{os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename}: {sentence}"
        # Whatever writes a file names it (common.files.naming), or has a sentence of its own; what prints does not.
        printing = error.errno in _NO_SPACE and error.strerror == os.strerror(error.errno)
        return f"standard output: {sentence}" if printing else sentence
    if isinstance(error, MemoryError):
        return f"The memory is not enough{f': {error}' if str(error) else '.'}"
    return str(error) or f"{type(error).__name__}."


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"Warning: {message}", file=sys.stderr)
