"""The benchmarks run, on tiny shapes on the CPU, and refuse what they do not know. Their numbers are not looked at."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import pgolf

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"

pytestmark = pytest.mark.usefixtures("one_thread")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The benchmarks' folder is where Python looks first, as it is when one is run; what they import goes again."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def run(name: str, out: Path, *arguments: str) -> dict:
    importlib.import_module(name).main(["--quick", "--device", "cpu", "--out", str(out), *arguments])
    result = json.loads(out.read_text())
    assert result["dtype"] == "float32" and {"date", "commit", "modified"} <= set(result)
    assert result["machine"]["limit_tflops"] > 0 and result["machine"]["copy_tb_per_s"] > 0
    return result


def test_training_steps_beside_the_eager_peer(tmp_path: Path) -> None:
    result = run("train_step", tmp_path / "r.json", "--work", "base,small", "--peers", "eager", "--steps", "2")
    assert list(result["work"]) == ["base", "small"]
    base, small = result["work"]["base"], result["work"]["small"]
    assert list(base) == ["pgolf", "eager, 2 micro-batches"]
    assert list(small) == ["pgolf", "eager, 2 micro-batches", "eager, 4 micro-batches"]
    for program in (*base.values(), *small.values()):
        assert program["ms"] >= program["least"] > 0
        assert program["tokens_per_second"] == pytest.approx(256e3 / program["ms"])
    ratio = base["eager, 2 micro-batches"]["ms"] / base["pgolf"]["ms"]
    assert base["eager, 2 micro-batches"]["ratio"] == pytest.approx(ratio)


def test_sliding_evaluation_scores_as_the_eager_peer_does(tmp_path: Path) -> None:
    result = run("sliding_eval", tmp_path / "r.json", "--peers", "eager", "--windows", "41")
    pgolf_, eager = result["programs"]["pgolf"], result["programs"]["eager"]
    assert pgolf_["windows_per_second"] > 0 and eager["ratio"] > 0
    assert result["windows"] == {"length": 32, "stride": 8, "count": 41, "peer_batch": 4}
    assert pgolf_["loss"] == result["float32_loss"]  # which is what it computes in here
    assert abs(pgolf_["loss"] - math.log(64)) > 0.05  # which logits that are all small would show
    assert eager["away_from_float32"] < 1e-5


def test_a_trained_model_is_scored_in_bits_per_byte(small_corpus: Path, tmp_path: Path) -> None:
    from tests.runs import tiny

    trainer = pgolf.Trainer(tiny(), small_corpus)
    list(trainer)
    pgolf.export(trainer.model, tmp_path / "model.pgolf")
    arguments = ("--model", str(tmp_path / "model.pgolf"), "--data", str(small_corpus), "--stride", "8")
    result = run("sliding_eval", tmp_path / "r.json", "--peers", "", "--windows", "5", *arguments)
    assert result["unit"] == "bits per byte" and result["model"] == "model.pgolf"
    assert result["windows"]["length"] == 16


def test_every_operation_beside_pytorch_s(tmp_path: Path) -> None:
    module = importlib.import_module("ops")
    result = run("ops", tmp_path / "r.json")
    names = [row["name"] for row in result["rows"]]
    for operation in ("embed", "qkv", "attention", "mlp_up", "project_residual (mlp out)"):
        assert f"{operation}, forward" in names and f"{operation}, backward" in names
    assert {"head, both ways", "adam", "muon", "grad_norm"} <= set(names)
    assert len(names) == 6 * 2 + 2 + 6 and len(module.OPERATIONS) == 12
    assert all(row["seconds"] > 0 and row["share_of_limit"] > 0 for row in result["rows"])
    assert result["table"].count("\n") == len(names) + 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train_step", ["--work", "base,bass"], "--work has bass; expected some of base, small"),
        ("train_step", ["--peers", "jax"], "--peers has jax; expected some of eager, compiled"),
        ("train_step", ["--script", "train_gpt.py"], "--script needs a file, and with --data a folder"),
        ("sliding_eval", ["--model", "m.pgolf"], "--model and --data go together"),
        ("sliding_eval", ["--windows", "40"], "--windows is 40; expected 1 and a multiple of --batch, 32"),
        ("sliding_eval", ["--peers", "jax"], "--peers has jax; expected eager, compiled or both"),
        ("ops", ["--only", "qkv,gemm"], "--only has gemm; expected some of embed, qkv"),
    ],
)
def test_what_is_unknown_is_refused(
    name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(name).main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


# A public script ------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, pathlib, sys, time
folder = pathlib.Path(os.environ["DATA_PATH"])
names = sorted(path.name for path in folder.glob("*.bin"))
assert names == ["fineweb_train_000000.bin", "fineweb_val_000000.bin"], names
assert os.path.isfile(os.environ["TOKENIZER_PATH"]) and os.environ["MAX_WALLCLOCK_SECONDS"] == "0"
total = int(os.environ["ITERATIONS"])
assert int(os.environ["TRAIN_BATCH_TOKENS"]) == 8 * int(os.environ["TRAIN_SEQ_LEN"]) == 256
for step in range(total + 1):
    if 0 < step < 10:
        print(f"step:{step}/{total} train_loss:2.5 train_time:{7 * step}ms step_avg:7.00ms")
    if step % int(os.environ["VAL_LOSS_EVERY"]) == 0:
        ms = 900 + 3 * step if step else 0
        print(f"step:{step}/{total} val_loss:2.5000 val_bpb:1.2000 train_time:{ms}ms step_avg:3.00ms")
"""


def test_a_script_is_timed_between_its_validations_and_ended(small_corpus: Path, tmp_path: Path) -> None:
    """Three milliseconds a step after the first ones, which compile; nobody waits for what comes after the last."""
    train_step, common = (importlib.import_module(name) for name in ("train_step", "common"))
    script = tmp_path / "train_gpt.py"
    script.write_text(SCRIPT + "time.sleep(10_000)\n")
    result = train_step.measure_script(script, common.WORK["base"].quick(), small_corpus)
    assert result == {"ms": pytest.approx(3.0), "least": pytest.approx(3.0), "script": "train_gpt.py"}


def test_a_script_that_fails_is_quoted(small_corpus: Path, tmp_path: Path) -> None:
    train_step, common = (importlib.import_module(name) for name in ("train_step", "common"))
    script = tmp_path / "train_gpt.py"
    script.write_text("raise SystemExit('CUDA is required')")
    with pytest.raises(ValueError, match=r"train_gpt\.py logged no two validations.*\nCUDA is required"):
        train_step.measure_script(script, common.WORK["base"].quick(), small_corpus)


def test_works_are_those_of_the_recipes() -> None:
    common = importlib.import_module("common")
    base, pr289 = (pgolf.Config.from_recipe(name) for name in ("base", "pr289"))
    for work, config in ((common.WORK["base"], base), (common.WORK["pr289"], pr289)):
        assert (work.tokens, work.length) == (config.train.train_batch_tokens, config.train.train_seq_len)
        assert work.config.to_dict() == config.model.to_dict()
    for work in common.WORK.values():
        assert all(work.sequences % micro == 0 for micro in work.peer_micro)
        assert work.length * work.micro <= 131_072
    assert (
        common.WORK["small"].tokens == 131_072
        and common.WORK["small"].sequences // 8 in common.WORK["small"].peer_micro
    )


def test_cpu_steps_and_sliding_losses_are_the_peer_s(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = importlib.import_module("cpu_workers")
    monkeypatch.setattr(workers, "THREADS", 1)
    shape = workers.Shape(64, 32, 2, 4, 2, 64, 64, 256, 128, 16)
    program = workers.PROGRAMS["agreement"](shape)
    with program.pgolf.folder:
        pairs = program.agreement(3, windows=5, stride=8, batch=4)
    assert [pair["what"] for pair in pairs] == ["loss of step 1", "loss of step 2", "loss of step 3", "sliding loss"]
    for pair in pairs:
        assert pair["pgolf"] == pytest.approx(pair["peer"], rel=1e-5)
