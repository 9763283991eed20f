"""`pgolf inspect`: what is in artifacts, checkpoints, run folders and data, and that nothing in them is executed."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pgolf
from pgolf.artifacts import container
from pgolf.cli.chart import loss_chart
from pgolf.common.errors import FormatError
from pgolf.report.inspection import (
    checkpoint_step,
    entropy_bits,
    inspect_artifact,
    inspect_checkpoint,
    inspect_run,
    kind_of,
)
from pgolf.runs.records import Curves
from pgolf.training.trainer import Trainer
from tests.runs import pgolf_, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a model with tensors of every kind of encoding."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    policy = [["tok_emb.*", "int8"], ["*mlp.fc*", "int5"], ["*", "int6"]]
    config = tiny(checkpoint_every=4, val_loss_every=2, export__small_numel=10, export__policy=policy)
    trainer = Trainer(config, small_corpus, run_dir=folder)
    list(trainer)
    trainer.finish()
    return folder


@pytest.fixture(scope="module")
def stopped(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its fifth step."""
    folder = tmp_path_factory.mktemp("runs") / "stopped"
    trainer = Trainer(tiny(checkpoint_every=4), small_corpus, run_dir=folder)
    for record in trainer:
        if record.step == 5:
            break
    return folder


def last_json(*arguments: str | Path) -> dict[str, Any]:
    result = pgolf_(*arguments, "--json")
    assert result.exit_code == 0, result.output
    value: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return value


def refused(path: Path, message: str) -> None:
    result = pgolf_("inspect", path)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("Error: ") and message in result.stderr, result.stderr


# Artifacts


@given(st.lists(st.integers(-128, 127), max_size=60))
@settings(deadline=None)
def test_entropy_is_that_of_the_counts(values: list[int]) -> None:
    shares = [values.count(value) / len(values) for value in set(values)]
    expected = sum(-share * np.log2(share) for share in shares)
    assert entropy_bits(np.array(values, np.int8)) == pytest.approx(expected, abs=1e-12)


def test_entropies_that_are_known() -> None:
    assert entropy_bits(np.arange(-128, 128).astype(np.int8).reshape(16, 16)) == 8
    assert entropy_bits(np.full((3, 3), -7, np.int8)) == 0
    assert entropy_bits(np.array([[1, 1], [0, 2]], np.int8)) == 1.5


def test_an_artifact(run: Path) -> None:
    path = run / "model.pgolf"
    summary = inspect_artifact(path)
    header, encoded = container.unpack(path)
    assert (summary.bytes, summary.limit_bytes, summary.version) == (path.stat().st_size, 16_000_000, 2)
    assert summary.model.to_stored() == header["model"]
    assert (summary.train_seq_len, summary.steps, summary.tokens, summary.seed) == (16, 6, 960, 42)
    assert (summary.pgolf, summary.zstd) == (pgolf.__version__, header["zstd"])
    assert summary.weights == pgolf.load(path).num_parameters
    assert [tensor.name for tensor in summary.tensors] == list(encoded)
    assert {tensor.encoding for tensor in summary.tensors} == {"int5", "int6", "int8", "fp16", "fp32"}
    for tensor in summary.tensors:
        stored = encoded[tensor.name]
        assert (tensor.encoding, tensor.shape) == (stored.encoding, stored.values.shape)
        assert tensor.raw_bytes == len(stored.payload())
        assert tensor.compressed_bytes == len(container.encode_stream(stored))
        assert tensor.stored_bits == 8 * tensor.compressed_bytes / stored.values.size
        assert tensor.entropy == (None if stored.scale is None else entropy_bits(stored.values))
    assert summary.shared_bytes + sum(tensor.compressed_bytes for tensor in summary.tensors) == summary.bytes


def test_an_artifact_on_the_command_line(run: Path) -> None:
    path = run / "model.pgolf"
    summary = inspect_artifact(path)
    assert last_json("inspect", path) == {"kind": "artifact", **json.loads(json.dumps(summary.to_dict()))}
    shown = pgolf_("inspect", path, "--threads", "1")
    assert shown.exit_code == 0, shown.output
    for tensor in summary.tensors:
        (line,) = (line for line in shown.stdout.splitlines() if line.split()[:1] == [tensor.name])
        assert "×".join(map(str, tensor.shape)) in line or not tensor.shape
        for number in (f"{tensor.raw_bytes:,}", f"{tensor.compressed_bytes:,}", f"{tensor.stored_bits:.3f}"):
            assert number in line
        assert ("–" if tensor.entropy is None else f"{tensor.entropy:.3f}") in line
    assert "6 steps, 960 tokens, seed 42" in shown.stdout
    assert f"{16_000_000 - summary.bytes:,} bytes" in shown.stdout


def test_an_artifact_that_no_trainer_made(run: Path, tmp_path: Path) -> None:
    model = pgolf.GPT(pgolf.load(run / "model.pgolf").config, seed=1)
    pgolf.export(model, tmp_path / "fresh.pgolf")
    summary = inspect_artifact(tmp_path / "fresh.pgolf")
    assert (summary.train_seq_len, summary.steps, summary.tokens, summary.seed) == (None, None, None, None)
    shown = pgolf_("inspect", tmp_path / "fresh.pgolf")
    assert shown.exit_code == 0 and "not by pgolf's trainer" in shown.stdout


@pytest.mark.parametrize("at", [30, 40, 200])
def test_a_damaged_artifact(at: int, run: Path, tmp_path: Path) -> None:
    content = bytearray((run / "model.pgolf").read_bytes())
    content[at] ^= 0x55
    (tmp_path / "damaged.pgolf").write_bytes(content)
    refused(tmp_path / "damaged.pgolf", "damaged.pgolf: ")


# Checkpoints


def test_a_checkpoint(run: Path) -> None:
    path = run / "checkpoint" / "step-00000004.npz"
    summary = inspect_checkpoint(path)
    assert (summary.step, summary.bytes, summary.dtype) == (4, path.stat().st_size, "float32")
    assert (summary.position, summary.data_tokens) == (4 * 162, 20_000)
    assert summary.model.model_dim == 16 and summary.config["train"]["iterations"] == 6
    weights = summary.groups[0]
    parameters = pgolf.load(run / "model.pgolf").num_parameters
    assert weights[0] == "weight" and weights[2] == 4 * parameters
    assert {what for what, _, _ in summary.groups} >= {"weight", "momentum", "adam_m", "adam_v"}
    value = last_json("inspect", path)
    assert value == {"kind": "checkpoint", **json.loads(json.dumps(summary.to_dict()))}
    shown = pgolf_("inspect", path).stdout
    assert f"{weights[1]:,} tensors, {weights[2]:,} bytes" in shown and "20,000 tokens in 1 shard" in shown
    assert [checkpoint_step(found) for found in sorted(path.parent.iterdir())] == [4, 6]


class Bomb:
    """A pickle that writes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["torch", "object array", "header", "bare pickle"])
def test_nothing_is_executed(kind: str, tmp_path: Path) -> None:
    target, path = tmp_path / "executed", tmp_path / "step-00000001.npz"
    bomb = pickle.dumps(Bomb(target))
    array = np.array([Bomb(target)], dtype=object)
    if kind == "torch":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", bomb)
    elif kind == "bare pickle":
        path.write_bytes(bomb)
    else:
        values = np.frombuffer(json.dumps({"version": 1, "arrays": ["weight.a"]}).encode(), np.uint8)
        content = io.BytesIO()
        np.savez(content, header=array if kind == "header" else values, **{"weight.a": array})
        path.write_bytes(content.getvalue())
    refused(path, "step-00000001.npz")
    assert not target.exists()
    pickle.loads(bomb)
    assert target.exists(), "the bomb must be one"


def test_a_checkpoint_with_other_values(run: Path, tmp_path: Path) -> None:
    """As a checkpoint of the same version, with values that pgolf does not write."""
    source = run / "checkpoint" / "step-00000004.npz"
    with np.load(source) as file:
        arrays = {name: file[name] for name in file.files}
    header = json.loads(arrays["header"].tobytes())
    others: list[dict[str, Any]] = [
        {"config": {}},
        {"config": []},
        {"config": {"model": {"vocab_size": 1}}},
        {"step": "four"},
        {"seconds": float("inf")},
        {"seconds": None},
        {"data": {"tokens": 1}},
        {"data": None},
    ]
    for broken in others:
        arrays["header"] = np.frombuffer(json.dumps({**header, **broken}).encode(), np.uint8)
        np.savez(tmp_path / "other.npz", **arrays)
        with pytest.raises(FormatError, match=r"other\.npz: the checkpoint's values are not those that pgolf writes"):
            inspect_checkpoint(tmp_path / "other.npz")


# Run folders


def test_a_finished_run(run: Path) -> None:
    summary = inspect_run(run)
    assert (summary.step, summary.tokens, summary.config.train.iterations) == (6, 960, 6)
    assert summary.report is not None and summary.report.to_dict() == {
        **json.loads((run / "report.json").read_text()),
        "memory": summary.report.memory,
    }
    assert summary.checkpoint == run / "checkpoint" / "step-00000006.npz"
    assert summary.artifact_bytes == (run / "model.pgolf").stat().st_size
    value = last_json("inspect", run)
    assert (value["kind"], value["finished"], value["step"]) == ("run", True, 6)
    assert (value["loss"], value["val_loss"]) == (summary.curves.losses[-1], summary.curves.val_losses[-1])  # type: ignore[union-attr]
    assert value["report"]["score_loss"] == summary.report.score_loss
    assert value["config"] == summary.config.to_dict()
    shown = pgolf_("inspect", run)
    assert shown.exit_code == 0, shown.output
    for expected in ("finished", "6, 960", "step-00000006.npz", f"{summary.report.score_loss:.4f}", "●", "step 6"):
        assert expected in shown.stdout
    assert "To go on" not in shown.stdout


def test_a_run_that_was_stopped(stopped: Path) -> None:
    with (stopped / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "tok')  # killed while it wrote
    summary = inspect_run(stopped)
    assert (summary.step, summary.report, summary.artifact_bytes) == (5, None, None)
    last = json.loads((stopped / "log.jsonl").read_text().splitlines()[4])
    assert (summary.share_of_limit, summary.memory_mib) == (last["share_of_limit"], last["memory_mib"])
    shown = pgolf_("inspect", stopped)
    assert shown.exit_code == 0 and "not finished" in shown.stdout
    assert f"{last['share_of_limit']:.1%} of the limit, {last['memory_mib']:,.0f} MiB, cpu " in shown.stdout
    assert shown.stdout.endswith(f"To go on after step 4:\n    pgolf train --run-dir {stopped} --resume\n")
    value = last_json("inspect", stopped)
    assert (value["finished"], value["report"], value["val_loss"]) == (False, None, None)


def test_a_run_that_has_just_begun(stopped: Path, tmp_path: Path) -> None:
    for log in (None, "", '{"step": 0,'):
        shutil.copy(stopped / "config.toml", tmp_path)
        if log is not None:
            (tmp_path / "log.jsonl").write_text(log)
        summary = inspect_run(tmp_path)
        assert (summary.step, summary.curves, summary.checkpoint, summary.device) == (0, None, None, None)
        shown = pgolf_("inspect", tmp_path)
        assert shown.exit_code == 0 and "not finished" in shown.stdout and "●" not in shown.stdout


def test_limits_are_those_of_the_run(tmp_path: Path) -> None:
    for changes, text in (
        ({"iterations": 0, "max_wallclock_seconds": 600.0}, "10:00 min"),
        ({"iterations": 30, "max_wallclock_seconds": 60.0}, "30 steps or 1:00 min"),
        ({"replay": "log.jsonl"}, "the steps of log.jsonl"),
    ):
        (tmp_path / "config.toml").write_text(tiny(**changes).to_toml())
        assert f" {text} " in pgolf_("inspect", tmp_path).stdout


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.jsonl", '{"step": 1}\n{"loss": 2}\n', "log.jsonl, line 2: this is not a step record"),
        ("report.json", "{", "report.json: this is not the report of a run"),
        ("report.json", '{"val_loss": 1}', "report.json: this is not the report of a run"),
        ("report.json", {"steps": "six"}, "report.json: this is not the report of a run (steps is 'six')"),
        ("report.json", {"memory": 1}, "report.json: this is not the report of a run (memory is 1)"),
        ("report.json", "[" * 100_000, "report.json: this is not the report of a run"),
        ("log.jsonl", "[" * 100_000 + "\n", "log.jsonl, line 1: this is not a step record"),
        ("log.jsonl", '{"step": -1}\n', "log.jsonl, line 1: this is not a step record"),
        ("log.jsonl", f'{{"step": 1, "loss": {10**400}}}\n', "log.jsonl, line 1: this is not a step record"),
        ("log.jsonl", '{"step": 1, "loss": 2, "seconds": 1e999}\n', "in the last record tokens, seconds, "),
        ("log.jsonl", '{"step": 1, "loss": 2, "tokens": "many"}\n', "in the last record tokens, seconds, "),
        ("log.jsonl", '{"step": 1, "loss": 2, "memory_mib": []}\n', "share_of_limit or memory_mib is not a number"),
        ("log.jsonl", '{"step": 1, "loss": 2, "share_of_limit": NaN}\n', "in the last record"),
        ("report.json", "[]", "report.json: this is not the report of a run"),
        ("config.toml", "[model]\nnum_layer = 1\n", "model.num_layer is not a key"),
    ],
)
def test_a_run_with_a_broken_file(
    name: str, content: str | dict[str, Any], message: str, run: Path, tmp_path: Path
) -> None:
    for file in ("config.toml", "log.jsonl", "report.json"):
        shutil.copy(run / file, tmp_path)
    if isinstance(content, dict):
        content = json.dumps(json.loads((run / name).read_text()) | content)
    (tmp_path / name).write_text(content)
    refused(tmp_path, message)


def test_losses_that_are_not_finite_are_not_drawn(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.toml", tmp_path)
    lines = ['{"step": 2, "loss": NaN}', '{"step": 3, "loss": 4.5, "val_loss": Infinity}', '{"step": 1, "loss": 5}']
    (tmp_path / "log.jsonl").write_text("".join(line + "\n" for line in lines))
    found = inspect_run(tmp_path).curves
    assert found is not None and (found.steps.tolist(), found.last_step, found.val_steps.size) == ([3, 1], 3, 0)
    assert "step 3" in pgolf_("inspect", tmp_path).stdout


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"not a run folder, as it holds no config\.toml"):
        inspect_run(tmp_path)


# The community's files


def test_weights_of_the_community(run: Path, tmp_path: Path) -> None:
    model = pgolf.load(run / "model.pgolf")
    pgolf.convert(run / "model.pgolf", tmp_path / "m.ptz")
    pgolf.save_state_dict(model, tmp_path / "m.pt")
    pgolf.save_state_dict(model, tmp_path / "m.safetensors")
    artifact = inspect_artifact(run / "model.pgolf")
    encodings = {tensor.name: tensor.encoding for tensor in artifact.tensors}
    for name, kind, quantised in (
        ("m.ptz", "bundle", True),
        ("m.pt", "torch", False),
        ("m.safetensors", "safetensors", False),
    ):
        value = last_json("inspect", tmp_path / name)
        assert (value["kind"], value["format"], value["quantised"], value["why_not"]) == (
            "weights",
            kind,
            quantised,
            None,
        )
        assert value["bytes"] == (tmp_path / name).stat().st_size
        assert value["model"]["num_layers"] == model.config.num_layers
        assert {entry[0]: tuple(entry[2]) for entry in value["tensors"]} == {
            tensor.name: tensor.shape for tensor in artifact.tensors
        }
        if quantised:
            assert {entry[0]: entry[1] for entry in value["tensors"]} == encodings
    pgolf.save_state_dict(
        {"smeargate.gate": np.zeros(4), "bigram_hash.proj.weight": np.ones((2, 3))}, tmp_path / "m.pt"
    )
    value = last_json("inspect", tmp_path / "m.pt")
    assert value["model"] is None and value["why_not"].startswith("it has no tensor tok_emb.weight")
    printed = pgolf_("inspect", tmp_path / "m.pt").stdout
    assert "2×3" in printed and "not pgolf's: it has no tensor tok_emb.weight" in printed


# Which is which


def test_kinds(run: Path, small_corpus: Path, tmp_path: Path) -> None:
    shard = next(small_corpus.glob("*.bin"))
    kinds = {run: "run", run / "model.pgolf": "artifact", small_corpus: "data", shard: "data"}
    kinds[run / "checkpoint" / "step-00000006.npz"] = "checkpoint"
    pgolf.save_state_dict(pgolf.load(run / "model.pgolf"), tmp_path / "m.pt")
    kinds[tmp_path / "m.pt"] = "weights"
    assert {path: kind_of(path) for path in kinds} == kinds
    for path in (small_corpus, shard):
        assert last_json("inspect", path) == last_json("data", "inspect", path)
    refused(tmp_path, "this folder holds neither a run's config.toml nor *_train_*.bin or *_val_*.bin shards")
    refused(tmp_path / "nothing", "no such file or folder")
    (tmp_path / "text").write_text("hello, world")
    refused(tmp_path / "text", "the file begins with b'hello, w'")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "the file begins with b''")


# The curve in the terminal


def curves(steps: list[int], losses: list[float], val: dict[int, float]) -> Curves:
    return Curves(
        np.array(steps, np.int64), np.array(losses), np.array([*val], np.int64), np.array([*val.values()]), None
    )


def dots(chart: str, width: int, height: int) -> np.ndarray[Any, Any]:
    """(4 · height, 2 · width) of the dots in a drawing; validations are none."""
    cells = np.zeros((4 * height, 2 * width), bool)
    order = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1)]
    for y, line in enumerate(chart.splitlines()[:height]):
        for x, character in enumerate(line[8:]):
            if 0x2800 <= ord(character) < 0x2900:
                for bit, (row, column) in enumerate(order):
                    cells[4 * y + row, 2 * x + column] = bool((ord(character) - 0x2800) >> bit & 1)
    return cells


def test_a_falling_line_is_drawn_from_the_upper_left_to_the_lower_right() -> None:
    drawn = dots(loss_chart(curves(list(range(32)), [31.0 - step for step in range(32)], {}), 16, 8), 16, 8)
    assert np.array_equal(drawn, np.eye(32, dtype=bool))


@given(st.integers(1, 400), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_the_line_has_no_gaps(count: int, seed: int) -> None:
    losses = np.random.default_rng(seed).normal(size=count)
    drawn = dots(loss_chart(curves(list(range(1, count + 1)), losses.tolist(), {}), 20, 6), 20, 6)
    columns = np.flatnonzero(drawn.any(axis=0))
    assert columns.tolist() == list(range(columns[0], 40))
    spans = [(np.flatnonzero(drawn[:, column]).min(), np.flatnonzero(drawn[:, column]).max()) for column in columns]
    for column, (top, bottom) in zip(columns, spans, strict=True):
        assert drawn[top : bottom + 1, column].all()
    for (top, bottom), (next_top, next_bottom) in itertools.pairwise(spans):
        assert next_top <= bottom + 1 and next_bottom >= top - 1


def test_the_scale_and_the_validations() -> None:
    chart = loss_chart(curves([1, 2, 3, 4], [5.0, 4.0, 3.0, 2.5], {0: 6.25, 4: 2.0}), 10, 5).splitlines()
    assert len(chart) == 6 and all(len(line) <= 18 for line in chart)
    assert chart[0].startswith("  6.250 ●") and chart[4].startswith("  2.000 ") and chart[4].endswith("●")
    assert "".join(chart).count("●") == 2
    assert chart[5] == "        0   step 4"


def test_charts_of_little() -> None:
    """One validation, one step, steps that are all alike, more steps than columns: means of what falls on each."""
    assert loss_chart(curves([], [], {0: 6.0})).count("●") == 1
    assert dots(loss_chart(curves([1], [3.0], {}), 5, 2), 5, 2).sum() == 1
    assert dots(loss_chart(curves(list(range(1, 9)), [3.0] * 8, {}), 5, 2), 5, 2)[0].sum() == 9
    noisy = [4.0 + (-1) ** step for step in range(1000)]
    drawn = dots(loss_chart(curves(list(range(1000)), noisy, {0: 5.0, 999: 3.0}), 5, 4), 5, 4)
    assert np.flatnonzero(drawn.any(axis=1)).tolist() == [7, 8], "the mean, in the middle of 16 rows"
