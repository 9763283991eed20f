"""What a person types and reads where it is not plain: empty paths, and names that are not UTF-8."""

from __future__ import annotations

import codecs
import copy
import inspect
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from typer.models import OptionInfo

_ANY_NAME = "pgolf-any-name"


def signature_of(command: Callable[..., None], refuse: Callable[[str], None]) -> inspect.Signature:
    """The signature of a command, whose paths are not empty: Path("") is the working folder, which is hardly meant.

    refuse: takes the sentence that says so, and ends the command.
    """
    signature = inspect.signature(command, eval_str=True)
    return signature.replace(parameters=[_checked(p, refuse) for p in signature.parameters.values()])


def _checked(parameter: inspect.Parameter, refuse: Callable[[str], None]) -> inspect.Parameter:
    if get_origin(parameter.annotation) is not Annotated or not _holds_paths(parameter.annotation):
        return parameter
    kind, info = get_args(parameter.annotation)
    name = info.default if isinstance(info, OptionInfo) else info.metavar.strip(".")

    def path(text: str | Path) -> Path:
        if not str(text):
            refuse(f"{name} is empty; a path is expected, as . for the working folder.")
        return Path(text)

    info = copy.copy(info)
    info.parser = path
    return parameter.replace(annotation=Annotated[kind, info])


def _holds_paths(kind: Any) -> bool:
    return kind is Path or any(map(_holds_paths, get_args(kind)))


def print_any_name() -> None:
    """Have standard output take every text: of a name that is not UTF-8 its bytes, else what it lacks as an escape."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors=_ANY_NAME)


def _as_bytes_or_escape(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(error)


codecs.register_error(_ANY_NAME, _as_bytes_or_escape)
