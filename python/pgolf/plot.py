"""The picture of a run: its losses against its steps."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import numpy.typing as npt

from pgolf.data.files import atomic_write
from pgolf.errors import FormatError

if TYPE_CHECKING:
    from pgolf.trainer import StepRecord

StrPath = Union[str, "os.PathLike[str]"]
Records = Iterable[Union[Mapping[str, Any], "StepRecord"]]

_TRAINING, _VALIDATION, _INK, _GRID = "#3b6fb6", "#d1495b", "#2b2b33", "#e6e6ea"


@dataclass(frozen=True)
class _Curves:
    """(n,) steps and losses of every training step, (m,) of every validation, bits per byte of the last one."""

    steps: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    val_steps: npt.NDArray[np.int64]
    val_losses: npt.NDArray[np.float64]
    val_bpb: float | None


def plot_loss(log: StrPath | Records, out: StrPath) -> None:
    """Draw training and validation loss against steps into a PNG file, which is replaced whole.

    log: a run's ``log.jsonl``, or its records: `StepRecord`s or mappings with ``step``, ``loss`` and ``val_loss``.
    out: the PNG file.

    Raises ModuleNotFoundError where matplotlib is not installed, FileNotFoundError where there is no such log,
    FormatError naming the line that is no step record, ValueError where no loss was recorded.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ModuleNotFoundError("Plots need matplotlib; install it with: pip install 'pgolf[plot]'") from None

    curves = _read(log) if isinstance(log, (str, os.PathLike)) else _curves(log)
    # No pyplot: it would keep the figure, and choose a window system's backend.
    figure = Figure(
        figsize=(8, 4.5), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12), facecolor="white"
    )
    FigureCanvasAgg(figure)
    _draw(figure, curves)
    with atomic_write(Path(out)) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def _read(log: StrPath) -> _Curves:
    path = Path(log)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such log; a run's log.jsonl is expected.")
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
            _fields(record)
        except (ValueError, TypeError, KeyError):
            raise FormatError(
                f"{path}, line {number}: this is no step record; a line of log.jsonl is expected."
            ) from None
        records.append(record)
    try:
        return _curves(records)
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from None


def _fields(record: Mapping[str, Any] | StepRecord) -> tuple[int, float | None, float | None, float | None]:
    """step, loss, val_loss and val_bpb of a record."""
    values = record if isinstance(record, Mapping) else asdict(record)
    loss, val_loss, val_bpb = (
        None if values.get(name) is None else float(values[name]) for name in ("loss", "val_loss", "val_bpb")
    )
    return int(values["step"]), loss, val_loss, val_bpb


def _curves(records: Records) -> _Curves:
    rows = [_fields(record) for record in records]
    training = [(step, loss) for step, loss, _, _ in rows if loss is not None]
    validation = [(step, val_loss) for step, _, val_loss, _ in rows if val_loss is not None]
    if not training and not validation:
        raise ValueError("the records hold no loss; at least one step is needed for a plot.")
    bpb = [val_bpb for *_, val_bpb in rows if val_bpb is not None]
    return _Curves(
        np.array([step for step, _ in training], dtype=np.int64),
        np.array([loss for _, loss in training]),
        np.array([step for step, _ in validation], dtype=np.int64),
        np.array([loss for _, loss in validation]),
        bpb[-1] if bpb else None,
    )


def _draw(figure: Any, curves: _Curves) -> None:
    axes = figure.add_subplot()
    last = max([0, *curves.steps[-1:], *curves.val_steps[-1:]])
    if curves.steps.size:
        axes.plot(curves.steps, curves.losses, color=_TRAINING, alpha=0.25, linewidth=0.8)
        axes.plot(curves.steps, _smooth(curves.losses), color=_TRAINING, linewidth=1.8, label="training")
    if curves.val_steps.size:
        axes.plot(
            curves.val_steps,
            curves.val_losses,
            color=_VALIDATION,
            linewidth=1.2,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            label="validation",
            clip_on=False,
            zorder=3,
        )
    axes.set_xlim(0, max(last, 1) * 1.02)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss, nats per token", color=_INK)
    axes.set_title(_title(curves), loc="left", color=_INK, fontsize=11, pad=10)
    axes.legend(frameon=False, labelcolor=_INK)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_INK)
    axes.tick_params(colors=_INK, length=0)
    axes.xaxis.set_major_locator(_integer_ticks())
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _integer_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10])


def _title(curves: _Curves) -> str:
    if not curves.val_losses.size:
        return f"Training loss {curves.losses[-1]:.4f}"
    title = f"Validation loss {curves.val_losses[-1]:.4f}"
    return title if curves.val_bpb is None else f"{title}, {curves.val_bpb:.4f} bits per byte"


def _smooth(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean over a window of about a fiftieth of the run that ends at each step, shorter at the beginning."""
    window = max(1, losses.size // 50)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    end = np.arange(1, losses.size + 1)
    start = np.maximum(end - window, 0)
    return np.asarray((sums[end] - sums[start]) / (end - start))
