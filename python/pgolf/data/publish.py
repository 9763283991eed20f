"""The output folder of a preparation: what may be replaced there, and how, so that nothing unfinished looks whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pgolf.common.files import file_sha256
from pgolf.data import manifest
from pgolf.data.manifest import Manifest
from pgolf.data.tokenizer import Tokenizer


def check_out_dir(out: Path, given: Tokenizer | None) -> None:
    """Refuse a folder with data that prepare did not write: it would become part of the new data set, or be lost."""
    if not out.exists():
        return
    if not out.is_dir():
        raise NotADirectoryError(f"{out}: this is a file; the output is a folder.")
    old = Manifest.find(out)
    ours = set() if old is None or old.hub is not None else {manifest.NAME, *old.shards()}
    there = [*out.glob("*_train_*.bin"), *out.glob("*_val_*.bin"), *out.glob(manifest.NAME)]
    foreign = sorted(path.name for path in there if path.name not in ours)
    if given is not None:
        model = out / given.path.name
        if model.exists() and not _holds(model, given.sha256):
            foreign.append(model.name)
    if foreign:
        raise FileExistsError(
            f"{out}: the folder holds {foreign[0]}"
            + (f" and {len(foreign) - 1} more files" if len(foreign) > 1 else "")
            + " that no finished `prepare` wrote; choose an empty folder or remove them."
        )


@contextlib.contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """A folder inside `out` for what is not finished, gone afterwards; and so is `out` where it stays empty."""
    missing = [path for path in (out, *out.parents) if not path.exists()]
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for path in missing:
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def publish(partial: Path, out: Path, made: Manifest) -> None:
    """Put the finished files in the place of an earlier run's.

    Validation shards go first and come last: while they are missing, no reader takes the folder for a data set, so a
    stop in between never leaves a mixture that looks whole. The earlier run's tokenizer goes too, unless it has changed
    since.
    """
    old = Manifest.find(out)
    if old is not None:
        for shard in (*old.val.shards, *old.train.shards):
            (out / shard.file).unlink(missing_ok=True)
        (out / manifest.NAME).unlink()
        tokenizer = out / old.tokenizer.file
        # A second tokenizer would leave it open which of the two made the shards.
        if tokenizer.name != made.tokenizer.file and _holds(tokenizer, old.tokenizer.sha256):
            tokenizer.unlink()
    os.replace(partial / made.tokenizer.file, out / made.tokenizer.file)
    for shard in (*made.train.shards, *made.val.shards):
        os.replace(partial / shard.file, out / shard.file)
    made.write(out / manifest.NAME)


def _holds(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256
