"""`pgolf doctor`: what this machine can run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pgolf.cli.failures import FAILED
from pgolf.cli.options import JsonOption
from pgolf.cli.output import console_for, print_json

_STYLES = {"ok": "green", "limited": "yellow", "broken": "bold red"}


def doctor_command(
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure first what the device reaches at most, which steps are compared with."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine can run, why not the rest, and which command would mend it.

    The exit code is 1 where something is broken, so that pgolf cannot work at all.

    Example: pgolf doctor
    """
    from rich.text import Text

    from pgolf.system.doctor import examine

    if measure:
        from pgolf import _C
        from pgolf.model import best_device
        from pgolf.system.speed import measure_limit

        measure_limit(best_device(_C.cuda_status()))
    checks = examine(Path.cwd())
    console = console_for(as_json)
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text.assemble((f"{check.status:<8}", _STYLES[check.status]), f" {check.name:<{width}}  {check.found}")
        console.print(line, soft_wrap=True)
        if check.mend is not None:  # a line of its own, to be copied
            console.print(f"{'to mend':<8} {'':<{width}}  {check.mend}", soft_wrap=True)
    works = all(check.status != "broken" for check in checks)
    if as_json:
        print_json({"works": works, "checks": [asdict(check) for check in checks]})
    if not works:
        raise typer.Exit(FAILED)
