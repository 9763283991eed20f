"""A loss curve in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from pgolf.runs.records import Curves

# A Braille character is a cell of 4 × 2 dots; Unicode numbers them so, from U+2800 on.
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
_BLANK = 0x2800


def loss_chart(curves: Curves, width: int = 72, height: int = 12) -> str:
    """Training loss as a line of Braille dots, each the mean of the steps that fall on it, and validations as ●.

    width, height: of the drawing in characters; the scale takes 8 more columns and one more line.
    """
    rows, columns = 4 * height, 2 * width
    last = max(curves.last_step, 1)
    means = _column_means(curves, columns, last)
    every_loss = np.concatenate([means[~np.isnan(means)], curves.val_losses])
    low, high = float(every_loss.min()), float(every_loss.max())

    def row_of(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        return np.rint((high - losses) / max(high - low, 1e-9) * (rows - 1)).astype(np.int64)

    dots = np.zeros((rows, columns), dtype=bool)
    (known,) = np.nonzero(~np.isnan(means))
    if known.size:
        line = np.arange(known[0], known[-1] + 1)
        heights = row_of(np.interp(line, known, means[known]))
        for column, here, before in zip(line, heights, [heights[0], *heights], strict=False):
            # Steep parts are filled up to the neighbour, so that the line has no gaps.
            dots[min(here, before + 1) : max(here, before - 1) + 1, column] = True
    cells = (dots.reshape(height, 4, width, 2) * _DOTS[:, None, :]).sum(axis=(1, 3)) + _BLANK
    text = [[chr(cell) if cell > _BLANK else " " for cell in line] for line in cells]
    for row, step in zip(row_of(curves.val_losses) // 4, curves.val_steps, strict=True):
        text[row][_column_of(step, columns, last) // 2] = "●"
    scale = [f"{high:7.3f} ", *[" " * 8] * (height - 2), f"{low:7.3f} "]
    drawing = [label + "".join(line).rstrip() for label, line in zip(scale, text, strict=True)]
    end = f"step {last:,}"
    return "\n".join([*drawing, f"{'':8}0{end:>{width - 1}}"])


def _column_of(steps: npt.NDArray[np.int64], columns: int, last: int) -> npt.NDArray[np.int64]:
    """The column that is nearest to each step, from 0 to ``last``."""
    return (2 * steps * (columns - 1) + last) // (2 * last)


def _column_means(curves: Curves, columns: int, last: int) -> npt.NDArray[np.float64]:
    """(columns,) means of the training losses on each column; NaN where no step falls on it."""
    at = _column_of(curves.steps, columns, last)
    sums, counts = np.bincount(at, curves.losses, columns), np.bincount(at, minlength=columns)
    means: npt.NDArray[np.float64] = np.divide(sums, counts, out=np.full(columns, np.nan), where=counts > 0)
    return means
