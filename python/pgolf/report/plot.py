"""Pictures of runs: losses against steps, of one run or of several, one over the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pgolf import _moved
from pgolf.common.files import atomic_write
from pgolf.common.types import StrPath
from pgolf.runs.records import Curves, Records

if TYPE_CHECKING:
    from pgolf.artifacts.budget import FitReport


_TRAINING, _VALIDATION, _INK, _GRID = "#3b6fb6", "#d1495b", "#2b2b33", "#e6e6ea"
# Told apart by colour-blind readers too (Okabe and Ito's palette without its yellow); then they repeat, dashed.
_RUNS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#2b2b33")
_DASHES = ("-", "--", ":", "-.")


def plot_loss(log: StrPath | Records, out: StrPath) -> None:
    """Draw training and validation loss against steps into a PNG file, which is replaced whole.

    log: a run's ``log.jsonl``, or its records: `StepRecord`s or mappings with ``step``, ``loss`` and ``val_loss``.
    out: the PNG file.

    Raises ModuleNotFoundError where matplotlib is not installed, FileNotFoundError where there is no such log,
    FormatError naming the line that is not a step record, ValueError where no loss was recorded.
    """
    figure = new_figure()
    _draw(figure, Curves.of(log))
    save_figure(figure, out)


def plot_runs(runs: Mapping[str, Curves], out: StrPath) -> None:
    """Draw several runs over each other into a PNG file, which is replaced whole: a colour for each.

    runs: their losses by name, as the legend has it. out: the PNG file.

    Raises ModuleNotFoundError where matplotlib is not installed, ValueError where there is no run.
    """
    if not runs:
        raise ValueError("A plot needs at least one run; none was given.")
    figure = new_figure()
    _draw_runs(figure, runs)
    save_figure(figure, out)


def plot_frontier(fitted: FitReport, out: StrPath) -> None:
    """Draw what ``pgolf.fit`` found into a PNG file, which is replaced whole: bits per byte (or loss) against bytes.

    Raises ModuleNotFoundError where matplotlib is not installed.
    """
    with_bpb = fitted.exact_bpb is not None
    figure = new_figure()
    axes = figure.add_subplot()
    line = sorted((*fitted.frontier, fitted.chosen), key=lambda point: point.bytes)
    for points, style in (
        (line, {"color": _TRAINING, "marker": "o", "label": "fitted"}),
        ([fitted.recipe], {"color": _VALIDATION, "marker": "s", "linestyle": "", "label": "the recipe's policy"}),
        ([fitted.chosen], {"color": _INK, "marker": "*", "markersize": 12, "linestyle": "", "label": "written"}),
    ):
        axes.plot([p.bytes / 1e6 for p in points], [p.bpb if with_bpb else p.loss for p in points], **style)
    exact = fitted.exact_bpb if with_bpb else fitted.exact_loss
    axes.axhline(exact, color=_INK, linewidth=0.8, linestyle="--", label="before quantisation")
    axes.set_xlabel("artifact, million bytes", color=_INK)
    axes.set_ylabel("bits per byte" if with_bpb else "loss, nats per token", color=_INK)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, labelcolor=_INK)
    save_figure(figure, out)


def new_figure() -> Any:
    """An empty matplotlib Figure; raises ModuleNotFoundError, with the command to install it, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ModuleNotFoundError("Plots need matplotlib; install it with: pip install 'pgolf[plot]'") from None
    # No pyplot: it would keep the figure, and choose a window system's backend.
    figure = Figure(
        figsize=(8, 4.5), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12), facecolor="white"
    )
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, out: StrPath) -> None:
    """Write a figure as a PNG file, which is replaced whole; equal figures give equal bytes."""
    with atomic_write(Path(out)) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def _draw(figure: Any, curves: Curves) -> None:
    axes = _axes(figure, curves.last_step, curves.verdict[0].upper() + curves.verdict[1:])
    if curves.steps.size:
        axes.plot(curves.steps, curves.losses, color=_TRAINING, alpha=0.25, linewidth=0.8)
        axes.plot(curves.steps, _smooth(curves.losses), color=_TRAINING, linewidth=1.8, label="training")
    if curves.val_steps.size:
        _draw_validation(axes, curves, color=_VALIDATION, label="validation")
    axes.legend(frameon=False, labelcolor=_INK)


def _draw_runs(figure: Any, runs: Mapping[str, Curves]) -> None:
    last = max(curves.last_step for curves in runs.values())
    axes = _axes(figure, last, "Training loss, smoothed (lines), and validation loss (points)")
    for index, (name, curves) in enumerate(runs.items()):
        repeat, color = divmod(index, len(_RUNS))
        dashes = _DASHES[repeat % len(_DASHES)]
        shown = name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")  # $ would begin a formula
        label = f"{shown}: {curves.verdict}"
        if curves.steps.size:
            axes.plot(
                curves.steps, _smooth(curves.losses), color=_RUNS[color], linestyle=dashes, linewidth=1.5, label=label
            )
            label = "_"  # no second entry in the legend
        if curves.val_steps.size:
            _draw_validation(axes, curves, color=_RUNS[color], linestyle="", label=label)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)


def _draw_validation(axes: Any, curves: Curves, **style: Any) -> None:
    axes.plot(
        curves.val_steps,
        curves.val_losses,
        linewidth=1.2,
        marker="o",
        markersize=4.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        clip_on=False,
        zorder=3,
        **style,
    )


def _axes(figure: Any, last_step: int, title: str) -> Any:
    axes = figure.add_subplot()
    axes.set_xlim(0, max(last_step, 1) * 1.02)
    axes.set_xlabel("step", color=_INK)
    axes.set_ylabel("loss, nats per token", color=_INK)
    axes.set_title(title, loc="left", color=_INK, fontsize=11, pad=10)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_INK)
    axes.tick_params(colors=_INK, length=0)
    axes.xaxis.set_major_locator(_integer_ticks())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return axes


def _integer_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10])


def _smooth(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean over a window of about a fiftieth of the run that ends at each step, shorter at the beginning."""
    window = max(1, losses.size // 50)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    end = np.arange(1, losses.size + 1)
    start = np.maximum(end - window, 0)
    return np.asarray((sums[end] - sums[start]) / (end - start))


def __getattr__(name: str) -> Any:
    return _moved.name_of("report.plot", name)
