"""Checkpoints: a resumed run equals one that never stopped, and what is no checkpoint of the run is refused."""

from __future__ import annotations

import io
import itertools
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pgolf
import pgolf.training.trainer
from pgolf.common.errors import FormatError
from pgolf.common.files import atomic_write
from pgolf.config import Config
from pgolf.runs import checkpoint
from pgolf.training.trainer import Trainer
from tests.runs import assert_same_state, log_of, run, tiny

pytestmark = pytest.mark.usefixtures("one_thread")


def stop_after(config: Config, data: Path, run_dir: Path, step: int) -> Trainer:
    """A run that ends after `step` steps, as a killed process does."""
    trainer = Trainer(config, data, run_dir=run_dir)
    for record in trainer:
        if record.step == step:
            break
    return trainer


# Resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema_decay": 0.7, "muon_momentum_warmup_steps": 5},
        {"swa_start_frac": 1.0, "qat_start_frac": 0.5, "val_loss_every": 3, "micro_batch_seqs": 3},
        {"warmup_steps": 2, "grad_clip_norm": 0.01},
        {"model__num_loops": 1, "model__loop_end": 1, "enable_looping_at": 0.5, "val_loss_every": 2},
    ],
    ids=["plain", "EMA", "SWA, QAT and validation", "priming", "loops from the middle on"],
)
@pytest.mark.parametrize("step", [3, 7])
def test_a_resumed_run_equals_one_that_never_stopped(
    small_corpus: Path, tmp_path: Path, changes: dict[str, Any], step: int
) -> None:
    config = tiny(iterations=9, warmdown_iters=6, **changes)
    plain, _ = run(config, small_corpus, run_dir=tmp_path / "plain")
    stop_after(config, small_corpus, tmp_path / "stopped", step).save_checkpoint()
    resumed = Trainer(config, small_corpus, run_dir=tmp_path / "stopped", resume=True)
    assert resumed.step == step and resumed.model.provenance == {"steps": step, "tokens": step * 160, "seed": 42}
    records = list(resumed)
    assert [record.step for record in records] == list(range(step + 1, 10))
    assert_same_state(plain, resumed)
    assert log_of(tmp_path / "plain") == log_of(tmp_path / "stopped")
    assert plain.use_average() == resumed.use_average()
    assert_same_state(plain, resumed)


def test_periodic_checkpoints(small_corpus: Path, tmp_path: Path) -> None:
    """The log is cut back to the newest checkpoint, which is older than the last step."""
    config = tiny(iterations=9, checkpoint_every=2)
    plain, _ = run(config, small_corpus)
    stop_after(config, small_corpus, tmp_path, 7)
    names = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    assert names == ["step-00000004.npz", "step-00000006.npz"]
    assert [record["step"] for record in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    resumed = Trainer(config, small_corpus, run_dir=tmp_path, resume=True)
    assert resumed.step == 6
    assert [record["step"] for record in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    list(resumed)
    assert [record["step"] for record in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert_same_state(plain, resumed)


def test_a_checkpoint_can_be_named(small_corpus: Path, tmp_path: Path) -> None:
    config = tiny(iterations=9, checkpoint_every=2)
    plain, _ = run(config, small_corpus)
    stop_after(config, small_corpus, tmp_path, 7)
    older = tmp_path / "checkpoint" / "step-00000004.npz"
    resumed = Trainer(config, small_corpus, run_dir=tmp_path, resume=older)
    assert resumed.step == 4 and [record["step"] for record in log_of(tmp_path)] == [1, 2, 3, 4]
    list(resumed)
    assert_same_state(plain, resumed)


def test_resuming_a_finished_run_adds_nothing(small_corpus: Path, tmp_path: Path) -> None:
    plain, _ = run(tiny(), small_corpus, run_dir=tmp_path)
    log = (tmp_path / "log.jsonl").read_bytes()
    resumed = Trainer(tiny(), small_corpus, run_dir=tmp_path, resume=True)
    assert resumed.done and list(resumed) == []
    assert (tmp_path / "log.jsonl").read_bytes() == log
    assert_same_state(plain, resumed)
    assert resumed.seconds == plain.seconds


def test_resuming_without_a_checkpoint_begins_anew(small_corpus: Path, tmp_path: Path) -> None:
    config = tiny(checkpoint_every=0)
    plain, _ = run(config, small_corpus)
    stop_after(config, small_corpus, tmp_path, 3)
    resumed = Trainer(config, small_corpus, run_dir=tmp_path, resume=True)
    assert resumed.step == 0 and log_of(tmp_path) == []
    list(resumed)
    assert [record["step"] for record in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert_same_state(plain, resumed)


def test_a_torn_log_is_cut_back(small_corpus: Path, tmp_path: Path) -> None:
    stop_after(tiny(), small_corpus, tmp_path, 4).save_checkpoint()
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    for tail in (b'{"step": 5, "tokens"', b'{"step": 5, "tok\xff', b"[]\n", b"{}\n", b'{"step": "five"}\n', b"5\n"):
        log.write_bytes(whole + tail)
        Trainer(tiny(), small_corpus, run_dir=tmp_path, resume=True)
        assert log.read_bytes() == whole


def test_paths_and_intervals_may_change_between_runs(small_corpus: Path, tmp_path: Path) -> None:
    config = tiny(iterations=9)
    stop_after(config, small_corpus, tmp_path, 3).save_checkpoint()
    (model,) = small_corpus.glob("*.model")
    moved = {"data_path": str(small_corpus), "tokenizer_path": str(model), "train_log_every": 7, "checkpoint_every": 1}
    resumed = Trainer(
        config.override({f"train.{key}": value for key, value in moved.items()}), run_dir=tmp_path, resume=True
    )
    assert resumed.step == 3


def test_a_failed_write_leaves_the_older_checkpoint(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = stop_after(tiny(), small_corpus, tmp_path, 2)
    trainer.save_checkpoint()
    next(iter(trainer))

    def full(*args: Any, **arrays: Any) -> None:
        args[0].write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match=r"step-00000003\.npz, .*cannot be written \(No space left.*step-00000002\.npz"):
        trainer.save_checkpoint()
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000002.npz"]
    assert Trainer(tiny(), small_corpus, run_dir=tmp_path, resume=True).step == 2


# What is refused ------------------------------------------------------------------------------------------------------


def only_checkpoint(run_dir: Path) -> Path:
    (path,) = (run_dir / "checkpoint").iterdir()
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrix_lr": 0.5}, r"train\.matrix_lr is 0\.5, there 0\.02"),
        ({"model__logit_softcap": 10.0}, r"model\.logit_softcap is 10\.0, there 30\.0"),
        ({"seed": 7, "swa_every": 9}, r"train\.seed is 7, there 42; train\.swa_every is 9, there 1"),
        ({"model__model_dim": 32}, r"model\.model_dim is 32, there 16"),
    ],
)
def test_another_configuration_is_refused(
    small_corpus: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    stop_after(tiny(), small_corpus, tmp_path, 2).save_checkpoint()
    kept = (tmp_path / "log.jsonl").read_bytes(), (tmp_path / "config.toml").read_bytes()
    path = re.escape(str(only_checkpoint(tmp_path)))
    with pytest.raises(ValueError, match=f"{path} belongs to another run: {message}"):
        Trainer(tiny(**changes), small_corpus, run_dir=tmp_path, resume=True)
    assert ((tmp_path / "log.jsonl").read_bytes(), (tmp_path / "config.toml").read_bytes()) == kept


def test_other_data_is_refused(small_corpus: Path, tmp_path: Path) -> None:
    stop_after(tiny(), small_corpus, tmp_path / "run", 2).save_checkpoint()
    for source in small_corpus.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    assert Trainer(tiny(), tmp_path, run_dir=tmp_path / "run", resume=True).step == 2
    (train,) = tmp_path.glob("*_train_*.bin")
    pgolf.write_shard(train, pgolf.read_shard(train)[:-1])
    with pytest.raises(ValueError, match="belongs to another run: the training shards are"):
        Trainer(tiny(), tmp_path, run_dir=tmp_path / "run", resume=True)


def test_another_dtype_is_refused(small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(tiny(), small_corpus, tmp_path, 2).save_checkpoint()
    gpt = pgolf.GPT
    monkeypatch.setattr(
        pgolf.training.trainer, "GPT", lambda *args, **named: gpt(*args, **{**named, "dtype": "float64"})
    )
    with pytest.raises(ValueError, match="the dtype is float64, there float32"):
        Trainer(tiny(), small_corpus, run_dir=tmp_path, resume=True)


def test_a_named_checkpoint_that_is_missing(small_corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint .*nowhere\.npz"):
        Trainer(tiny(), small_corpus, run_dir=tmp_path, resume=tmp_path / "nowhere.npz")


def foreign(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def header(values: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(values).encode(), dtype=np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a whole pgolf checkpoint"),
        (b"PK\x03\x04 but not a zip file", "is not a whole pgolf checkpoint"),
        (b"\x93NUMPY\x01\x00", "is not a whole pgolf checkpoint"),
        (foreign(weights=np.zeros(3)), "is not a whole pgolf checkpoint"),
        (foreign(header=np.zeros(3, np.uint8)), "is not a whole pgolf checkpoint"),
        (foreign(header=header([1])), "is not a whole pgolf checkpoint"),
        (foreign(header=header({"step": 3})), "is not a whole pgolf checkpoint"),
        (foreign(header=header({"version": 2})), "is not a whole pgolf checkpoint"),
        (foreign(header=np.array(["text"], dtype=object)), "is not a whole pgolf checkpoint"),
        (foreign(header=header({"version": 2, "arrays": ["a"]})), "is not a whole pgolf checkpoint"),
        (foreign(header=header({"version": 1})), r"has checkpoint version 1; this pgolf reads version 2"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Path, small_corpus: Path, content: bytes, message: str) -> None:
    (tmp_path / "checkpoint").mkdir()
    path = tmp_path / "checkpoint" / "step-00000009.npz"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=f"{path} {message}") as caught:
        Trainer(tiny(), small_corpus, run_dir=tmp_path, resume=True)
    assert "older" not in str(caught.value)
    (tmp_path / "checkpoint" / "step-00000004.npz").write_bytes(b"")
    with pytest.raises(FormatError, match=r"The older .*step-00000004\.npz can be resumed from instead"):
        Trainer(tiny(), small_corpus, run_dir=tmp_path, resume=True)


def test_a_file_of_numpy_with_one_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(FormatError, match="is not a whole pgolf checkpoint"):
        checkpoint.load(path)


def npz(**entries: bytes) -> bytes:
    """A zip file with right checksums around entries of any content."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(text: str, data: bytes = bytes(12)) -> bytes:
    """An array's file with any text where NumPy writes what the array is."""
    header = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def npy_of(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


RIGHT = "{'descr': '<f4', 'fortran_order': False, 'shape': (3,)}"
TWO = npy_of(header({"version": checkpoint.VERSION, "arrays": ["a"]}))


def test_an_array_in_numpys_words_is_read(tmp_path: Path) -> None:
    """What the next test damages is right without its damage."""
    path = tmp_path / "step-00000001.npz"
    path.write_bytes(npz(header=TWO, a=npy(RIGHT)))
    arrays, values = checkpoint.load(path)
    assert arrays["a"].tolist() == [0, 0, 0] and values == {"version": checkpoint.VERSION}


@pytest.mark.parametrize(
    "content",
    [
        npz(header=TWO, a=npy(RIGHT.replace("(3,)", "(3L,)"))),  # read with a warning, as what Python 2 wrote
        npz(header=TWO, a=npy(RIGHT.replace("(3,)", "(4,)"))),
        npz(header=TWO, a=npy(RIGHT.replace("(3,)", "(-3,)"))),
        npz(header=TWO, a=npy(RIGHT.replace("(3,)", "(1000000000000000000,)"))),
        npz(header=TWO, a=npy(RIGHT.replace("<f4", "|O"))),
        npz(header=TWO, a=npy(RIGHT.replace("<f4", "nothing"))),
        npz(header=TWO, a=npy(RIGHT.replace("}", ""))),
        npz(header=TWO, a=npy(RIGHT.replace("False", "[" * 3000))),
        npz(header=TWO, a=npy("")),
        npz(header=TWO, a=b""),
        npz(header=TWO, a=b"what NumPy returns as it is"),
        npz(header=TWO),
        npz(header=TWO, b=npy(RIGHT)),
        npz(header=TWO, a=npy(RIGHT), b=npy(RIGHT)),
        npz(header=npy_of(np.frombuffer(b"[" * 100_000, np.uint8)), a=npy(RIGHT)),
        npz(header=npy_of(np.frombuffer(b'{"version":' * 100_000, np.uint8)), a=npy(RIGHT)),
        npz(header=npy_of(np.frombuffer(b'{"version": ' + b"9" * 5000 + b"}", np.uint8)), a=npy(RIGHT)),
        npz(header=npy_of(header({"version": checkpoint.VERSION, "arrays": "a"})), a=npy(RIGHT)),
    ],
    ids=[
        *("Python 2's", "too long", "negative length", "larger than memory", "objects", "no type", "open brace"),
        *("deep", "no words", "empty", "no array", "a missing array", "another array", "an array too many"),
        *("header of deep lists", "header of deep objects", "an integer of 5,000 digits", "a text for a list"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step-00000001.npz"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=f"{re.escape(str(path))} is not a whole pgolf checkpoint"):
        checkpoint.load(path)


def test_a_torn_checkpoint_is_refused(small_corpus: Path, tmp_path: Path) -> None:
    stop_after(tiny(), small_corpus, tmp_path, 2).save_checkpoint()
    path = only_checkpoint(tmp_path)
    whole = path.read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError, match="is not a whole pgolf checkpoint"):
            Trainer(tiny(), small_corpus, run_dir=tmp_path, resume=True)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(small_corpus: Path, tmp_path: Path) -> None:
    trainer = stop_after(tiny(), small_corpus, tmp_path, 2)
    arrays, values = trainer.state()
    for name in ("weight.smear.gate", "adam_v.smear.gate", "momentum.blocks.0.mlp.fc.weight"):
        checkpoint.save(tmp_path / "checkpoint", {key: a for key, a in arrays.items() if key != name}, values)
        with pytest.raises((FormatError, ValueError), match=re.escape(name.removeprefix("weight."))):
            Trainer(tiny(), small_corpus, run_dir=tmp_path, resume=True)


ARRAYS = {"weight.a": np.arange(12, dtype=np.float32).reshape(3, 4), "momentum.a": np.full((3, 4), 0.5, np.float32)}
VALUES = {"step": 3, "seconds": 0.1, "dtype": "float32"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = checkpoint.save(tmp_path_factory.mktemp("saved"), ARRAYS, VALUES)
    return path, path.read_bytes()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_whole(saved: tuple[Path, bytes], data: st.DataObject) -> None:
    """Whichever byte changes: a FormatError, or exactly what was saved."""
    path, content = saved[0], bytearray(saved[1])
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        arrays, values = checkpoint.load(path)
    except FormatError as error:
        assert str(path) in str(error)
    else:
        assert values == {**VALUES, "version": checkpoint.VERSION}
        assert arrays.keys() == ARRAYS.keys()
        assert all(np.array_equal(array, ARRAYS[name]) for name, array in arrays.items())


# Files ----------------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    for step in (3, 12, 7):
        path = checkpoint.save(tmp_path / "deep" / "er", ARRAYS, {**VALUES, "step": step})
    assert path.name == "step-00000007.npz"
    newest = checkpoint.newest(tmp_path / "deep" / "er")
    assert newest is not None and newest.name == "step-00000012.npz"
    assert sorted(p.name for p in newest.parent.iterdir()) == ["step-00000007.npz", "step-00000012.npz"]
    arrays, values = checkpoint.load(newest)
    assert values == {**VALUES, "step": 12, "version": checkpoint.VERSION}
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype and np.array_equal(arrays[name], array)
    with zipfile.ZipFile(newest) as file:
        assert file.testzip() is None


def test_newest_ignores_other_files(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "missing") is None
    for name in ("step-3.npz", "step-00000009.npz.partial", "step-0000000x.npz", "notes.txt"):
        (tmp_path / name).write_text("")
    assert checkpoint.newest(tmp_path) is None


def test_leftovers_of_a_killed_write_are_removed(small_corpus: Path, tmp_path: Path) -> None:
    stop_after(tiny(), small_corpus, tmp_path, 2).save_checkpoint()
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "checkpoint" / "step-00000003.npz") as file:
        leftover = Path(file.name)
        raise KeyboardInterrupt
    assert not leftover.exists()
    leftover.write_bytes(b"half")  # as if the process had been killed there
    Trainer(tiny(), small_corpus, run_dir=tmp_path, resume=True)
    assert not leftover.exists()


def test_state_names_what_the_next_step_depends_on(small_corpus: Path) -> None:
    trainer, _ = run(tiny(swa_start_frac=1.0, warmdown_iters=6), small_corpus)
    arrays, values = trainer.state()
    weights = trainer.model.state_dict()
    matrices = {
        name for name, value in weights.items() if name.startswith(("blocks", "bigram.proj")) and value.ndim == 2
    }
    matrices -= {name for name in matrices if name.endswith("resid_mix")}
    expected = {f"weight.{name}" for name in weights} | {f"average.{name}" for name in weights}
    expected |= {f"momentum.{name}" for name in matrices}
    expected |= {f"{kind}.{name}" for kind, name in itertools.product(("adam_m", "adam_v"), weights.keys() - matrices)}
    assert arrays.keys() == expected
    assert (values["step"], values["counts"][0], values["snapshots"]) == (6, 6, trainer.snapshots)
    assert values["position"] == 6 * 162


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "averages"),
    [
        ({"swa_start_frac": 1.0, "swa_every": 1, "warmdown_iters": 6}, True),
        ({"ema_decay": 0.7}, True),
        ({"swa_enabled": False}, False),
    ],
    ids=["SWA", "EMA", "no average"],
)
def test_a_checkpoint_is_the_model_that_its_run_ends_with(
    small_corpus: Path, tmp_path: Path, changes: dict[str, Any], averages: bool
) -> None:
    trainer = Trainer(tiny(**changes), small_corpus, run_dir=tmp_path)
    for _ in trainer:
        pass
    path = checkpoint.newest(tmp_path / "checkpoint")
    assert path is not None
    before = trainer.model.state_dict()
    assert trainer.use_average() == averages
    loaded = pgolf.load(path, device="cpu")
    for name, w in trainer.model.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name], w, err_msg=name)
        np.testing.assert_array_equal(pgolf.load_state_dict(path)[name], w, err_msg=name)
    assert any((loaded.state_dict()[name] != w).any() for name, w in before.items()) == averages
    assert loaded.config == trainer.config.model and loaded.train_seq_len == trainer.config.train.train_seq_len
    train = trainer.config.train
    assert loaded.provenance == {
        "steps": trainer.step,
        "tokens": trainer.step * train.train_batch_tokens,
        "seed": train.seed,
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("snapshots", "two"),
        ("config", {}),
        ("config", {"train": {"ema_decay": 0.5}}),
        ("config", [1]),
        ("step", None),
    ],
)
def test_a_checkpoint_with_odd_values_is_refused(small_corpus: Path, tmp_path: Path, key: str, value: Any) -> None:
    trainer = stop_after(tiny(), small_corpus, tmp_path, 3)
    arrays, values = checkpoint.load(trainer.save_checkpoint() or checkpoint.newest(tmp_path / "checkpoint"))
    path = checkpoint.save(tmp_path, arrays, {**values, "step": 7})
    altered = {**values, key: value}
    with np.load(path) as file:
        entries = dict(file)
    header = json.dumps({"version": checkpoint.VERSION, "arrays": list(arrays), **altered})
    entries["header"] = np.frombuffer(header.encode(), np.uint8)
    np.savez(path, **entries)
    with pytest.raises(FormatError, match=re.escape(str(path))):
        pgolf.load(path, device="cpu")
