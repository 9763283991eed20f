"""`pgolf data`: from text to token shards, the published ones, and what is in them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pgolf.cli.failures import reported
from pgolf.cli.options import JsonOption, TokenizerOption
from pgolf.cli.output import console_for, data_table, key_value_table, print_json
from pgolf.common.errors import FormatError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pgolf.data.inspection import Counts, DataReport
    from pgolf.data.manifest import Manifest

data_app = typer.Typer(help="Prepare, download and inspect training data.", no_args_is_help=True)


def prepare_command(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The data folder to write.")],
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SOURCES...", help="Text, JSON Lines or JSON files, plain, .gz or .zst, and folders of them."
        ),
    ] = None,
    builtin: Annotated[
        bool, typer.Option("--builtin", help="Use the prose of Python's own standard library: no download.")
    ] = False,
    field: Annotated[
        str, typer.Option("--field", metavar="NAME", help="The field of a JSON object that holds its text.")
    ] = "text",
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
    from pgolf.data.preparation import prepare
    from pgolf.report.progress import stages

    console = console_for(as_json)
    with stages(console) as show:
        report = prepare(
            sources or [],
            out,
            builtin=builtin,
            field=field,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            normalization=normalization,
            val_docs=val_docs,
            workers=workers,
            progress=lambda p: show(p.stage, p.done, p.total),
        )
    console.print(_table(report.manifest))
    for sentence in (*report.notes, report.warning):
        if sentence:
            console.print(sentence, soft_wrap=True)
    console.print(f"{report.path} is ready after {report.seconds:.1f} s.", soft_wrap=True)
    if as_json:
        print_json(
            {
                "path": str(report.path),
                "seconds": report.seconds,
                "warning": report.warning,
                "notes": list(report.notes),
                "manifest": asdict(report.manifest),
            }
        )


def download_command(
    variant: Annotated[
        str, typer.Argument(metavar="[VARIANT]", help="The tokenizer's name in the export.", show_default=True)
    ] = "sp1024",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The data folder to write; default: data/VARIANT.")
    ] = None,
    train_shards: Annotated[
        int | None,
        typer.Option("--train-shards", metavar="N", help="The first N training shards, of 200 MB; default: 80."),
    ] = None,
    repo: Annotated[
        str | None, typer.Option("--repo", metavar="OWNER/NAME", help="Another dataset repository of this layout.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="NAME", help="A branch, tag or commit; default: the newest.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch the published FineWeb export: shards, their tokenizer and a manifest, every file verified.

    A download that was stopped goes on when the same command is given again. HF_ENDPOINT and HF_TOKEN in the
    environment are the hub's address and the user's token.

    Example: pgolf data download sp1024 --train-shards 1 --out data/fineweb
    """
    from pgolf.data.downloading import DEFAULT_REPO, DEFAULT_TRAIN_SHARDS, download
    from pgolf.report.progress import stages

    console = console_for(as_json)
    with stages(console) as show:
        report = download(
            variant,
            out or Path("data", variant),
            train_shards=DEFAULT_TRAIN_SHARDS if train_shards is None else train_shards,
            repo=repo or DEFAULT_REPO,
            revision=revision,
            progress=show,
        )
    console.print(_table(report.manifest))
    files = f"{report.fetched_files:,} files, {report.fetched_bytes:,} bytes"
    console.print(f"{report.path} is ready after {report.seconds:.1f} s; fetched: {files}.", soft_wrap=True)
    if as_json:
        print_json(
            {
                "path": str(report.path),
                "seconds": report.seconds,
                "fetched_files": report.fetched_files,
                "fetched_bytes": report.fetched_bytes,
                "manifest": asdict(report.manifest),
            }
        )


def inspect_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A data folder, or one shard.")],
    tokenizer: TokenizerOption = None,
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", help="Documents to decode from each split.", show_default=True)
    ] = 1,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with its checksum in manifest.json.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Count the tokens and documents of a data folder or a shard, decode samples, and name what is wrong with it.

    Example: pgolf data inspect data/demo --samples 2 --verify
    """
    from pgolf.data.inspection import inspect_data

    show_data(inspect_data(path, tokenizer, samples, verify=verify), console_for(as_json), as_json)


def show_data(report: DataReport, console: Console, as_json: bool) -> None:
    """Print a report on data; raises FormatError with the problems in it once everything is printed."""
    tokenizer = "none" if report.tokenizer is None else f"{report.tokenizer}, {report.vocab_size:,} tokens"
    rows = [("tokenizer", tokenizer), ("manifest", "none" if report.manifest is None else "manifest.json")]
    console.print(key_value_table(str(report.path), rows))
    console.print(_count_table(report))
    console.print("Mean and median are tokens per document.\n", soft_wrap=True)
    for name, shards in report.shards.items():
        samples = next((shard.samples for shard in shards if shard.samples), ())
        for text in samples:
            console.print(f"{name}: {text!r}", soft_wrap=True)
    if as_json:
        print_json({"kind": "data", **report.to_dict()})
    if report.problems:
        raise FormatError(" ".join(report.problems))


def _count_table(report: DataReport) -> Table:
    """A row for every shard, and one for every split of several; mean and median are tokens per document."""
    table = data_table(("",), ("bytes", "tokens", "documents", "mean", "median", "ids", "bytes of text"))
    for name, shards in report.shards.items():
        for shard in shards:
            table.add_row(shard.file, f"{shard.bytes:,}", *_counts(shard.counts))
        if len(shards) > 1:
            size = sum(shard.bytes for shard in shards)
            table.add_row(f"{name}, together", f"{size:,}", *_counts(report.totals[name]), style="bold")
    return table


def _counts(counts: Counts) -> list[str]:
    def text(value: float | None, form: str = ",") -> str:
        return "–" if value is None else format(value, form)

    return [
        text(counts.tokens),
        text(counts.documents),
        text(counts.mean_document, ",.1f"),
        text(counts.median_document, ",.0f"),
        f"{text(counts.min_id)}–{text(counts.max_id)}",
        text(counts.text_bytes),
    ]


def _table(manifest: Manifest) -> Table:
    table = data_table(("",), ("documents", "tokens", "bytes of text", "bytes per token", "shards"))
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
data_app.command("download")(reported(download_command))
data_app.command("inspect")(reported(inspect_command))
