"""examples/train_gpt.py, run as people run it, and its lines read as the community's log parsers read them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pgolf
from pgolf.config import Config
from pgolf.config.environment import VARIABLES
from pgolf.scoring.evaluation import Score
from tests.conftest import CORPUS_VOCAB

SCRIPT = Path(__file__).parents[1] / "examples" / "train_gpt.py"

TRAIN = re.compile(r"^step:(\d+)/(\d+) train_loss:(\d+\.\d{4}) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms$", re.M)
VALIDATION = re.compile(
    r"^step:(\d+)/(\d+) val_loss:(\d+\.\d{4}) val_bpb:(\d+\.\d{4}) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms$", re.M
)
FINAL = re.compile(r"^final_int8_zlib_roundtrip val_loss:(\d+\.\d{4}) val_bpb:(\d+\.\d{4}) eval_time:(\d+)ms$", re.M)
EXACT = re.compile(r"^final_int8_zlib_roundtrip_exact val_loss:(\d+\.\d{8}) val_bpb:(\d+\.\d{8})$", re.M)

SMALL = {
    "RECIPE": "tiny",
    "RUN_ID": "first",
    "VOCAB_SIZE": str(CORPUS_VOCAB),
    "NUM_LAYERS": "2",
    "MODEL_DIM": "32",
    "BIGRAM_VOCAB_SIZE": "64",
    "BIGRAM_DIM": "16",
    "TRAIN_SEQ_LEN": "64",
    "TRAIN_BATCH_TOKENS": "256",
    "ITERATIONS": "13",
    "MAX_WALLCLOCK_SECONDS": "0",
    "VAL_LOSS_EVERY": "5",
    "TRAIN_LOG_EVERY": "12",
    "SWA_EVERY": "2",
    "SWA_START_FRAC": "1",
    "EVAL_STRIDE": "32",
}


TAIL = Config.from_recipe("tiny").eval.tail


def run_script(folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """The script in `folder`, in an environment whose only variables of the table are SMALL's and the given ones."""
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=folder,
        env={**kept, **SMALL, **environ},
        capture_output=True,
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def finished(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a run over all its iterations."""
    folder = tmp_path_factory.mktemp("script")
    done = run_script(folder, DATA_PATH=str(small_corpus), MATRIX_LRR="1", COMPILE_MODE="x", USE_XSA="0")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_steps_are_logged_as_the_scripts_log_them(finished: tuple[Path, str]) -> None:
    folder, output = finished
    records = [json.loads(line) for line in (folder / "runs" / "first" / "log.jsonl").read_text().splitlines()]
    losses = {record["step"]: f"{record['loss']:.4f}" for record in records if record["loss"] is not None}
    logged = TRAIN.findall(output)
    assert [int(line[0]) for line in logged] == [*range(1, 11), 12]
    assert all(total == "13" and loss == losses[int(step)] for step, total, loss, _, _ in logged)
    for step, _, _, train_time, step_avg in logged:
        assert float(step_avg) * int(step) == pytest.approx(float(train_time), abs=0.5 + 0.005 * int(step))


def test_validations_are_logged_as_the_scripts_log_them(finished: tuple[Path, str]) -> None:
    folder, output = finished
    records = [json.loads(line) for line in (folder / "runs" / "first" / "log.jsonl").read_text().splitlines()]
    measured = [
        (str(record["step"]), "13", f"{record['val_loss']:.4f}", f"{record['val_bpb']:.4f}")
        for record in records
        if record["val_loss"] is not None
    ]
    assert [line[:4] for line in VALIDATION.findall(output)] == measured
    assert [int(line[0]) for line in measured] == [0, 5, 10, 13]
    assert "\nstep:0/13 val_loss:" in output and " train_time:0ms step_avg:0.00ms\n" in output
    assert output.index("step:10/13 train_loss:") < output.index("step:10/13 val_loss:")


def test_the_result_is_the_reports(finished: tuple[Path, str]) -> None:
    folder, output = finished
    report = json.loads((folder / "runs" / "first" / "report.json").read_text())
    loss, bpb = report["score_loss"], report["score_bpb"]
    (final,) = FINAL.findall(output)
    assert final[:2] == (f"{loss:.4f}", f"{bpb:.4f}")
    assert EXACT.findall(output) == [(f"{loss:.8f}", f"{bpb:.8f}")]
    artifact = (folder / "runs" / "first" / "model.pgolf").stat().st_size
    code = len(SCRIPT.read_bytes())
    assert re.findall(r"^Code size: (\d+) bytes$", output, re.M) == [str(code)]
    assert re.findall(r"^Serialized model int6\+zstd: (\d+) bytes", output, re.M) == [str(artifact)]
    assert re.findall(r"^Total submission size int8\+zlib: (\d+) bytes$", output, re.M) == [str(artifact + code)]
    assert re.findall(r"^peak memory allocated: (\d+) MiB reserved: (\d+) MiB$", output, re.M)
    assert "\nfinal_eval_mode:sliding_window stride:32 batch_seqs:32\n" in output


@pytest.mark.parametrize("kind", ["artifact", "checkpoint", ".pt", ".safetensors", ".ptz"])
def test_weights_in_a_file_are_scored_and_nothing_is_trained(
    finished: tuple[Path, str], small_corpus: Path, tmp_path: Path, kind: str
) -> None:
    run = finished[0] / "runs" / "first"
    path = {
        "artifact": run / "model.pgolf",
        "checkpoint": next(run.glob("checkpoint/step-00000013.npz")),
    }.get(kind, tmp_path / f"final_model{kind}")
    if kind == ".ptz":
        pgolf.convert(run / "model.pgolf", path)
    elif kind.startswith("."):
        pgolf.save_state_dict(pgolf.load(run / "checkpoint" / "step-00000013.npz"), path)
    done = run_script(tmp_path, DATA_PATH=str(small_corpus), RUN_ID="again", LOAD_MODEL_PATH=str(path))
    assert done.returncode == 0, done.stderr
    score = pgolf.evaluate(pgolf.load(path), small_corpus, seq_len=64, stride=32, tail=TAIL)
    assert f"\nloaded_model_exact {losses(score, 8)}\n" in done.stdout
    assert re.search(rf"^loaded_model {losses(score, 4)} eval_time:\d+ms$", done.stdout, re.M)
    assert f"\nload_model_path:{path}\n" in done.stdout and "\nfinal_eval_mode:sliding_window stride:32" in done.stdout
    assert "train_loss" not in done.stdout and not (tmp_path / "runs").exists()
    assert (tmp_path / "logs" / "again.txt").read_text(encoding="utf-8").endswith(done.stdout)
    if kind in ("artifact", ".ptz"):  # the finished run's own score, of the artifact
        assert EXACT.search(finished[1])[0] == f"final_int8_zlib_roundtrip_exact {losses(score, 8)}"


def losses(score: Score, digits: int) -> str:
    return f"val_loss:{score.loss:.{digits}f} val_bpb:{score.bpb:.{digits}f}"


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"LOAD_MODEL_PATH": "no.pt"}, "There is no file no.pt with weights."),
        ({"NUM_LAYERS": "3"}, "The state dict does not fit this model; missing: blocks.2.resid_mix"),
        ({"MODEL_DIM": "64"}, r"tok_emb.weight has shape \(512, 32\); expected \(512, 64\)"),
    ],
)
def test_weights_of_another_model_than_the_environments_are_refused(
    finished: tuple[Path, str], small_corpus: Path, tmp_path: Path, environ: dict[str, str], message: str
) -> None:
    weights = {"LOAD_MODEL_PATH": str(finished[0] / "runs" / "first" / "model.pgolf")}
    done = run_script(tmp_path, DATA_PATH=str(small_corpus), **{**weights, **environ})
    assert done.returncode == 1 and re.match(rf"train_gpt.py: {message}", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_averaging_is_announced(finished: tuple[Path, str]) -> None:
    folder, output = finished
    records = [json.loads(line) for line in (folder / "runs" / "first" / "log.jsonl").read_text().splitlines()]
    snapshots = [record["step"] for record in records if record["snapshot"]]
    assert len(snapshots) >= 2
    assert output.count("swa:start") == 1 and f"\nswa:start step:{snapshots[0]}\n" in output
    assert f"\nswa:applying averaged {len(snapshots)} checkpoints\n" in output


def test_the_setup_is_logged_and_a_typo_warned_about(finished: tuple[Path, str], small_corpus: Path) -> None:
    folder, output = finished
    assert output.startswith("logs/first.txt\n")
    report = json.loads((folder / "runs" / "first" / "report.json").read_text())
    (tokenizer,) = small_corpus.glob("*.model")
    for line in (
        "warning: The environment variable COMPILE_MODE has no effect in pgolf.",
        "warning: The environment variable MATRIX_LRR is unknown and has no effect; did you mean MATRIX_LR?",
        f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={tokenizer}",
        f"train_loader:dataset:{small_corpus.name} train_shards:1",
        f"val_loader:shards pattern={small_corpus}/*_val_*.bin tokens:1999",
        f"model_params:{report['parameters']}",
        "world_size:1 grad_accum_steps:1",
        "attention_mode:gqa num_heads:4 num_kv_heads:2",
        "tie_embeddings:True embed_lr:0.03 head_lr:0.0 matrix_lr:0.02 scalar_lr:0.02",
        "train_batch_tokens:256 train_seq_len:64 iterations:13 warmup_steps:0 max_wallclock_seconds:0.000",
        "seed:42",
    ):
        assert f"\n{line}\n" in output


def test_the_log_file_holds_the_script_and_every_line(finished: tuple[Path, str]) -> None:
    folder, output = finished
    assert (folder / "logs" / "first.txt").read_text(encoding="utf-8") == f"{SCRIPT.read_text()}\n{'=' * 100}\n{output}"


def test_a_time_limit_ends_the_run_early_and_without_a_tokenizer_there_are_no_bits_per_byte(
    small_corpus: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for shard in small_corpus.glob("*.bin"):
        (data / shard.name).write_bytes(shard.read_bytes())
    done = run_script(
        tmp_path, DATA_PATH="data", ITERATIONS="1000000", MAX_WALLCLOCK_SECONDS="0.05", VAL_LOSS_EVERY="0"
    )
    assert done.returncode == 0, done.stderr
    (stopped,) = re.findall(r"^stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/1000000$", done.stdout, re.M)
    assert int(stopped[0]) >= 50
    assert "\nval_bpb:disabled\n" in done.stdout
    assert re.search(rf"^step:{stopped[1]}/1000000 val_loss:\d+\.\d{{4}} val_bpb:nan train_time:", done.stdout, re.M)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ITERATIONS": "many"}, "ITERATIONS = 'many': must be an integer"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE = '8': the script trains in one process"),
        ({"DATA_PATH": "nowhere"}, "nowhere: no such data folder."),
        ({}, "data/datasets/fineweb10B_sp1024"),
        ({"DATA_DIR": "elsewhere"}, f"elsewhere/datasets/fineweb10B_sp{CORPUS_VOCAB}: no such data folder."),
        ({"USE_XSA": "1"}, "USE_XSA = '1': pgolf's attention has no XSA"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence(environ: dict[str, str], message: str, tmp_path: Path) -> None:
    done = run_script(tmp_path, **environ)
    assert done.returncode == 1
    assert done.stderr.startswith("train_gpt.py: ") and message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
