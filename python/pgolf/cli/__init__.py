"""The command `pgolf`: a verb for each thing a person does, a file for each verb.

Exit codes: 0 done, 1 failed while working, 2 the request was wrong, 130 interrupted.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line with the process's arguments; always ends in SystemExit."""
    from pgolf.cli.app import app

    app(prog_name="pgolf")
