"""What `--help`, tables and errors look like on narrow terminals: no word is lost, and none is broken."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner, Result

from pgolf.cli.app import app
from pgolf.cli.output import console_for, data_table, key_value_table
from pgolf.common.text import wrapped


def verbs(command: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every command and group below one, by the words that call it."""
    found = {path: command}
    for name, verb in getattr(command, "commands", {}).items():
        found |= verbs(verb, (*path, name))
    return found


VERBS = verbs(get_command(app))


def at_width(columns: int, *arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": str(columns), "PGOLF_TRACEBACK": ""}).invoke(app, arguments, prog_name="pgolf")


def test_these_are_all_verbs() -> None:
    assert len(VERBS) >= 15 and {(), ("eval",), ("data",), ("data", "prepare")} <= VERBS.keys()


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("path", VERBS, ids=lambda path: " ".join(path) or "pgolf")
def test_a_page_holds_every_word_whole(path: tuple[str, ...], columns: int) -> None:
    command = VERBS[path]
    shown = at_width(columns, *path, "--help")
    assert shown.exit_code == 0
    words = shown.stdout.split()
    raw = [command.help, command.epilog, *(param.help for param in command.params)]
    raw += [re.split(r"\.(?=\s|$)", verb.help)[0] + "." for verb in getattr(command, "commands", {}).values()]
    for text in raw:
        wanted = (text or "").split()
        assert any(words[start : start + len(wanted)] == wanted for start in range(len(words) + 1)), text
    for param in command.params:
        for name in (*param.opts, *param.secondary_opts) if param.param_type_name == "option" else ():
            assert name in shown.stdout.replace(",", " ").split()
    assert all(len(line) <= columns for line in shown.stdout.splitlines())


def test_what_stands_in_brackets_is_text() -> None:
    text = " ".join(at_width(80, "eval", "--help").stdout.split())
    assert "the values of [model] that no shape tells" in text


def test_usage_names_what_may_be_left_out() -> None:
    for path, usage in (
        (("eval",), "Usage: pgolf eval [OPTIONS] MODEL"),
        (("recipes",), "Usage: pgolf recipes [OPTIONS] [NAME]"),
        (("data", "download"), "Usage: pgolf data download [OPTIONS] [VARIANT]"),
        (("plot",), "Usage: pgolf plot [OPTIONS] RUN..."),
        (("data",), "Usage: pgolf data [OPTIONS] COMMAND [ARGS]..."),
    ):
        assert at_width(80, *path, "--help").stdout.splitlines()[0] == usage


def test_commands_of_the_first_page_have_lines_of_their_own() -> None:
    lines = at_width(80, "--help").stdout.splitlines()
    assert "    pgolf train --recipe tiny --data data/demo --run-dir runs/demo" in lines


def test_usage_errors_are_plain_text() -> None:
    result = at_width(60, "eval", "model.pgolf", "--no-such-option-of-this-command-or-any-other")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert "--no-such-option-of-this-command-or-any-other" in result.stderr


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("a long-hyphened-word here", 12, ["a", "  long-hyphened-word", "  here"]),
        ("runs/a/model.pgolf", 5, ["runs/a/model.pgolf"]),
        ("", 5, [""]),
    ],
)
def test_text_is_wrapped_between_words(text: str, width: int, lines: list[str]) -> None:
    assert wrapped(text, width, following="  ") == lines


# Tables

NAME = "/home/somebody/a-long-way-down/experiments/runs/wider-than-before/checkpoint/step-00000024.npz"


def shown_at(columns: int, table: Any) -> str:
    console = Console(file=io.StringIO(), width=columns, soft_wrap=True)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120])
def test_tables_break_no_word(columns: int) -> None:
    table = data_table(("", "file", "seen"), ("bytes", "bytes of text"), title=NAME)
    sentence = "Every document's bytes are its text's, and none of them stands in a training shard."
    table.add_row(Text("passed", "green"), NAME, sentence, "1,234,567,890", "–")
    table.add_row("failed", "x", "No.", "1", "2", style="bold")
    text = shown_at(columns, table)
    words = text.replace(":", "").split()
    assert words.count(NAME) == 2 and text.startswith(NAME)
    for word in (*sentence.split(), "1,234,567,890", "passed", "failed", "text", "–"):
        assert word in words


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120])
def test_names_and_values_break_no_word(columns: int) -> None:
    text = shown_at(columns, key_value_table(NAME, [("data", NAME), ("  quantised, sliding", "4.0595")]))
    assert text.split().count(NAME) == 2 and "4.0595" in text.split()


def test_a_table_that_fits_is_as_wide_as_its_words() -> None:
    table = data_table(("tensor",), ("bytes",))
    table.add_row("tok_emb.weight", "32,768")
    assert [line.rstrip() for line in shown_at(80, table).splitlines()] == [
        "",
        " tensor           bytes",
        " ──────────────────────",
        " tok_emb.weight  32,768",
        "",
    ]


def test_sentences_go_to_the_end_of_their_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    console_for(False).print(f"The run is in {NAME}.")
    assert capsys.readouterr().out == f"The run is in {NAME}.\n"


def test_errors_are_not_folded(tmp_path: Path) -> None:
    path = tmp_path / "a-folder-of-a-rather-long-name" / "and-another-one-in-it" / "model.pgolf"
    result = at_width(40, "eval", str(path))
    assert result.exit_code == 2 and re.search(rf"^Error: {re.escape(str(path))}: ", result.stderr)
