"""Files that earlier versions wrote are read, scored and resumed by this one (tests/golden/README.md)."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import pgolf
from pgolf.artifacts.artifact import read_artifact
from pgolf.artifacts.container import ENCODINGS, unpack
from pgolf.cli.app import app
from pgolf.config import Config
from pgolf.config.environment import VARIABLES
from pgolf.data.manifest import Manifest
from pgolf.runs import checkpoint
from pgolf.runs.records import read_report
from pgolf.training.trainer import Trainer
from tests.runs import assert_same_state, last_json, log_of, pgolf_

GOLDEN = Path(__file__).with_name("golden")

# Another instruction set sums in another order, and late QAT may then round a weight to its other neighbour.
ANOTHER_PROCESSOR = 1e-3
ROUNDING = 1e-5


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the golden folder as the working folder, since its runs name their data relative to it."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    return tmp_path / "golden"


def expected() -> dict[str, Any]:
    value: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
    return value


def test_the_artifact_holds_the_same_weights() -> None:
    path = GOLDEN / "finished" / "model.pgolf"
    assert {tensor.encoding for tensor in unpack(path)[1].values()} == set(ENCODINGS)
    header, arrays = read_artifact(path)
    assert expected()["header"].items() <= header.items()
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    assert digest.hexdigest() == expected()["weights_sha256"]


def test_the_artifact_scores_the_same(golden: Path) -> None:
    report = read_report(golden / "finished" / "report.json")
    assert report is not None
    model = pgolf.load(golden / "finished" / "model.pgolf", device="cpu")
    standard = pgolf.evaluate(model, golden / "data", method="standard")
    assert standard.loss == pytest.approx(report.val_loss_quantised, rel=ROUNDING)
    assert standard.bpb == pytest.approx(report.val_bpb_quantised, rel=ROUNDING)
    score = last_json(pgolf_("eval", "finished", "--json", "--device", "cpu"))
    assert score["loss"] == pytest.approx(report.score_loss, rel=ROUNDING)
    assert score["bpb"] == pytest.approx(report.score_bpb, rel=ROUNDING)
    assert (score["tokens"], score["bytes"]) == (report.score_tokens, report.score_bytes)


def test_the_run_goes_on_from_its_checkpoint(golden: Path) -> None:
    arrays, values = checkpoint.load(golden / "half" / "checkpoint" / "step-00000007.npz")
    config = Config.from_toml(golden / "half" / "config.toml")
    runs = []
    for threads in (1, 3):
        folder = golden / f"half-{threads}"
        shutil.copytree(golden / "half", folder)
        before = pgolf.get_num_threads()
        try:
            pgolf.set_num_threads(threads)
            trainer = Trainer(config, run_dir=folder, device="cpu", resume=True)
            state, _ = trainer.state()
            assert state.keys() == arrays.keys() and trainer.step == values["step"] == 7
            assert all(np.array_equal(array, state[name]) for name, array in arrays.items())
            list(trainer)
        finally:
            pgolf.set_num_threads(before)
        runs.append(trainer)
    assert_same_state(*runs)
    found, whole = log_of(golden / "half-1"), log_of(golden / "finished")
    assert found == log_of(golden / "half-3")
    assert [record["step"] for record in found] == list(range(13))
    for record, recorded in zip(found, whole, strict=True):
        assert recorded.keys() <= record.keys()
        for key, value in recorded.items():
            assert record[key] == (pytest.approx(value, rel=ANOTHER_PROCESSOR) if isinstance(value, float) else value)


def test_what_a_run_left_is_read(golden: Path) -> None:
    for run in ("half", "finished"):
        assert last_json(pgolf_("inspect", run, "--json"))
    result = pgolf_("data", "inspect", "data", "--verify", "--json")
    assert last_json(result)
    manifest = Manifest.find(golden / "data")
    assert manifest is not None
    assert (manifest.val.tokens, manifest.val.text_bytes) == (2477, 5762)


def test_names_are_kept() -> None:
    names = json.loads((GOLDEN / "names.json").read_text())
    assert set(names["pgolf"]) <= set(pgolf.__all__)
    config = Config().to_dict()
    for table, keys in names["config"].items():
        assert set(keys) <= config[table].keys()
    assert set(names["variables"]) <= VARIABLES.keys()
    found = options(typer.main.get_command(app))
    for command, known in names["commands"].items():
        assert set(known) <= found[command], command


def options(command: Any, name: str = "") -> dict[str, set[str]]:
    """The options of a command and of all below it, by the words that call it."""
    if hasattr(command, "commands"):
        return {
            key: value
            for word, each in command.commands.items()
            for key, value in options(each, f"{name} {word}".strip()).items()
        }
    return {name: {word for param in command.params for word in (*param.opts, *param.secondary_opts)}}
