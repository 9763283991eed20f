"""A full disk names the file that was being written, whichever it is."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgolf.common import files as files_module
from pgolf.common.files import atomic_write, naming
from pgolf.data.preparation import prepare
from pgolf.data.shard_writer import ShardWriter
from pgolf.data.train_tokenizer import train_tokenizer
from pgolf.report import plot
from tests.runs import pgolf_
from tests.test_sources import prose


@contextmanager
def full_disk(pattern: str) -> Iterator[None]:
    """Files whose paths match, opened here to be written, are on a disk without space."""
    really = Path.open

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return Full() if path.match(pattern) and mode != "rb" else really(path, mode, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", opened)
        yield


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(prose(60, i) for i in range(40)))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "pgolf_val_000000.bin",
        "pgolf_train_000000.bin",
        "pgolf_train_000003.bin",
        "pgolf_300_bpe.model",
        "manifest.json",
    ],
)
def test_prepare_names_the_file(source: Path, tmp_path: Path, name: str) -> None:
    with full_disk(f"*{name}*"), pytest.raises(OSError, match=rf"No space left on device: '.*/{name}'") as caught:
        prepare(source, tmp_path / "out", vocab_size=300, shard_tokens=500, workers=1)
    assert caught.value.errno == errno.ENOSPC and Path(caught.value.filename).name == name
    assert not list(tmp_path.rglob("*.partial"))


def test_a_copied_tokenizer_is_named_and_not_its_source(source: Path, tmp_path: Path) -> None:
    model = tmp_path / "mine" / "given.model"
    model.parent.mkdir()
    train_tokenizer([source.read_text()], model, 300, "identity")
    with full_disk("*/.partial/given.model"):
        result = pgolf_("data", "prepare", source, "--out", tmp_path / "out", "--tokenizer", model)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (
        1,
        f"Error: {tmp_path}/out/.partial/given.model: No space left on device.",
    )
    assert not (tmp_path / "out").exists()


def test_a_shard_on_a_full_device(tmp_path: Path) -> None:
    """The buffer fills up, or is written when the shard is finished; closing it after an error says nothing more."""

    def write(count: int) -> None:
        with ShardWriter(tmp_path, "val", 1_000_000) as writer:
            writer.write(np.zeros(count, np.uint16))

    for count in (10, 100_000):
        (tmp_path / "pgolf_val_000000.bin").unlink(missing_ok=True)
        (tmp_path / "pgolf_val_000000.bin").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"No space left on device: '.*/pgolf_val_000000\.bin'"):
            write(count)


def test_a_plot_is_named(tmp_path: Path) -> None:
    figure = plot.new_figure()
    with full_disk("*.png.*"), pytest.raises(OSError, match=r"No space left on device: '.*/loss\.png'"):
        plot.save_figure(figure, tmp_path / "loss.png")


@pytest.mark.parametrize("step", ["open", "fsync", "replace", "sync_folder"])
def test_every_step_of_a_write_names_the_file_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        named = [os.fspath(a) for a in arguments if isinstance(a, Path)] if step in ("open", "replace") else []
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *named[:1])

    target = {"open": (Path, "open"), "sync_folder": (files_module, "sync_folder")}.get(step, (os, step))
    path = tmp_path / "x.json"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(OSError, match=r"No space left on device: '.*/x\.json'"), atomic_write(path) as file:
            file.write(b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"] and path.read_text() == "old"


def test_other_errors_keep_their_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="'a'"), naming(tmp_path / "b"):
        raise FileNotFoundError(errno.ENOENT, "gone", "a")
    with pytest.raises(PermissionError, match="'.*b'"), naming(tmp_path / "b"):
        raise PermissionError(errno.EACCES, "no")


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "tiny"], ["recipes", "--json"]])
def test_standard_output_on_a_full_device(words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        ran = subprocess.run([sys.executable, "-m", "pgolf", *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (ran.returncode, ran.stderr) == (1, "Error: standard output: No space left on device.\n")
