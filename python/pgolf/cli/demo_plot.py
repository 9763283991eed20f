"""The demo's picture: the model's bits per byte while it trains, beside the compressors it is measured against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pgolf.report import plot

if TYPE_CHECKING:
    from pgolf.cli.demo import Baselines
    from pgolf.runs.records import Report

_MODEL, _INK, _LINES = "#d1495b", "#2b2b33", ("#9aa0ac", "#6d7380", "#3b6fb6")


def plot_race(log: Path, report: Report, baselines: Baselines, out: Path) -> None:
    """Draw validation bits per byte against training seconds into a PNG file, the final score as a star.

    Raises ModuleNotFoundError where matplotlib is not installed.
    """
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    measured = [(record["seconds"], record["val_bpb"]) for record in records if record["val_bpb"] is not None]
    figure = plot.new_figure()
    axes = figure.add_subplot()
    opponents = (
        ("zstd -22", baselines.zstd),
        ("xz -9", baselines.xz),
        ("xz, given the training text", baselines.xz_given_training_text),
    )
    for (name, bpb), color in zip(opponents, _LINES, strict=True):
        axes.axhline(bpb, color=color, linewidth=1.4, linestyle=(0, (5, 3)), label=f"{name}: {bpb:.3f}")
    axes.plot(*zip(*measured, strict=True), color=_MODEL, linewidth=2, marker="o", ms=4, label="pgolf, training")
    if report.score_bpb is not None:
        label = f"pgolf, {report.artifact_bytes / 1e3:,.0f} kB artifact, {report.score_method}: {report.score_bpb:.3f}"
        axes.plot([report.seconds], [report.score_bpb], "*", color=_MODEL, markersize=14, label=label)
    axes.set_ylim(min(1.6, (report.score_bpb or 2.0) - 0.1), 3.0)
    axes.set_xlim(0)
    axes.set_xlabel("training time, s", color=_INK)
    axes.set_ylabel("bits per byte of unseen text", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, labelcolor=_INK)
    plot.save_figure(figure, out)
