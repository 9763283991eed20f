"""What `--help` prints: plain text that is wrapped between words and nowhere else, as wide as the terminal.

Typer's own pages read help texts as markup, in which `[model]` is a style and vanishes, and cut words that are wider
than a column of a table.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from inspect import cleandoc
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pgolf.common.text import wrapped

_WIDEST_NAME = 26
"""A longer name has its text on the next line, so that short ones leave room for theirs."""


_WIDEST_PAGE = 100
"""Longer lines are hard to read."""


class Command(TyperCommand):
    """A verb with a page of ours."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        arguments = [param for param in self.params if param.param_type_name == "argument"]
        return ["[OPTIONS]", *(_name(p) if p.required else f"[{_name(p)}]" for p in arguments)]

    def format_help(self, ctx: Any, formatter: Any) -> None:  # click's classes, of which typer has a copy since 0.20
        formatter.write("\n".join(_page(self, ctx, _width())))


class Group(TyperGroup):
    """A group of verbs with a page of ours."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        verbs = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        records = [(name, verb.get_short_help_str(limit=10_000)) for name, verb in verbs if verb is not None]
        formatter.write("\n".join(_page(self, ctx, _width(), records)))


def use_pages(app: typer.Typer) -> None:
    """Gives every verb of an application, and of the groups in it, a page of ours; to be called once all are there."""
    app.info.cls = Group
    for command in app.registered_commands:
        command.cls = Command
    for group in app.registered_groups:
        if group.typer_instance is not None:
            use_pages(group.typer_instance)


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _WIDEST_PAGE)


def _page(command: Any, ctx: Any, width: int, verbs: Iterable[tuple[str, str]] = ()) -> Iterator[str]:
    usage = " ".join(["Usage:", ctx.command_path, *command.collect_usage_pieces(ctx)])
    yield from wrapped(usage, width, following=" " * len("Usage: "))
    yield from _paragraphs(command.help, width)
    shown = [param for param in command.get_params(ctx) if not getattr(param, "hidden", False)]
    arguments = [_record(param, ctx) for param in shown if param.param_type_name == "argument"]
    options = [_record(param, ctx) for param in shown if param.param_type_name == "option"]
    for title, records in (("Arguments", arguments), ("Options", options), ("Commands", verbs)):
        yield from _section(title, list(records), width)
    yield from _paragraphs(command.epilog, width)


def _record(param: Any, ctx: Any) -> tuple[str, str]:
    """A parameter's names with what stands for its value, and its text with its default."""
    text = param.get_help_record(ctx)[1]
    if param.param_type_name == "argument":
        return _name(param), text
    names = ", ".join([*sorted(param.opts, key=len), *param.secondary_opts])
    return f"{names} {param.metavar}" if param.metavar else names, text


def _name(argument: Any) -> str:
    """Without the brackets that some carry for typer's own pages: whether it may be left out, it says itself."""
    return str(argument.metavar or argument.name.upper()).strip("[]")


def _section(title: str, records: list[tuple[str, str]], width: int) -> Iterator[str]:
    if not records:
        return
    yield from ("", f"{title}:")
    column = min(max(len(name) for name, _ in records), _WIDEST_NAME) + 4
    for name, text in records:
        head = f"  {name}"
        if len(head) + 2 > column:
            yield head
            head = ""
        yield from wrapped(text, width, head.ljust(column), " " * column)


def _paragraphs(text: str | None, width: int) -> Iterator[str]:
    """Paragraphs, which empty lines part; indented lines are commands, each a line of its own."""
    for paragraph in cleandoc(text or "").split("\n\n"):
        if not paragraph.strip():
            continue
        yield ""
        if paragraph.startswith(" "):
            for line in paragraph.splitlines():
                yield from wrapped(line.strip(), width, "    ", "        ")
        else:
            yield from wrapped(" ".join(paragraph.split()), width)
