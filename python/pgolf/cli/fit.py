"""`pgolf export --fit`: the search, its table and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pgolf.cli.export_report import report_table, summary
from pgolf.cli.output import data_table
from pgolf.config import ExportConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pgolf.artifacts.budget import FitReport, Point
    from pgolf.model import GPT


def fit_command(
    model: GPT,
    out: Path,
    data: Path,
    tokenizer: Path | None,
    settings: ExportConfig,
    limit_bytes: int,
    code: Path | None,
    margin: int,
    tokens: int,
    plot: Path | None,
    console: Console,
) -> FitReport:
    """Fit, print and draw; raises what ``pgolf.fit`` raises."""
    from pgolf.artifacts.budget import fit
    from pgolf.report.progress import stages

    with stages(console) as show:
        found = fit(
            model,
            out,
            data,
            tokenizer,
            limit_bytes=limit_bytes,
            code=code,
            margin=margin,
            policy=settings,
            tokens=tokens,
            progress=show,
        )
    console.print(report_table(found.export))
    console.print(_frontier(found))
    console.print(summary(found.export), soft_wrap=True)
    if plot is not None:
        from pgolf.report.plot import plot_frontier

        plot_frontier(found, plot)
        console.print(f"The picture is {plot}.", soft_wrap=True)
    return found


def _frontier(found: FitReport) -> Table:
    table = data_table(
        ("policy",),
        ("bytes", "loss", "above exact", "predicted", "bits per byte"),
        title=f"{found.tokens:,} tokens of training data; exact weights: {found.exact_loss:.5f}",
    )

    def row(name: str, point: Point, style: str = "") -> None:
        predicted = "–" if point.predicted is None else f"{point.predicted - found.exact_loss:+.5f}"
        table.add_row(
            name,
            f"{point.bytes:,}",
            f"{point.loss:.5f}",
            f"{point.loss - found.exact_loss:+.5f}",
            predicted,
            "–" if point.bpb is None else f"{point.bpb:.5f}",
            style=style,
        )

    row("the recipe's policy", found.recipe)
    for point in found.frontier:
        row(f"fitted, {point.name} of its bytes", point)
    row("written", found.chosen, "bold")
    return table
