"""`pgolf export`: weights into an artifact, under any policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from pgolf.cli.models import Source
from pgolf.cli.options import JsonOption, ThreadsOption, complete_recipe, use_threads
from pgolf.cli.output import console_for, data_table, print_json
from pgolf.config import Config, ExportConfig
from pgolf.errors import FormatError

if TYPE_CHECKING:
    from rich.table import Table

    from pgolf.artifact import ExportReport
    from pgolf.model import GPT


def export_command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run folder, whose checkpoint is taken, or an artifact.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The artifact to write.")],
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy",
            metavar="NAME",
            autocompletion=complete_recipe,
            help="The recipe whose policy decides; default: the run's own, base.",
        ),
    ] = None,
    prune: Annotated[
        float | None, typer.Option("--prune", metavar="P", help="Share of every large matrix that becomes zero.")
    ] = None,
    small_numel: Annotated[
        int | None, typer.Option("--small-numel", metavar="N", help="Tensors of at most N elements are fp16.")
    ] = None,
    code: Annotated[
        Path | None,
        typer.Option("--code", metavar="FILE", help="The script whose bytes count beside the artifact's."),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantise and compress a model into an artifact, and report its size tensor by tensor.

    From a run folder the weights are those of its newest checkpoint, averaged as the run does it; an artifact's weights
    have been quantised before.

    Example: pgolf export runs/demo --policy pr465 --out small.pgolf
    """
    from pgolf.artifact import export_with

    use_threads(threads)
    source = Source.of(model)
    loaded = _weights(model, source)
    settings = source.config.export if source.config is not None else ExportConfig()
    if policy is not None:
        settings = Config.from_recipe(policy).export
    if prune is not None:
        settings.prune = prune
    if small_numel is not None:
        settings.small_numel = small_numel
    report = export_with(loaded, out, settings, code)
    console = console_for(as_json)
    console.print(_table(report))
    console.print(_summary(report), soft_wrap=True)
    if as_json:
        print_json(report.to_dict())


def _weights(path: Path, source: Source) -> GPT:
    from pgolf import checkpoint

    if source.config is not None:
        newest = checkpoint.newest(path / "checkpoint")
        if newest is not None:
            return _from_checkpoint(newest, source.config)
    return source.load(device="cpu")


def _from_checkpoint(path: Path, config: Config) -> GPT:
    """The model that a run ends with if it ends at this checkpoint: averaged where there is an average."""
    from pgolf import checkpoint
    from pgolf.model import GPT

    arrays, values = checkpoint.load(path)
    weights = {n.removeprefix("weight."): array for n, array in arrays.items() if n.startswith("weight.")}
    train, snapshots = config.train, values["snapshots"]
    if train.ema_decay > 0 or snapshots >= 2:
        share = np.float32(1 if train.ema_decay > 0 else 1 / snapshots)
        weights = {name: (share * arrays[f"average.{name}"]).reshape(w.shape) for name, w in weights.items()}
    model = GPT(config.model, device="cpu")
    try:
        model.load_state_dict(weights)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None
    steps = values["step"]
    model.train_seq_len = train.train_seq_len
    model.provenance = {"steps": steps, "tokens": steps * train.train_batch_tokens, "seed": train.seed}
    return model


def _table(report: ExportReport) -> Table:
    table = data_table(("tensor", "shape", "encoding"), ("raw bytes", "compressed", "relative error"))
    for tensor in report.tensors:
        table.add_row(
            tensor.name,
            "×".join(map(str, tensor.shape)) or "scalar",
            tensor.encoding,
            f"{tensor.raw_bytes:,}",
            f"{tensor.compressed_bytes:,}",
            f"{tensor.relative_error:.2e}",
        )
    table.add_row("shared", "", "", "", f"{report.shared_bytes:,}", "")
    return table


def _summary(report: ExportReport) -> str:
    size = f"{report.path}: {report.bytes:,} bytes"
    if report.total_bytes is not None:
        size += f", with {report.code_bytes:,} bytes of code {report.total_bytes:,}"
    if not report.fits:
        return f"{size}; {-report.margin:,} bytes too many for the limit of {report.limit_bytes:,}."
    left = "left" if report.code_bytes is not None else "left for code"
    return f"{size}; {report.margin:,} of {report.limit_bytes:,} are {left}."
