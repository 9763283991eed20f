"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes `path`'s place when the block ends; an error inside removes it.

    The content is on disk before the name is, and the name before the block is left.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with naming(path, partial):
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            sync_folder(path.parent)
            os.replace(partial, path)
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Gives errors of writing, which the system reports without a name or with that of `partial`, the file's."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or (partial is not None and error.filename == os.fspath(partial))
        if unnamed and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove_partials(folder: Path) -> None:
    """Removes what a killed process left of files that were being written in `folder`."""
    for path in folder.glob(".*.partial"):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Has the names in a folder on disk before it returns."""
    if os.name == "nt":  # Windows has no handle on a folder to flush
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
