"""Counts the files that a commit changed, by room: what an idea costs in this house.

    python dev/change_cost.py COMMIT [COMMIT …]

A row a commit, as a Markdown table. Files that only carry a configuration key from the table to the code that uses it
are counted apart: PLUMBING. So are tests with their reference, documents, and files that a program writes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

GENERATED = ("docs/variables.md", "docs/mutants.md")
# What a key goes through before anything reads it: its declaration, the recipes, the native structure, its way there,
# and the public scripts' variables. tests/reference/shapes.py is the reference's own table of keys.
PLUMBING = (
    "python/pgolf/config/keys.py",
    "python/pgolf/config/recipes/",
    "python/pgolf/config/environment.py",
    "python/pgolf/config/public_variables.py",
    "csrc/model/config.h",
    "csrc/bindings/model.cpp",
    "tests/reference/shapes.py",
    "tests/test_recipe_rows.py",
)
# Every operation's way to Python, which has nothing of its own: arrays in, fields of a structure out.
BINDINGS = ("csrc/bindings/", "python/pgolf/_C.pyi", "python/pgolf/ops/__init__.py", "python/pgolf/ops/calls.py")
COLUMNS = ("commit", "computes", "bindings and ops", "the key's plumbing", "tests", "documents", "what")


def room_of(file: str) -> str | None:
    """The column that a file counts in; None: a program writes it."""
    if file in GENERATED:
        return None
    if file.startswith(PLUMBING):
        return "the key's plumbing"
    if file.startswith(BINDINGS):
        return "bindings and ops"
    if file.startswith(("tests/", "dev/")):
        return "tests"
    if file.startswith(("docs/", "benchmarks/")) or file.endswith(".md"):
        return "documents"
    return "computes"


def cost(files: Iterable[str]) -> dict[str, int]:
    """{column: files} of a commit's files."""
    rooms = [room for room in map(room_of, files) if room is not None]
    return {column: rooms.count(column) for column in COLUMNS[1:-1]}


def changed(commit: str, root: Path) -> tuple[str, str, list[str]]:
    """A commit's short hash, its subject and its files; raises ValueError where there is no such commit."""
    command = ["git", "show", "--first-parent", "--name-only", "--format=%h%n%s%n", commit, "--"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git knows no commit {commit!r}: {done.stderr.strip()}")
    short, subject, *files = done.stdout.splitlines()
    return short, subject, [file for file in files if file]


def table(commits: Iterable[str], root: Path = ROOT) -> str:
    """The Markdown table, a row a commit."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for commit in commits:
        short, subject, files = changed(commit, root)
        rows.append((short, *map(str, cost(files).values()), subject))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("commits", nargs="+", metavar="COMMIT")
    try:
        print(table(parser.parse_args().commits), end="")
    except ValueError as error:
        sys.exit(f"change_cost: {error}")


if __name__ == "__main__":
    main()
