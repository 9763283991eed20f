"""Run folders: `pgolf.load` reads one, `pgolf train` makes one where none is named, and data that has moved is told."""

from __future__ import annotations

import os
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pgolf
from pgolf.config import Config
from pgolf.data.batches import BatchStream
from pgolf.runs import checkpoint
from pgolf.runs.run_folder import weights_file
from tests.runs import files, last_json, pgolf_, refused, run, tiny


@pytest.fixture(scope="module")
def finished(small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    trainer, _ = run(tiny(data_path=str(small_corpus)), small_corpus, run_dir=folder)
    trainer.finish()
    return folder


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """A run that was stopped before its artifact was written."""
    folder = tmp_path / "stopped"
    shutil.copytree(finished, folder)
    for name in ("model.pgolf", "report.json"):
        (folder / name).unlink()
    return folder


def same(one: Any, two: Any) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


# Weights


def test_a_folders_artifact_is_its_model(finished: Path, tmp_path: Path) -> None:
    model = pgolf.load(finished)
    assert same(model.state_dict(), pgolf.load(finished / "model.pgolf").state_dict())
    assert same(pgolf.load_state_dict(str(finished)), pgolf.load_state_dict(finished / "model.pgolf"))
    pgolf.convert(finished, tmp_path / "out.ptz")
    assert same(pgolf.load(tmp_path / "out.ptz").state_dict(), model.state_dict())


def test_without_an_artifact_it_is_the_newest_checkpoint(stopped: Path) -> None:
    newest = checkpoint.newest(stopped / "checkpoint")
    assert newest is not None
    assert same(pgolf.load(stopped).state_dict(), pgolf.load(newest).state_dict())
    assert same(pgolf.load_state_dict(stopped), pgolf.load_state_dict(newest))
    with pytest.raises(ValueError, match="its weights are not quantised"):
        pgolf.convert(stopped, stopped / "out.ptz")
    score = last_json(pgolf_("eval", stopped, "--json"))
    assert score["loss"] == last_json(pgolf_("eval", newest, "--config", stopped / "config.toml", "--json"))["loss"]
    assert pgolf_("generate", stopped, "--max-new-tokens", 2).exit_code == 0


def empty(folder: Path) -> None:
    folder.mkdir()


def begun(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.toml").write_text("[train]\niterations = 1\n")
    (folder / "log.jsonl").write_text('{"step": 0}\n')


def not_begun(folder: Path) -> None:
    begun(folder)
    (folder / "log.jsonl").write_text("")


def data(folder: Path) -> None:
    folder.mkdir()
    (folder / "x_train_000.bin").write_bytes(b"")


def several(folder: Path) -> None:
    folder.mkdir()
    begun(folder / "a")
    begun(folder / "b")


def loose(folder: Path) -> None:
    folder.mkdir()
    for number in range(10):
        (folder / f"seed-{number}.pgolf").write_bytes(b"")


NO_CONFIG = "this folder is not a run folder, as it holds no config.toml"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (empty, f"{NO_CONFIG}; it holds nothing. Give a run folder or a file with weights."),
        (begun, "the run folder holds no artifact (model.pgolf) and no checkpoint, only config.toml, log.jsonl; finish "
         "the run, or train again."),
        (not_begun, "the run folder holds no artifact (model.pgolf) and no checkpoint, only config.toml, log.jsonl; "
         "train the run first."),
        (data, "this is a data folder and holds no weights; give a run folder or a file with weights."),
        (several, "this folder is not a run folder but holds some; give one of them: a, b."),
        (loose, f"{NO_CONFIG}; give one of its files: {', '.join(f'seed-{n}.pgolf' for n in range(8))} and 2 more."),
    ],
)  # fmt: skip
def test_a_folder_without_weights(make: Any, sentence: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    make(folder)
    with pytest.raises(FileNotFoundError) as caught:
        pgolf.load(folder)
    assert str(caught.value) == f"{folder}: {sentence}"
    for words in (("eval",), ("generate",), ("export", "--out", tmp_path / "y.pgolf")):
        refused(pgolf_(words[0], folder, *words[1:]), re.escape(f"Error: {folder}: {sentence}"))


def test_a_path_of_nothing_is_left_to_the_reader(tmp_path: Path) -> None:
    assert weights_file(tmp_path / "no.pgolf") == tmp_path / "no.pgolf"
    with pytest.raises(FileNotFoundError, match=r"no\.pgolf"):
        pgolf.load(tmp_path / "no.pgolf")


# Data that is unknown, or has moved


def changed(folder: Path, **values: str) -> Path:
    """The run with other paths in its configuration, and no record of where they were."""
    (folder / "run.json").unlink(missing_ok=True)
    config = Config.from_toml(folder / "config.toml", {f"train.{key}": value for key, value in values.items()})
    (folder / "config.toml").write_text(config.to_toml())
    return folder


def test_data_that_is_not_known(stopped: Path) -> None:
    changed(stopped, data_path="")
    refused(pgolf_("eval", stopped), "does not say on which data it was trained; give --data")
    refused(pgolf_("generate", stopped), r"No tokenizer is known for .*\.npz; give --tokenizer")
    out = stopped / "x.pgolf"
    refused(
        pgolf_("export", stopped, "--out", out, "--fit", 10**6),
        "does not say on which data it was trained; give --data",
    )
    refused(pgolf_("train", "--run-dir", stopped, "--resume"), "No training data was given: give --data or set train")


def test_data_that_has_moved(stopped: Path, small_corpus: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    changed(stopped, data_path=str(gone))
    sentence = re.escape(f"The run's data folder {gone} is not there any more; give --data.")
    refused(pgolf_("eval", stopped), sentence)
    refused(pgolf_("export", stopped, "--out", tmp_path / "x.pgolf", "--fit", 10**6), sentence)
    refused(pgolf_("train", "--run-dir", stopped, "--resume"), sentence)
    refused(
        pgolf_("generate", stopped),
        re.escape(f"The run's data folder {gone}, which would have its tokenizer, is not there any more; give --tok"),
    )
    refused(pgolf_("eval", stopped, "--data", tmp_path / "no"), "no: no such data folder")
    assert pgolf_("eval", stopped, "--data", small_corpus).exit_code == 0
    assert pgolf_("train", "--run-dir", stopped, "--resume", "--data", small_corpus).exit_code == 0


def test_data_that_is_named_from_another_folder(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(stopped, data_path="data/demo")
    monkeypatch.chdir(tmp_path)
    refused(
        pgolf_("eval", stopped),
        re.escape(f"The run's data folder data/demo is not there any more (looked for in {tmp_path}); give --data."),
    )


def test_a_tokenizer_that_has_moved(stopped: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.model"
    changed(stopped, tokenizer_path=str(gone))
    sentence = re.escape(f"The run's tokenizer {gone} is not there any more; give --tokenizer.")
    for verb in ("eval", "generate"):
        refused(pgolf_(verb, stopped), sentence)


# The folder of a run that names none


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def settings(small_corpus: Path, tmp_path: Path) -> Path:
    path = tmp_path / "wider.toml"
    path.write_text(tiny(data_path=str(small_corpus)).to_toml())
    return path


def test_train_makes_a_folder_and_says_so(here: Path, settings: Path) -> None:
    began = datetime.now().replace(microsecond=0)
    result = pgolf_("train", "--config", settings, "--json")
    folder = Path(last_json(result)["run_dir"])
    made = datetime.strptime(folder.name, "wider-%Y%m%d-%H%M%S")
    assert folder.parent == Path("runs") and began <= made <= datetime.now()
    said = f"No --run-dir was given: the run is kept in {folder}."
    assert said in result.stderr.splitlines()
    assert result.stderr.index(said) < result.stderr.index("export …")
    assert {"config.toml", "log.jsonl", "model.pgolf", "report.json"} <= files(folder).keys()


def test_a_folder_is_never_shared(here: Path, settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(2026, 3, 4, 5, 6, 7)

    monkeypatch.setattr("pgolf.cli.train.datetime", Clock)
    runs = [last_json(pgolf_("train", "--config", settings, "--json"))["run_dir"] for _ in range(3)]
    name = os.path.join("runs", "wider-20260304-050607")
    assert runs == [name, f"{name}-2", f"{name}-3"]


@pytest.mark.parametrize(("options", "name"), [((), "base"), (("--recipe", "pr286"), "pr286")])
def test_the_folder_has_the_recipes_name(
    options: tuple[str, ...], name: str, here: Path, small_corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def trainer(*args: Any, run_dir: Path, **named: Any) -> Any:
        made.append(run_dir)
        raise MemoryError

    monkeypatch.setattr("pgolf.training.trainer.Trainer", trainer)
    assert pgolf_("train", *options, "--data", small_corpus).exit_code == 1
    assert re.fullmatch(rf"{name}-\d{{8}}-\d{{6}}", made[0].name)
    assert list(here.iterdir()) == []


def test_nothing_is_kept_where_that_is_asked_for(here: Path, settings: Path) -> None:
    assert last_json(pgolf_("train", "--config", settings, "--no-run-dir", "--json"))["run_dir"] is None
    assert list(here.iterdir()) == []
    refused(pgolf_("train", "--config", settings, "--no-run-dir", "--run-dir", "x"), "--run-dir x and --no-run-dir are")


@pytest.mark.parametrize(
    "options", [("--set", "train.iterations=0"), ("--tokenizer", "no.model"), ("--device", "tpu"), ("--data", "no")]
)
def test_a_request_that_is_refused_leaves_no_folder(options: tuple[str, ...], here: Path, settings: Path) -> None:
    assert pgolf_("train", "--config", settings, *options).exit_code == 2
    assert list(here.iterdir()) == []


def fail_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def next_batch(self: BatchStream, take: Any = BatchStream.next) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(5, "Input/output error", "shard")
        return take(self)

    monkeypatch.setattr(BatchStream, "next", next_batch)


def test_a_run_that_fails_in_its_first_step_leaves_no_folder(
    here: Path, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "runs").mkdir()
    fail_at(1, monkeypatch)
    result = pgolf_("train", "--config", settings)
    assert result.exit_code == 1 and "shard: Input/output error" in result.stderr
    assert list(here.rglob("*")) == [here / "runs"]


def test_a_run_that_fails_later_is_kept(here: Path, settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(3, monkeypatch)
    assert pgolf_("train", "--config", settings).exit_code == 1
    (folder,) = (here / "runs").iterdir()
    assert {"config.toml", "log.jsonl"} <= files(folder).keys()


def test_a_named_folder_is_left_where_the_run_fails(
    here: Path, settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(1, monkeypatch)
    assert pgolf_("train", "--config", settings, "--run-dir", "mine").exit_code == 1
    assert (here / "mine" / "config.toml").is_file()


def test_a_folder_that_cannot_be_made(here: Path, settings: Path) -> None:
    (here / "runs").write_text("mine")
    result = pgolf_("train", "--config", settings)
    assert result.exit_code in (1, 2) and len(result.stderr.splitlines()) == 1
    assert re.match(
        r"Error: The run folder runs/wider-.* cannot be made \(.*\); --run-dir names another", result.stderr
    )
    assert (here / "runs").read_text() == "mine"
