"""The verbs together, and what `pgolf --help` says."""

from __future__ import annotations

from typing import Annotated

import typer

from pgolf import __version__
from pgolf.cli.check import check_command
from pgolf.cli.data import data_app
from pgolf.cli.doctor import doctor_command
from pgolf.cli.evaluate import evaluate_command
from pgolf.cli.export import export_command
from pgolf.cli.failures import reported
from pgolf.cli.generate import generate_command
from pgolf.cli.inspect import inspect_command
from pgolf.cli.pages import use_pages
from pgolf.cli.plot import plot_command
from pgolf.cli.recipes import recipes_command
from pgolf.cli.submit import submit_command
from pgolf.cli.train import train_command

_FIRST_RUN = """
A first run, from text to a scored model:

    pgolf data prepare --builtin --out data/demo
    pgolf train --recipe tiny --data data/demo --run-dir runs/demo
    pgolf generate runs/demo --prompt "Return the"

`pgolf VERB --help` explains a verb's options; `pgolf --install-completion` completes them in the shell.
`pgolf doctor` says what this machine can run.

Exit codes: 0 done, 1 failed while working, 2 the request was wrong, 129 the terminal was closed, 130 interrupted,
143 terminated.
"""

app = typer.Typer(
    help="Train, squeeze and score a language model that fits in 16 MB.",
    epilog=_FIRST_RUN,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pgolf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("train")(reported(train_command))
app.command("eval")(reported(evaluate_command))
app.command("export")(reported(export_command))
app.command("generate")(reported(generate_command))
app.command("inspect")(reported(inspect_command))
app.command("plot")(reported(plot_command))
app.add_typer(data_app, name="data")
app.command("submit")(reported(submit_command))
app.command("check")(reported(check_command))
app.command("recipes")(reported(recipes_command))
app.command("doctor")(reported(doctor_command))
use_pages(app)
