"""What `pgolf export` and `pgolf export --fit` print of what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgolf.cli.output import data_table

if TYPE_CHECKING:
    from rich.table import Table

    from pgolf.artifacts.artifact import ExportReport


def report_table(report: ExportReport) -> Table:
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


def summary(report: ExportReport) -> str:
    size = f"{report.path}: {report.bytes:,} bytes"
    if report.total_bytes is not None:
        size += f", with {report.code_bytes:,} bytes of code {report.total_bytes:,}"
    if not report.fits:
        return f"{size}; {-report.margin:,} bytes too many for the limit of {report.limit_bytes:,}."
    left = "left" if report.code_bytes is not None else "left for code"
    return f"{size}; {report.margin:,} of {report.limit_bytes:,} are {left}."
