"""`pgolf check`: a run or a submission, judged by the rules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pgolf.cli.options import DeviceOption, JsonOption, ThreadsOption, TokenizerOption, use_threads
from pgolf.cli.output import console_for, data_table, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from pgolf.submission import CheckReport

_STYLES = {"passed": "green", "failed": "bold red", "unchecked": "yellow"}

DataOption = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="Data folder with shards; default: the run's.")
]
LimitBytesOption = Annotated[
    int, typer.Option("--limit-bytes", min=1, metavar="N", help="Of code and artifact together.", show_default=True)
]
TimeLimitOption = Annotated[
    float,
    typer.Option(
        "--time-limit", min=0, metavar="S", help="Seconds of training, and of scoring; 0: none.", show_default=True
    ),
]


def check_command(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run folder, or a submission, one's own or someone else's.")
    ],
    data: DataOption = None,
    tokenizer: TokenizerOption = None,
    code: Annotated[
        Path | None,
        typer.Option("--code", metavar="FILE", help="The script whose bytes count; default: the submission's."),
    ] = None,
    rescore: Annotated[
        bool, typer.Option("--rescore/--no-rescore", help="Score the artifacts again, which takes longest.")
    ] = True,
    audit: Annotated[
        str, typer.Option("--audit", metavar="sample|full", help="How thoroughly to look for trained-on documents.")
    ] = "full",
    limit_bytes: LimitBytesOption = 16_000_000,
    time_limit: TimeLimitOption = 600.0,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a run or a submission by the competition's rules, as far as its files allow.

    Every rule is passed, failed or unchecked, with a sentence that says why. Nothing in the folder is executed. The
    last line is the verdict: passed, if every rule was checked and holds; failed, if one is broken, which exits with
    2; incomplete otherwise. The JSON's verdict is the same.

    Example: pgolf check runs/demo --code train_gpt.py
    """
    from pgolf.report.progress import stages
    from pgolf.submission import Settings, check

    use_threads(threads)
    console = console_for(as_json)
    with stages(console) as show:
        report = check(
            folder,
            Settings(data, tokenizer, device, code, audit, rescore, limit_bytes, time_limit, progress=show),
        )
    show_findings(report, console)
    if as_json:
        print_json(report.to_dict())
    if report.failed:
        broken = dict.fromkeys(finding.rule for finding in report.failed)
        raise ValueError(f"{folder} breaks {len(broken)} rule{'s' * (len(broken) != 1)}: {', '.join(broken)}.")


def show_findings(report: CheckReport, console: Console) -> None:
    """Print findings as a table, where runs of which a rule says the same share a row; then counts and verdict."""
    from rich.text import Text

    from pgolf.submission.verdict import grouped

    table = data_table(("", "rule", "run", "seen"), ())
    for finding, places in grouped(report.findings):
        outcome = Text(finding.outcome, _STYLES[finding.outcome])
        table.add_row(outcome, finding.rule, ", ".join(places), finding.sentence)
    console.print(table)
    counts = f"{len(report.passed)} passed, {len(report.failed)} failed, {len(report.unchecked)} unchecked."
    console.print(f"{counts} Verdict: {report.verdict}.", soft_wrap=True)
