"""Writes docs/variables.md: what pgolf does with each environment variable of the public training scripts.

    python dev/variables_page.py

tests/test_environment.py compares the page with pgolf.config.environment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from pgolf.config.environment import VARIABLES, Variable

PAGE = Path(__file__).parents[1] / "docs" / "variables.md"

INTRODUCTION = """\
# Environment variables

`examples/train_gpt.py` and `pgolf.config_from_environment` take the environment variables of the public
training scripts. The tables hold all that the reference `train_gpt.py`, the merged records of openai/parameter-golf and
fourteen pull requests read (`tests/data/public_variables.json`, collected by `dev/collect_variables.py`), and some that
are common elsewhere. Written by `dev/variables_page.py`; a test compares the page with the code.

A variable that looks like one of these, or begins as a script's own do (`TTT_`, `GPTQ_`, …), and is none of them has no
effect and is warned about. A machine's own variables are left alone.
"""


def page() -> str:
    """The page's text."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield INTRODUCTION
    yield "## Those that set something"
    yield ""
    yield _row("variable", "sets", "note")
    yield _row("---", "---", "---")
    for name, variable in VARIABLES.items():
        if variable.sets:
            sets = f"`{variable.sets}`" if " " not in variable.sets else variable.sets
            yield _row(f"`{name}`", sets, variable.note)
    yield ""
    yield "## Those that ask for what pgolf has not"
    yield ""
    yield "Refused, unless they hold what pgolf does anyway; the reason says which value that is. Words are read in any"
    yield "case, and 0 (off) may be empty, `false`, `no`, `off` or `none` as well."
    yield ""
    yield from _reasons((name, variable) for name, variable in VARIABLES.items() if variable.refused)
    yield ""
    yield "## Those without effect"
    yield ""
    yield "All that are set are named in one warning."
    yield ""
    yield from _reasons((name, variable) for name, variable in VARIABLES.items() if variable.without_effect)


def _reasons(variables: Iterable[tuple[str, Variable]]) -> Iterator[str]:
    names = defaultdict(list)
    for name, variable in variables:
        names[variable.note].append(f"`{name}`")
    yield _row("reason", "variables")
    yield _row("---", "---")
    for reason, having in names.items():
        yield _row(reason, ", ".join(having))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
