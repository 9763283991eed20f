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
ModelArgument = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="A run folder, an artifact, a checkpoint, or a .pt, .safetensors, .ptz file."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A TOML file in its place; it may extend a recipe."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace one value, as in train.iterations=100; repeatable."),
]


def complete_recipe(incomplete: str) -> list[str]:
    """For the shell: the built-in recipes whose names begin so."""
    return [name for name in recipes() if name.startswith(incomplete)]


def use_threads(count: int | None) -> None:
    """Set the number of native threads where the option was given."""
    if count is not None:
        from pgolf.common.threads import set_num_threads

        set_num_threads(count)


ForeignRecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        autocompletion=complete_recipe,
        help="A built-in recipe for what the file does not say: how to score it, and of a .pt or .ptz file the values "
        "of [model] that no shape tells; default: base's.",
    ),
]
