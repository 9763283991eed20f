"""What a command prints: text and tables for people, one last line of JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_FILE_WIDTH = 160
"""Of tables in files and pipes, which have no width of their own."""


def console_for(as_json: bool) -> Console:
    """Where people read: standard output, or standard error where standard output is for a program."""
    from rich.console import Console

    console = Console(stderr=as_json, highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _FILE_WIDTH
    return console


def print_json(value: dict[str, Any]) -> None:
    """The machine-readable result, one line on standard output."""
    typer.echo(json.dumps(value))


def data_table(texts: Iterable[str], numbers: Iterable[str], title: str | None = None) -> Table:
    """An empty table: columns of text, then columns of numbers, which are aligned right."""
    from pgolf.cli.tables import WordTable

    table = WordTable(title, headings=True)
    for heading in texts:
        table.add_column(heading)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def key_value_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values; the values are aligned right."""
    from pgolf.cli.tables import WordTable

    table = WordTable(title, headings=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    return table


def bits(bpb: float | None) -> str:
    """Bits per byte, or a dash where there is no tokenizer to count bytes by."""
    return "–" if bpb is None else f"{bpb:.4f}"
