"""What a command prints: text and tables for people, one last line of JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console_for(as_json: bool) -> Console:
    """Where people read: standard output, or standard error where standard output is for a program."""
    from rich.console import Console

    return Console(stderr=as_json, highlight=False, markup=False)


def print_json(value: dict[str, Any]) -> None:
    """The machine-readable result, one line on standard output."""
    typer.echo(json.dumps(value))


def key_value_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """A table of names and values; the values are aligned right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    return table


def bits(bpb: float | None) -> str:
    """Bits per byte, or a dash where there is no tokenizer to count bytes by."""
    return "–" if bpb is None else f"{bpb:.4f}"
