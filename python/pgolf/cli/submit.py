"""`pgolf submit`: from runs to a submission folder, or to the reason why not."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated

import typer

from pgolf.cli.check import DataOption, LimitBytesOption, TimeLimitOption, show_findings
from pgolf.cli.options import DeviceOption, JsonOption, ThreadsOption, TokenizerOption, use_threads
from pgolf.cli.output import console_for, print_json
from pgolf.common.errors import FormatError


def submit_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Run folders that differ in their seeds.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The submission to write.")],
    code: Annotated[
        Path | None,
        typer.Option(
            "--code", metavar="FILE", help="The script whose bytes count; default: train_gpt.py, here or in examples/."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="TEXT", help="Default: the folder's name.")] = None,
    author: Annotated[str | None, typer.Option("--author", metavar="TEXT", help="Default: the login name.")] = None,
    github_id: Annotated[str, typer.Option("--github-id", metavar="NAME", help="The author's.")] = "",
    blurb: Annotated[str, typer.Option("--blurb", metavar="TEXT", help="A sentence on what is new.")] = "",
    readme: Annotated[
        Path | None, typer.Option("--readme", metavar="FILE", help="Markdown that the README begins with.")
    ] = None,
    against: Annotated[
        float | None, typer.Option("--against", metavar="BPB", help="The score to beat, for a one-sided t-test.")
    ] = None,
    baseline: Annotated[
        list[Path] | None,
        typer.Option("--baseline", metavar="RUN", help="Runs to beat in its place; repeatable, same seeds are paired."),
    ] = None,
    margin: Annotated[
        float, typer.Option("--margin", metavar="NATS", help="By how much, in nats per token.", show_default=True)
    ] = 0.005,
    data: DataOption = None,
    tokenizer: TokenizerOption = None,
    limit_bytes: LimitBytesOption = 16_000_000,
    time_limit: TimeLimitOption = 600.0,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier submission.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write runs as a submission: README, submission.json, logs, script, artifacts, seeds with mean and deviation.

    Every rule is checked first, and every artifact scored again. Where one is broken or cannot be checked, nothing is
    written and the exit code is 2.

    Example: pgolf submit runs/a runs/b runs/c --out records/mine --against 1.2244
    """
    from pgolf.report.progress import stages
    from pgolf.submission import About, Refused, Settings, submit
    from pgolf.submission.writing import describe_test

    use_threads(threads)
    try:
        text = "" if readme is None else readme.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{readme}: the README's beginning is not UTF-8 ({error}).") from None
    about = About(name or out.resolve().name, author or getpass.getuser(), github_id, blurb, text)
    console = console_for(as_json)
    try:
        with stages(console) as show:
            written = submit(
                runs,
                out,
                about,
                against=against,
                baseline=baseline or (),
                margin_nats=margin,
                settings=Settings(
                    data, tokenizer, device, code, limit_bytes=limit_bytes, limit_seconds=time_limit, progress=show
                ),
                force=force,
            )
    except Refused as refused:
        show_findings(refused.report, console)
        if as_json:
            print_json({"written": None, "check": refused.report.to_dict()})
        raise
    show_findings(written.report, console)
    if written.test is not None:
        console.print(describe_test(written.test), soft_wrap=True)
    values = written.submission
    console.print(f"{out}: val_bpb {values['val_bpb']:.6f}, {values['bytes_total']:,} bytes.", soft_wrap=True)
    if as_json:
        print_json({"written": str(out), "submission": values, "check": written.report.to_dict()})
