"""`pgolf eval`: the score of a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pgolf.cli.models import Source
from pgolf.cli.options import (
    ConfigOption,
    DeviceOption,
    ForeignRecipeOption,
    JsonOption,
    ModelArgument,
    SetOption,
    ThreadsOption,
    TokenizerOption,
    use_threads,
)
from pgolf.cli.output import bits, console_for, key_value_table, print_json
from pgolf.config import Config

if TYPE_CHECKING:
    from pgolf.model import GPT
    from pgolf.scoring.audit import Audit
    from pgolf.scoring.evaluation import Score


def evaluate_command(
    model: ModelArgument,
    recipe: ForeignRecipeOption = None,
    config_file: ConfigOption = None,
    overrides: SetOption = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="PATH", help="Data folder, or one shard; default: the run's data folder."),
    ] = None,
    tokenizer: TokenizerOption = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="sliding, standard or ttt; default: the run's, sliding."),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len", min=1, metavar="T", help="Tokens of context; default: the run's, the training length."
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", min=1, metavar="S", help="Tokens between windows; default: the run's, 64."),
    ] = None,
    tail: Annotated[
        str | None, typer.Option("--tail", metavar="NAME", help="exact or reference; default: the run's, exact.")
    ] = None,
    batch_seqs: Annotated[
        int | None, typer.Option("--batch-seqs", min=1, metavar="N", help="Windows at once: speed and memory only.")
    ] = None,
    ttt_batch_size: Annotated[
        int | None,
        typer.Option("--ttt-batch-size", min=1, metavar="N", help="Documents at once, for ttt: speed and memory."),
    ] = None,
    any_tokenizer: Annotated[
        bool,
        typer.Option("--any-tokenizer", help="Score with another tokenizer than the one that data or run names."),
    ] = False,
    audit: Annotated[
        str, typer.Option("--audit", metavar="sample|full", help="How thoroughly to look for trained-on documents.")
    ] = "sample",
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a model on validation data: mean loss and bits per byte, with an audit of the score.

    Example: pgolf eval runs/demo --method sliding --stride 32

    Someone else's: pgolf eval final_model.int8.ptz --recipe base --set model.rope_tables=bf16 --data data/fineweb
    """
    from pgolf.report.progress import stages
    from pgolf.scoring.evaluation import evaluate

    use_threads(threads)
    source = Source.of(model, recipe, config_file, overrides)
    loaded = source.load(device)
    method, settings = _settings(method, source.config, loaded)
    if method != "ttt" and not (seq_len or settings.get("seq_len") or loaded.train_seq_len):
        raise ValueError(f"{source.weights} does not say its training length; give --seq-len or --recipe.")
    console = console_for(as_json)
    with stages(console) as show:
        score = evaluate(
            loaded,
            source.data(data),
            source.tokenizer_path(tokenizer),
            method=method,
            seq_len=seq_len or settings.get("seq_len") or None,
            stride=stride or settings.get("stride"),
            tail=tail or settings.get("tail"),
            batch_seqs=batch_seqs or (None if source.config is None else source.config.eval.eval_batch_seqs),
            audit=audit,
            **{
                **{key: value for key, value in settings.items() if key.startswith("ttt_")},
                **({"ttt_batch_size": ttt_batch_size} if ttt_batch_size else {}),
            },
            any_tokenizer=any_tokenizer,
            record=source.record(loaded),
            progress=lambda done, total, tokens: show("score", done, total),
        )
    console.print(key_value_table(str(source.weights), _rows(score)))
    if as_json:
        print_json(_to_dict(score))


def _settings(method: str | None, config: Config | None, model: GPT) -> tuple[str, dict[str, Any]]:
    """The method, and how it scores where no option says: as the configuration does, else as the artifact says.

    Without a configuration, an artifact's record holds for the method that it names; another one is `pgolf.evaluate`'s.
    """
    if config is not None:
        ev = config.eval
        how = {"seq_len": ev.eval_seq_len or None, "stride": ev.eval_stride, "tail": ev.tail, **ev.ttt()}
        return method or ev.method, how
    known = model.scoring or {}
    chosen = method or known.get("method") or "sliding"
    return chosen, known if chosen == known.get("method") else {}


def _rows(score: Score) -> list[tuple[str, str]]:
    how = f"{score.method}, context {score.seq_len:,}"
    if score.method == "ttt":
        how += f", {score.windows:,} chunks"
    if score.stride is not None:
        how += f", stride {score.stride:,}, {score.tail} tail"
    return [
        ("bits per byte", bits(score.bpb)),
        ("loss, nats per token", f"{score.loss:.4f}"),
        ("scored tokens", f"{score.tokens:,}"),
        ("bytes of text", _bytes_text(score)),
        ("method", how),
        ("time", f"{score.seconds:.1f} s"),
        ("audit", _audit_text(score.audit)),
    ]


def _bytes_text(score: Score) -> str:
    if score.bytes is None or score.byte_basis is None:
        return "–"
    from pgolf.scoring.evaluation import BASES

    return f"{score.bytes:,}, of {BASES[score.byte_basis]}"


def _audit_text(audit: Audit) -> str:
    checked = "bytes and scores checked" if audit.bytes_checked else "scores checked, bytes not (no tokenizer)"
    where = "documents unknown (no BOS token)" if audit.documents is None else f"{audit.documents:,} documents"
    declared = "nobody declares the data" if audit.declared_by is None else f"data as declared by {audit.declared_by}"
    parts = [f"{checked}, {where}", declared]
    if audit.tokenizer_bound is False:
        parts.append("ANOTHER TOKENIZER than the one that is named")
    if audit.text is not None and audit.text.unknown_tokens:
        parts.append(f"{audit.text.unknown_tokens:,} tokens unknown to the tokenizer")
    if audit.text is not None and audit.source_bytes is not None and audit.source_bytes != audit.text.text_bytes:
        parts.append(f"{audit.text.text_bytes:,} bytes of text for {audit.source_bytes:,} of the original")
    if audit.duplicates is not None:
        found = audit.duplicates
        parts.append(f"{found.found:,} of {found.looked_up:,} looked up stand in training data")
    return "; ".join(parts)


def _to_dict(score: Score) -> dict[str, Any]:
    """Every field but the per-document arrays."""
    names = ("loss", "bpb", "tokens", "bytes", "seconds", "method", "seq_len", "stride", "tail", "windows")
    basis = {"byte_basis": score.byte_basis, "source_bytes": score.source_bytes}
    return {**{name: getattr(score, name) for name in names}, **basis, "audit": asdict(score.audit)}
