"""`pgolf export`: weights into an artifact, under any policy, or into the community's files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pgolf.cli.export_report import report_table, summary
from pgolf.cli.failures import requested_device
from pgolf.cli.models import Source
from pgolf.cli.options import (
    ConfigOption,
    DeviceOption,
    ForeignRecipeOption,
    JsonOption,
    SetOption,
    ThreadsOption,
    TokenizerOption,
    complete_recipe,
    use_threads,
)
from pgolf.cli.output import console_for, print_json
from pgolf.config import Config, ExportConfig

if TYPE_CHECKING:
    from rich.console import Console

    from pgolf.artifacts.artifact import ExportReport
    from pgolf.model import GPT


def export_command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="A run folder, whose checkpoint is taken, or a file with weights.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="An artifact, or what its ending says: .ptz, .pt, .safetensors."),
    ],
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
    recipe: ForeignRecipeOption = None,
    config_file: ConfigOption = None,
    overrides: SetOption = None,
    fit: Annotated[
        int | None,
        typer.Option(
            "--fit", min=1, metavar="BYTES", help="Search the policy of least loss that fits, --code included."
        ),
    ] = None,
    margin: Annotated[
        int, typer.Option("--margin", min=0, metavar="N", help="With --fit: bytes to leave below it.")
    ] = 1000,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="PATH", help="With --fit: folder or shard of text; default: the run's."),
    ] = None,
    tokenizer: TokenizerOption = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=1, metavar="N", help="With --fit: training tokens to measure losses on.")
    ] = 16_384,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="With --fit: a PNG of bits per byte against bytes.")
    ] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantise and compress a model into an artifact, and report its size tensor by tensor.

    From a run folder the weights are those of its newest checkpoint, averaged as the run does it; an artifact's weights
    have been quantised before. From an artifact to a .ptz bundle and back, its integers stay as they are unless
    --policy, --prune or --small-numel is given.

    With --fit, the matrices are stored as finely as they fit and as the loss needs it, which is measured on training
    data: hundreds of forward passes, on --device. Small and control tensors stay as the policy says.

    Example: pgolf export runs/demo --policy pr465 --out small.pgolf

    For a script: pgolf export runs/demo --out final_model.pt

    Into a limit: pgolf export runs/base --fit 16000000 --code train_gpt.py --out model.pgolf --plot frontier.png
    """
    from pgolf.artifacts.artifact import export_with
    from pgolf.artifacts.bundle import BUNDLE_ENDING
    from pgolf.artifacts.interchange import STATE_DICT_ENDINGS, convert, kind_of_weights, save_state_dict

    use_threads(threads)
    source = Source.of(model, recipe, config_file, overrides)
    requantise = any(option is not None for option in (policy, prune, small_numel))
    console = console_for(as_json)
    if out.suffix in STATE_DICT_ENDINGS:
        if requantise or code is not None or fit is not None:
            raise ValueError(
                f"{out} holds weights as they are: --policy, --prune, --small-numel, --fit, --code do not apply."
            )
        save_state_dict(_weights(model, source, "cpu"), out)
        console.print(f"{out}: {out.stat().st_size:,} bytes, not quantised", soft_wrap=True)
        if as_json:
            print_json({"path": str(out), "bytes": out.stat().st_size})
        return
    other_container = "bundle" if out.suffix != BUNDLE_ENDING else "artifact"
    if fit is None and not requantise and not model.is_dir() and kind_of_weights(model) == other_container:
        _show(convert(model, out, source.config, code), console, as_json)
        return
    loaded = _weights(model, source, "cpu" if fit is None else device)
    settings = source.config.export if source.config is not None else ExportConfig()
    if policy is not None:
        settings = Config.from_recipe(policy).export
    if prune is not None:
        settings.prune = prune
    if small_numel is not None:
        settings.small_numel = small_numel
    if fit is not None:
        from pgolf.cli.fit import fit_command

        source.check_length(loaded)
        folder, pieces = source.data(data), source.tokenizer_path(tokenizer)
        found = fit_command(loaded, out, folder, pieces, settings, fit, code, margin, tokens, plot, console)
        if as_json:
            print_json(found.to_dict())
        return
    _show(export_with(loaded, out, settings, code), console, as_json)


def _show(report: ExportReport, console: Console, as_json: bool) -> None:
    console.print(report_table(report))
    console.print(summary(report), soft_wrap=True)
    if as_json:
        print_json(report.to_dict())


def _weights(path: Path, source: Source, device: str | None) -> GPT:
    from pgolf.runs import checkpoint

    if path.is_dir() and source.config is not None:
        newest = checkpoint.newest(path / "checkpoint")
        if newest is not None:
            with requested_device():
                return checkpoint.load_model(newest, source.config, device=device)
    return source.load(device=device)
