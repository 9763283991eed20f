"""What can fail under a run, each told in a sentence, and the run goes on to the same bits once the cause is gone."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgolf.config import Config
from pgolf.data.shards import read_shard, write_shard
from pgolf.runs import checkpoint
from pgolf.training.trainer import step_settings
from tests.runs import log_of, pgolf_
from tests.test_interrupt import NEXT_BATCH, assert_same_run, child, command_in, held, train, wait_for


def go_on(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Lets a held command go on; its exit code and what it wrote on standard error."""
    _, err = process.communicate("\n")
    assert "Traceback" not in err
    return process.returncode, err


def resumed(err: str, run: Path) -> Path:
    """The run, gone on with by the command that was printed."""
    result = pgolf_(*command_in(err))
    assert result.exit_code == 0, result.output
    return run


def assert_whole(run: Path, *steps: int) -> None:
    """Exactly the checkpoints of these steps are there, each whole, and no half-written file."""
    paths = sorted((run / "checkpoint").iterdir())
    assert [path.name for path in paths] == [f"step-{step:08d}.npz" for step in steps]
    for path, step in zip(paths, steps, strict=True):
        assert checkpoint.load(path)[1]["step"] == step
    assert not list(run.glob(".*"))


# No space: the largest file that a process may write is limited, which is a full disk of a known size.


@pytest.mark.parametrize(
    ("where", "call", "limit", "sentence", "steps"),
    [
        (NEXT_BATCH, 7, 1, "{run}/log.jsonl: File too large.", (4,)),
        (NEXT_BATCH, 7, 9_999, r"The checkpoint {run}/checkpoint/step-00000008.npz, 0 MB, cannot be written (File too "
         "large); step-00000004.npz before it is whole.", (4,)),
        (("pgolf.training.trainer", "Trainer.use_average"), 1, 999, "{run}/model.pgolf: File too large.", (12, 16)),
        (("pgolf.training.finish", "Report"), 1, 99, "{run}/report.json: File too large.", (12, 16)),
    ],
    ids=["log", "checkpoint", "artifact", "report"],
)  # fmt: skip
def test_a_full_disk(
    where: tuple[str, str], call: int, limit: int, sentence: str, steps: tuple[int, ...],
    config_file: Path, small_corpus: Path, plain: Path, tmp_path: Path,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    with held(where, call, *train(config_file, small_corpus, run)) as process:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        code, err = go_on(process)
    assert (code, err.partition(" To go on")[0].removeprefix("Error: ")) == (1, sentence.format(run=run))
    assert_whole(run, *steps)
    assert_same_run(resumed(err, run), plain)


def test_a_log_on_a_full_disk(config_file: Path, small_corpus: Path, plain: Path, tmp_path: Path) -> None:
    """A device that is always full, before there is a checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").symlink_to("/dev/full")
    result = pgolf_(*train(config_file, small_corpus, run))
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: {run}/log.jsonl: No space left on device. There is no checkpoint to go on from.\n"
    )
    (run / "log.jsonl").unlink()
    result = pgolf_(*train(config_file, small_corpus, run))
    assert result.exit_code == 0, result.output
    assert_same_run(run, plain)


# Folders that cannot be written to


def fail(number: int) -> Callable[..., Any]:
    def failing(*args: Any, **named: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return failing


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_run_folder_that_cannot_be_made(
    number: int, config_file: Path, small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(Path, "mkdir", fail(number))
    result = pgolf_(*train(config_file, small_corpus, run))
    assert result.exit_code == 1
    assert result.stderr == f"Error: The run folder {run} cannot be written ({os.strerror(number)}).\n"


def test_a_file_in_the_run_folders_place(config_file: Path, small_corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    result = pgolf_(*train(config_file, small_corpus, tmp_path / "run"))
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"Error: The run folder {tmp_path}/run cannot be written (")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_run_folder_that_vanishes(config_file: Path, small_corpus: Path, plain: Path, tmp_path: Path) -> None:
    """A disk that is taken away under the run, and comes back."""
    run, away = tmp_path / "run", tmp_path / "away"
    with held(NEXT_BATCH, 7, *train(config_file, small_corpus, run)) as process:
        run.rename(away)
        code, err = go_on(process)
    assert code == 2
    assert err == f"Error: {run}/log.jsonl: No such file or directory. There is no checkpoint to go on from.\n"
    away.rename(run)
    assert_whole(run, 4)
    assert pgolf_("train", "--run-dir", run, "--resume").exit_code == 0
    assert_same_run(run, plain)


# Numbers that are not finite


@pytest.mark.parametrize("step", [3, 10])
def test_a_loss_that_is_not_finite(
    step: int, config_file: Path, small_corpus: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The updates before grow beyond what float32 can square, as with a learning rate that is much too high."""
    launched: list[float] = []

    def too_high(config: Config, lr_scale: float, momentum: float) -> dict[str, Any]:
        launched.append(lr_scale)
        return step_settings(config, lr_scale, momentum) | ({"lr": [1e30] * 4} if len(launched) == step - 1 else {})

    monkeypatch.setattr("pgolf.training.trainer.step_settings", too_high)
    run = tmp_path / "run"
    result = pgolf_(*train(config_file, small_corpus, run))
    monkeypatch.undo()
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("Error: The gradient of ") and f" in step {step};" in result.stderr
    assert [record["step"] for record in log_of(run)] == list(range(step))
    if step == 3:
        assert "There is no checkpoint to go on from." in result.stderr and not (run / "checkpoint").exists()
    else:
        assert_whole(run, 4, 8)
        assert_same_run(resumed(result.stderr, run), plain)


# Data that changes or vanishes


def replaced(shard: Path) -> None:
    write_shard(shard, read_shard(shard)[::-1].copy())


def cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


@pytest.mark.parametrize(
    ("change", "sentence", "later"),
    [
        (Path.unlink, "the shard was removed while it was in use.", "no *_train_*.bin shard"),
        (cut, "the shard changed while it was in use: it had 41,024 bytes and has 20,512 now.", "its header says"),
        (replaced, "the shard changed while it was in use: it was written to, or another file took its place, since "
         "it was opened.", "belongs to another run: the training shards are"),
    ],
    ids=["removed", "cut", "replaced"],
)  # fmt: skip
def test_a_shard_that_changes(
    change: Callable[[Path], None], sentence: str, later: str, config_file: Path, small_corpus: Path, plain: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(small_corpus, data)
    (shard,) = data.glob("*_train_*.bin")
    content = shard.read_bytes()
    with held(NEXT_BATCH, 7, *train(config_file, data, run, "checkpoint_every=0")) as process:
        change(shard)
        code, err = go_on(process)
    assert code == 2
    assert err == f"Error: {shard}: {sentence} To go on after step 6:\n    pgolf train --run-dir {run} --resume\n"
    assert_whole(run, 6)
    before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
    result = pgolf_(*command_in(err))
    assert result.exit_code == 2 and later in result.stderr and "Traceback" not in result.stderr
    assert {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()} == before
    shard.write_bytes(content)
    assert_same_run(resumed(err, run), plain)


def test_a_token_beyond_the_vocabulary(config_file: Path, small_corpus: Path, plain: Path, tmp_path: Path) -> None:
    """Tokens are checked when they are read: the steps before have been taken."""
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(small_corpus, data)
    (shard,) = data.glob("*_train_*.bin")
    tokens = np.array(read_shard(shard))
    tokens[2_000] = 600
    write_shard(shard, tokens)
    result = pgolf_(*train(config_file, data, run))
    assert result.exit_code == 2
    assert result.stderr.startswith(
        f"Error: {shard}: token 2,000 is 600; a vocabulary of 512 ends at 511. To go on after step 7:\n"
    )
    assert_whole(run, 4, 7)


# Nobody who reads


def test_a_reader_that_leaves(config_file: Path, small_corpus: Path, tmp_path: Path) -> None:
    with child(["-m", "pgolf"], train(config_file, small_corpus, tmp_path / "run", "iterations=1000000")) as process:
        assert process.stdout is not None and process.stderr is not None
        wait_for(process, "step 3 of")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1
