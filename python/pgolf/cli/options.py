"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pgolf.config import recipes

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON, the last line of stdout.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=1024, metavar="N", help="CPU threads; default: one for each core."),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="NAME", help="cpu, cuda or cuda:1; default: the best there is.")
]
TokenizerOption = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="FILE", help="SentencePiece model; default: the run's or the data folder's."),
]
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="An artifact, or a run folder.")]


def complete_recipe(incomplete: str) -> list[str]:
    """For the shell: the built-in recipes whose names begin so."""
    return [name for name in recipes() if name.startswith(incomplete)]


def use_threads(count: int | None) -> None:
    """Set the number of native threads where the option was given."""
    if count is not None:
        from pgolf.threads import set_num_threads

        set_num_threads(count)
