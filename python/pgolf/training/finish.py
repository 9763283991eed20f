"""The end of a run: average, export, reload, score, report."""

from __future__ import annotations

import contextlib
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pgolf.common.files import atomic_write
from pgolf.common.types import Progress
from pgolf.runs.records import Report
from pgolf.scoring.evaluation import Model, Score, ValidationData, evaluate

if TYPE_CHECKING:
    import os

    from pgolf.config import Config
    from pgolf.training.trainer import Trainer


def finish_run(trainer: Trainer, progress: Progress | None, code: str | os.PathLike[str] | None) -> Report:
    """See `pgolf.Trainer.finish`."""
    with tempfile.TemporaryDirectory() as temporary:
        return _finish(trainer, trainer.run_dir or Path(temporary), progress or (lambda what, done, total: None), code)


def _finish(trainer: Trainer, folder: Path, progress: Progress, code: str | os.PathLike[str] | None) -> Report:
    from pgolf.artifacts.artifact import export_with, load  # zstandard is needed from here on
    from pgolf.report.plot import plot_loss

    config, model = trainer.config, trainer.model
    rate, peak = trainer.tokens / trainer.seconds if trainer.seconds else 0.0, trainer.peak_memory_mib
    progress("validate", 0, 1)
    before = trainer.validation_loss()
    progress("average", 0, 1)
    averaged = trainer.validation_loss() if trainer.use_average() else None
    progress("export", 0, 1)
    sizes = export_with(model, folder / "model.pgolf", config.export, code)
    loaded = load(folder / "model.pgolf", device=model.device, dtype=model.dtype)
    progress("validate the artifact", 0, 1)
    quantised = trainer.validation_loss(loaded)
    started = time.perf_counter()
    score = score_as_configured(loaded, trainer.validation, config, progress)
    report = Report(
        val_loss=before[0],
        val_bpb=before[1],
        val_loss_averaged=averaged[0] if averaged else None,
        val_bpb_averaged=averaged[1] if averaged else None,
        val_loss_quantised=quantised[0],
        val_bpb_quantised=quantised[1],
        score_method=score.method,
        score_seq_len=score.seq_len,
        score_stride=score.stride,
        score_tail=score.tail,
        score_loss=score.loss,
        score_bpb=score.bpb,
        score_seconds=time.perf_counter() - started,
        artifact_bytes=sizes.bytes,
        code_bytes=sizes.code_bytes,
        total_bytes=sizes.total_bytes,
        limit_bytes=sizes.limit_bytes,
        fits=sizes.fits,
        steps=trainer.step,
        tokens=trainer.tokens,
        seconds=trainer.seconds,
        tokens_per_second=rate,
        snapshots=trainer.snapshots,
        parameters=model.num_parameters,
        seed=config.train.seed,
        micro_batch_seqs=trainer.micro_batch_seqs,
        device=model.description,
        versions={
            "pgolf": sizes.pgolf,
            "zstd": sizes.zstd,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        memory=trainer.memory_table(),
        score_tokens=score.tokens,
        score_bytes=score.bytes,
        data=trainer.data_fingerprints,
        share_of_limit=trainer.share_of_limit(rate) if rate else None,
        limit_tflops=trainer.limit.flops / 1e12 if trainer.limit else None,
        peak_memory_mib=peak,
        byte_basis=score.byte_basis,
        source_bytes=score.source_bytes,
        declared_by=score.audit.declared_by,
        tokenizer=score.audit.tokenizer,
    )
    if trainer.run_dir is not None:
        with atomic_write(trainer.run_dir / "report.json") as file:
            file.write(json.dumps(report.to_dict(), indent=2).encode() + b"\n")
        with contextlib.suppress(ModuleNotFoundError):  # matplotlib is optional; `pgolf plot` says how to get it
            plot_loss(trainer.run_dir / "log.jsonl", trainer.run_dir / "loss.png")
    return report


def score_as_configured(
    model: Model, validation: ValidationData, config: Config, progress: Progress | None = None
) -> Score:
    """The score of a loaded artifact by the configuration's [eval] table: what a run reports, and a check repeats.

    Args:
        progress: called as progress("score", windows done, windows in all).

    Raises:
        What `pgolf.evaluate` raises.
    """
    return evaluate(
        model,
        validation,
        method=config.eval.method,
        seq_len=config.eval_seq_len,
        stride=config.eval.eval_stride,
        tail=config.eval.tail,
        batch_seqs=config.eval.eval_batch_seqs,
        **config.eval.ttt(),
        progress=None if progress is None else lambda done, total, tokens: progress("score", done, total),
    )
