"""Checkpoints: the whole state of a run in one NumPy .npz file, plain arrays and a JSON text, no pickle."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pgolf.config import Config
from pgolf.data.files import atomic_write
from pgolf.errors import FormatError

VERSION = 1
KEPT = 2
_NAME = re.compile(r"step-(\d{8})\.npz")
_Arrays = dict[str, npt.NDArray[Any]]


def save(folder: Path, arrays: _Arrays, values: dict[str, Any]) -> Path:
    """Writes `folder`/step-NNNNNNNN.npz, whole or not at all, and removes all but the newest two; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{values['step']:08d}.npz"
    header = np.frombuffer(json.dumps({"version": VERSION, **values}).encode(), dtype=np.uint8)
    with atomic_write(path) as file:
        np.savez(file, allow_pickle=False, header=header, **arrays)
    for old in _all(folder)[:-KEPT]:
        old.unlink()
    return path


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step, or None."""
    found = _all(folder)
    return found[-1] if found else None


def load(path: Path) -> tuple[_Arrays, dict[str, Any]]:
    """Arrays and values of a checkpoint.

    Raises FormatError for a file that is torn, foreign or of a newer version.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        values = json.loads(arrays.pop("header").tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"{path} is not a whole pgolf checkpoint ({error}).") from None
    if values.get("version") != VERSION:
        raise FormatError(f"{path} has checkpoint version {values.get('version')}; this pgolf reads version {VERSION}.")
    return arrays, values


def check_same_run(path: Path, values: dict[str, Any], config: Config, dtype: str) -> None:
    """Raises ValueError where a checkpoint belongs to another configuration: it names what differs."""
    ours = {**config.to_dict(), "dtype": {"": dtype}}
    theirs = {**values["config"], "dtype": {"": values["dtype"]}}
    differences = [
        f"{table}.{key} is {ours[table].get(key)!r}, there {theirs.get(table, {}).get(key)!r}"
        for table in ("model", "train")
        for key in ours[table]
        if json.dumps(ours[table][key]) != json.dumps(theirs.get(table, {}).get(key))
    ]
    if values["dtype"] != dtype:
        differences.append(f"the dtype is {dtype}, there {values['dtype']}")
    if differences:
        raise ValueError(f"{path} belongs to a run with another configuration: {'; '.join(differences)}.")


def cut_log(path: Path, step: int) -> None:
    """Drops the records after `step`, and a torn last line, from a log that may run ahead of its checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] > step:
            break
        kept.append(line + "\n")
    with atomic_write(path) as file:
        file.write("".join(kept).encode())


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.npz") if _NAME.fullmatch(path.name))
