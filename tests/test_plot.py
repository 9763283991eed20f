"""The picture of a run, and what is refused."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgolf.common import errors
from pgolf.report import plot
from pgolf.report.plot import plot_loss, plot_runs
from pgolf.runs.records import Curves

RECORDS: list[dict[str, Any]] = [
    {"step": 0, "loss": None, "val_loss": 6.9, "val_bpb": 3.8},
    *({"step": step, "loss": 6.9 / step**0.2, "val_loss": None, "val_bpb": None} for step in range(1, 40)),
    {"step": 40, "loss": 3.3, "val_loss": 3.4, "val_bpb": 1.9},
]


def size(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def write_log(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_log_and_its_records_give_the_same_picture(tmp_path: Path) -> None:
    plot_loss(write_log(tmp_path / "log.jsonl"), tmp_path / "log.png")
    plot_loss(RECORDS, tmp_path / "records.png")
    assert size(tmp_path / "log.png") == (1280, 720)
    assert (tmp_path / "log.png").read_bytes() == (tmp_path / "records.png").read_bytes()


def test_the_curves_are_those_of_the_records() -> None:
    curves = Curves.of(RECORDS)
    assert curves.steps.tolist() == list(range(1, 41))
    assert curves.losses[-1] == 3.3
    assert (curves.val_steps.tolist(), curves.val_losses.tolist()) == ([0, 40], [6.9, 3.4])
    assert curves.verdict == "validation loss 3.4000, 1.9000 bits per byte"
    without_validation = Curves.of(RECORDS[1:5])
    assert without_validation.verdict == f"training loss {6.9 / 4**0.2:.4f}"


@pytest.mark.parametrize("records", [RECORDS[:1], RECORDS[1:2], RECORDS[1:5]], ids=["validation", "a step", "steps"])
def test_short_runs_have_a_picture(records: list[dict[str, Any]], tmp_path: Path) -> None:
    plot_loss(records, tmp_path / "loss.png")
    assert size(tmp_path / "loss.png") == (1280, 720)


def test_smoothing_is_the_mean_of_the_window_that_ends_at_each_step() -> None:
    losses = np.random.default_rng(0).normal(size=170)
    expected = [losses[max(0, end - 3) : end].mean() for end in range(1, 171)]
    np.testing.assert_allclose(plot._smooth(losses), expected, rtol=1e-12)
    assert plot._smooth(losses[:7]).tolist() == pytest.approx(losses[:7].tolist())


@pytest.mark.parametrize("count", [1, 2, 9], ids=["one", "two", "more than there are colours"])
def test_runs_over_each_other(count: int, tmp_path: Path) -> None:
    runs = {
        f"run {n}": Curves.of([{**record, "step": record["step"] * n} for record in RECORDS])
        for n in range(1, count + 1)
    }
    plot_runs(runs, tmp_path / "runs.png")
    assert size(tmp_path / "runs.png") == (1280, 720)
    figure = plot.new_figure()
    plot._draw_runs(figure, runs)
    (axes,) = figure.axes
    assert axes.get_xlim()[1] == pytest.approx(40 * count * 1.02)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        f"run {n}: validation loss 3.4000, 1.9000 bits per byte" for n in range(1, count + 1)
    ]
    training, validation = axes.lines[::2], axes.lines[1::2]
    assert len({(line.get_color(), line.get_linestyle()) for line in training}) == count
    for curves, line, points in zip(runs.values(), training, validation, strict=True):
        assert line.get_color() == points.get_color()
        np.testing.assert_array_equal(line.get_ydata(), plot._smooth(curves.losses))
        np.testing.assert_array_equal(points.get_xydata(), np.stack([curves.val_steps, curves.val_losses], axis=1))


def test_runs_without_one_of_the_curves(tmp_path: Path) -> None:
    runs = {"validation": Curves.of(RECORDS[:1]), "training": Curves.of(RECORDS[1:5])}
    plot_runs(runs, tmp_path / "runs.png")
    figure = plot.new_figure()
    plot._draw_runs(figure, runs)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [label.partition(":")[0] for label in labels] == ["validation", "training"]
    with pytest.raises(ValueError, match="at least one run"):
        plot_runs({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_line_that_was_being_written_is_left_out(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl")
    whole = Curves.of(log)
    with log.open("a") as file:
        file.write('{"step": 41, "loss": 3.')
    assert Curves.of(log).steps.tolist() == whole.steps.tolist()


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[1]", '{"loss": 1.0}', '{"step": 1, "loss": "high"}', '{"step": null}', "\x80"),
        *('{"step": -1}', '{"step": 9007199254740992}', '{"step": NaN}', '{"step": Infinity}', '{"step": [1]}'),
        *('{"step": 1, "loss": 1' + "0" * 400 + "}", '{"step": 1, "val_bpb": ' + "9" * 5000 + "}"),
        *("[" * 100_000, '{"step":' * 100_000),
    ],
    ids=lambda line: line[:24].encode("unicode_escape").decode(),
)
def test_a_broken_line_is_named(line: str, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.jsonl", RECORDS[:2])
    with log.open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    with pytest.raises(errors.FormatError, match=r"log\.jsonl, line 3: this is not a step record"):
        plot_loss(log, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_what_holds_no_loss_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl: no such log"):
        plot_loss(tmp_path / "nowhere.jsonl", tmp_path / "loss.png")
    with pytest.raises(errors.FormatError, match=r"log\.jsonl: the records hold no loss"):
        plot_loss(write_log(tmp_path / "log.jsonl", []), tmp_path / "loss.png")
    with pytest.raises(ValueError, match="no loss"):
        plot_loss([], tmp_path / "loss.png")


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "loss.png"
    out.write_bytes(b"old")

    def fail(figure: Any, curves: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(plot, "_draw", fail)
    with pytest.raises(OSError, match="disk full"):
        plot_loss(RECORDS, out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"loss.png": b"old"}


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pgolf\[plot\]'"):
        plot_loss(RECORDS, tmp_path / "loss.png")
