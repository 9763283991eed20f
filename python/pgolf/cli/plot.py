"""`pgolf plot`: runs over each other in one picture."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from pgolf.cli.options import JsonOption
from pgolf.cli.output import console_for, print_json


def plot_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or their log.jsonl files.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The PNG file to write.")],
    as_json: JsonOption = False,
) -> None:
    """Draw the losses of several runs over each other: training smoothed, validation as points.

    Example: pgolf plot runs/base runs/wider --out compare.png
    """
    from pgolf.report.plot import plot_runs
    from pgolf.runs.records import Curves

    if out.suffix.lower() != ".png":
        raise ValueError(f"{out}: the picture is a PNG; give it a name that ends in .png.")
    curves = {name: Curves.of(log) for name, log in _logs(runs).items()}
    plot_runs(curves, out)
    console_for(as_json).print(f"The picture is {out}.", soft_wrap=True)
    if as_json:
        last = {name: {"step": curve.last_step, **curve.last_losses} for name, curve in curves.items()}
        print_json({"out": str(out), "runs": last})


def _logs(runs: list[Path]) -> dict[str, Path]:
    """Each run's log by the run's name: its folder's, or where two folders have the same one, the whole path."""
    folders = [run if run.is_dir() else run.parent for run in runs]
    shared = Counter(folder.absolute().name for folder in folders)
    logs: dict[str, Path] = {}
    for run, folder in zip(runs, folders, strict=True):
        if not run.exists():
            raise FileNotFoundError(f"{run}: no such run folder or log.")
        name = folder.absolute().name
        name = name if shared[name] == 1 else str(run)
        if name in logs:
            raise ValueError(f"{run} is given twice.")
        logs[name] = run / "log.jsonl" if run.is_dir() else run
    return logs
