"""`pgolf inspect`: what is in a run folder, an artifact, a checkpoint or data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pgolf.cli.options import JsonOption, ThreadsOption, use_threads
from pgolf.cli.output import console_for, data_table, key_value_table, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pgolf.config import Config, ModelConfig
    from pgolf.report.inspection import ArtifactSummary, CheckpointSummary, RunSummary, WeightsSummary


def inspect_command(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A run folder, a file with weights, a data folder or a shard."),
    ],
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a file or folder of pgolf's holds; nothing in it is executed.

    An artifact: its tensors, encodings and bytes, and the entropy of its integers against the bits that they take. A
    run: how far it came, its report and its loss curve. Data: as `pgolf data inspect`.

    Example: pgolf inspect runs/demo/model.pgolf
    """
    from pgolf.cli.data import show_data
    from pgolf.data.inspection import inspect_data
    from pgolf.report.inspection import inspect_artifact, inspect_checkpoint, inspect_run, inspect_weights, kind_of
    from pgolf.report.progress import stages

    use_threads(threads)
    console = console_for(as_json)
    kind = kind_of(path)
    if kind == "data":
        show_data(inspect_data(path), console, as_json)
        return
    summary: RunSummary | CheckpointSummary | ArtifactSummary | WeightsSummary
    if kind == "run":
        summary = inspect_run(path)
        _show_run(summary, console)
    elif kind == "checkpoint":
        summary = inspect_checkpoint(path)
        _show_checkpoint(summary, console)
    elif kind == "weights":
        summary = inspect_weights(path)
        _show_weights(summary, console)
    else:
        with stages(console) as show:
            summary = inspect_artifact(path, show)
        _show_artifact(summary, console)
    if as_json:
        print_json({"kind": kind, **summary.to_dict()})


def _show_artifact(artifact: ArtifactSummary, console: Console) -> None:
    console.print(_tensor_table(artifact))
    console.print(
        "Bits are compressed bits per weight, scales included; entropy is the order-0 entropy of the integers.\n",
        soft_wrap=True,
    )
    left = artifact.limit_bytes - artifact.bytes
    trained = "not by pgolf's trainer"
    if artifact.steps is not None:
        trained = f"{artifact.steps:,} steps, {artifact.tokens:,} tokens, seed {artifact.seed}"
    scored = "as pgolf eval does by itself"
    if artifact.scoring is not None:
        scored = ", ".join(f"{key} {value}" for key, value in artifact.scoring.items())
        scored += f"; {artifact.byte_basis} bytes" if artifact.byte_basis else ""
    rows = [
        ("model", _model_text(artifact.model)),
        ("training length", "unknown" if artifact.train_seq_len is None else f"{artifact.train_seq_len:,} tokens"),
        ("trained", trained),
        ("scored", scored),
        ("written by", f"pgolf {artifact.pgolf}, zstd {artifact.zstd}, format {artifact.version}"),
        ("artifact", f"{artifact.bytes:,} bytes"),
        ("limit, code included", f"{artifact.limit_bytes:,} bytes"),
        ("left for code" if left >= 0 else "too many", f"{abs(left):,} bytes"),
    ]
    console.print(key_value_table(str(artifact.path), rows))


def _tensor_table(artifact: ArtifactSummary) -> Table:
    table = data_table(("tensor", "shape", "encoding"), ("raw bytes", "compressed", "bits", "entropy"))
    for tensor in artifact.tensors:
        table.add_row(
            tensor.name,
            "×".join(map(str, tensor.shape)) or "scalar",
            tensor.encoding,
            f"{tensor.raw_bytes:,}",
            f"{tensor.compressed_bytes:,}",
            f"{tensor.stored_bits:.3f}",
            "–" if tensor.entropy is None else f"{tensor.entropy:.3f}",
        )
    table.add_row("shared", "", "", "", f"{artifact.shared_bytes:,}", "", "")
    raw = sum(tensor.raw_bytes for tensor in artifact.tensors)
    bits = 8 * artifact.bytes / artifact.weights
    table.add_row("together", "", "", f"{raw:,}", f"{artifact.bytes:,}", f"{bits:.3f}", "", style="bold")
    return table


def _show_weights(weights: WeightsSummary, console: Console) -> None:
    table = data_table(("tensor", "shape", "encoding"), ())
    for name, encoding, shape in weights.tensors:
        table.add_row(name, "×".join(map(str, shape)) or "scalar", encoding)
    console.print(table)
    model = f"not pgolf's: {weights.why_not}" if weights.model is None else _model_text(weights.model)
    rows = [
        ("model", model),
        ("quantised", "yes" if weights.quantised else "no"),
        ("file", f"{weights.bytes:,} bytes, {weights.format}"),
    ]
    console.print(key_value_table(str(weights.path), rows))


def _show_checkpoint(checkpoint: CheckpointSummary, console: Console) -> None:
    from pgolf.report.progress import duration

    shards = f"{checkpoint.data_shards:,} shard{'s' * (checkpoint.data_shards != 1)}"
    rows = [
        ("model", f"{_model_text(checkpoint.model)}, {checkpoint.dtype}"),
        ("finished steps", f"{checkpoint.step:,}"),
        ("training time", duration(checkpoint.seconds)),
        ("training data", f"{checkpoint.data_tokens:,} tokens in {shards}"),
        ("next token", f"{checkpoint.position:,}"),
        ("snapshots in the mean", f"{checkpoint.snapshots:,}"),
        *((f"  {what}", f"{count:,} tensors, {size:,} bytes") for what, count, size in checkpoint.groups),
        ("file", f"{checkpoint.bytes:,} bytes, version {checkpoint.version}"),
    ]
    console.print(key_value_table(str(checkpoint.path), rows))


def _show_run(run: RunSummary, console: Console) -> None:
    from pgolf.cli.chart import loss_chart
    from pgolf.cli.models import resume_command
    from pgolf.cli.train import report_table
    from pgolf.report.inspection import checkpoint_step
    from pgolf.report.progress import duration, machine_parts

    train = run.config.train
    rows = [
        ("model", _model_text(run.config.model)),
        ("data", train.data_path or "given to the Trainer"),
        ("batch", f"{train.train_batch_tokens:,} tokens in sequences of {train.train_seq_len:,}, seed {train.seed}"),
        ("ends after", _limits(run.config)),
        ("state", "finished" if run.report is not None else "not finished"),
        ("steps, tokens", f"{run.step:,}, {run.tokens:,}"),
        ("training time", duration(run.seconds)),
        ("last step", ", ".join(machine_parts(run.share_of_limit, run.memory_mib, run.device)) or "unknown"),
        ("newest checkpoint", "none" if run.checkpoint is None else run.checkpoint.name),
        ("artifact", "none" if run.artifact_bytes is None else f"{run.artifact_bytes:,} bytes"),
    ]
    console.print(key_value_table(str(run.path), rows))
    if run.report is not None:
        console.print(report_table(run.report))
    if run.curves is not None:
        console.print(f"Loss in nats per token; ● is validation. The last: {run.curves.verdict}.\n", soft_wrap=True)
        console.print(loss_chart(run.curves), soft_wrap=True)
    if run.report is None and run.checkpoint is not None:
        step = checkpoint_step(run.checkpoint)
        console.print(f"\nTo go on after step {step:,}:\n    {resume_command(run.path)}", soft_wrap=True)


def _limits(config: Config) -> str:
    from pgolf.report.progress import duration

    train = config.train
    if train.replay:
        return f"the steps of {train.replay}"
    limits = [f"{train.iterations:,} steps"] * bool(train.iterations)
    limits += [duration(train.max_wallclock_seconds)] * bool(train.max_wallclock_seconds)
    return " or ".join(limits)


def _model_text(model: ModelConfig) -> str:
    from math import prod

    from pgolf.model import parameter_shapes

    count = sum(prod(shape) for shape in parameter_shapes(model).values())
    return f"{count:,} parameters, {model.num_layers} layers × {model.model_dim}, vocabulary {model.vocab_size:,}"
