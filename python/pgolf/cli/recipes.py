"""`pgolf recipes`: what there is to train."""

from __future__ import annotations

from importlib import resources
from typing import Annotated

import typer

from pgolf.cli.options import JsonOption, complete_recipe
from pgolf.cli.output import console_for, print_json
from pgolf.config import Config, recipes


def recipes_command(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", autocompletion=complete_recipe, help="The recipe to print in full; none: list all."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the built-in recipes, or print one of them in full as TOML.

    Example: pgolf recipes tiny > mine.toml
    """
    if name is not None:
        config = Config.from_recipe(name)
        if as_json:
            print_json(config.to_dict())
        else:
            typer.echo(config.to_toml(), nl=False)
        return
    described = {recipe: _description(recipe) for recipe in recipes()}
    if as_json:
        print_json(described)
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for recipe, description in described.items():
        table.add_row(recipe, description)
    console_for(as_json).print(table)


def _description(recipe: str) -> str:
    """The first sentence of the comment with which the recipe's file begins."""
    lines = (resources.files("pgolf.config") / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].removesuffix(".") + "."
