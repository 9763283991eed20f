"""`pgolf data`: from text to token shards."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pgolf.cli.failures import reported
from pgolf.cli.options import JsonOption
from pgolf.cli.output import console_for, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from pgolf.data.manifest import Manifest

data_app = typer.Typer(help="Turn text into training data: `pgolf data prepare`.", no_args_is_help=True)


def prepare_command(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The data folder to write.")],
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="SOURCES...", help="Text or JSONL files (field 'text'), plain, .gz or .zst."),
    ] = None,
    builtin: Annotated[
        bool, typer.Option("--builtin", help="Use the prose of Python's own standard library: no download.")
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", metavar="FILE", help="Use this SentencePiece model; default: train one."),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", metavar="N", help="Tokens of the tokenizer to train; default: 1024.")
    ] = None,
    normalization: Annotated[
        str | None,
        typer.Option("--normalization", metavar="NAME", help="nmt_nfkc (the default), or identity to keep every byte."),
    ] = None,
    val_docs: Annotated[
        int | None,
        typer.Option("--val-docs", metavar="N", help="The first N documents are validation; default: 5 % of them."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", metavar="N", help="Processes that encode; default: one a core.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn text into a data folder: token shards, a tokenizer and a manifest with checksums.

    Example: pgolf data prepare books.jsonl.zst --out data/books --val-docs 512
    """
    from pgolf.data.prepare import prepare
    from pgolf.progress import stages

    console = console_for(as_json)
    with stages(console) as show:
        report = prepare(
            sources or [],
            out,
            builtin=builtin,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            normalization=normalization,
            val_docs=val_docs,
            workers=workers,
            progress=lambda p: show(p.stage, p.done, p.total),
        )
    console.print(_table(report.manifest))
    if report.warning:
        console.print(report.warning, soft_wrap=True)
    console.print(f"{report.path} is ready after {report.seconds:.1f} s.", soft_wrap=True)
    if as_json:
        print_json(
            {
                "path": str(report.path),
                "seconds": report.seconds,
                "warning": report.warning,
                "manifest": asdict(report.manifest),
            }
        )


def _table(manifest: Manifest) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for heading in ("documents", "tokens", "bytes of text", "bytes per token", "shards"):
        table.add_column(heading, justify="right")
    for name, split in (("training", manifest.train), ("validation", manifest.val)):
        table.add_row(
            name,
            f"{split.documents:,}",
            f"{split.tokens:,}",
            f"{split.text_bytes:,}",
            f"{split.text_bytes / split.tokens:.2f}",
            f"{len(split.shards):,}",
        )
    return table


data_app.command("prepare")(reported(prepare_command))
