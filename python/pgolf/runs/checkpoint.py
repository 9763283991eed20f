"""Checkpoints: the whole state of a run in one NumPy .npz file, plain arrays and a JSON text, no pickle."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pgolf.common.errors import FormatError
from pgolf.common.files import atomic_write
from pgolf.config import Config, with_younger_keys
from pgolf.data.declared import RUN, Record

if TYPE_CHECKING:
    from pgolf.model import GPT

VERSION = 2
KEPT = 2
_FREE = ("data_path", "tokenizer_path", "train_log_every", "checkpoint_every")  # keys that change no bit of a run
_NAME = re.compile(r"step-(\d{8})\.npz")
_Arrays = dict[str, npt.NDArray[Any]]


def save(folder: Path, arrays: _Arrays, values: dict[str, Any]) -> Path:
    """Writes `folder`/step-NNNNNNNN.npz, whole or not at all, and removes all but the newest two; returns its path.

    Raises OSError, with what is left whole, where the file cannot be written.
    """
    path = folder / f"step-{values['step']:08d}.npz"
    header = json.dumps({"version": VERSION, "arrays": list(arrays), **values})
    entries: dict[str, Any] = {"header": np.frombuffer(header.encode(), dtype=np.uint8), **arrays}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, **entries)
    except OSError as error:
        last = newest(folder)
        size = sum(array.nbytes for array in arrays.values()) / 1e6
        raise OSError(
            error.errno,
            f"The checkpoint {path}, {size:,.0f} MB, cannot be written ({error.strerror or error}); "
            + (f"{last.name} before it is whole." if last else "there is none before it."),
        ) from error
    for old in _all(folder)[:-KEPT]:
        old.unlink()
    return path


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step, or None."""
    found = _all(folder)
    return found[-1] if found else None


def load(path: Path) -> tuple[_Arrays, dict[str, Any]]:
    """Arrays and values of a checkpoint.

    Raises FileNotFoundError where there is none, and FormatError for one that is torn, foreign or of a newer version;
    the message names an older one beside it, if there is one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file, warnings.catch_warnings():
            warnings.simplefilter("error")  # NumPy warns of an array's header that it did not write, a damaged one
            arrays = {name: file[name] for name in file.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("an entry is not an array")
        values = json.loads(arrays.pop("header").tobytes())
        version = values["version"]
        if version == VERSION and list(arrays) != values.pop("arrays"):
            raise ValueError("arrays are missing")
    except Exception as error:  # zipfile, zlib, struct and NumPy each have their own for what is damaged
        raise FormatError(f"{path} is not a whole pgolf checkpoint ({error}).{_older(path)}") from None
    if version != VERSION:
        raise FormatError(f"{path} has checkpoint version {version}; this pgolf reads version {VERSION}.{_older(path)}")
    return arrays, values


def load_model(path: Path, config: Config | None = None, device: str | None = None, dtype: str | None = None) -> GPT:
    """The model that a run ends with if it ends at this checkpoint.

    Args:
        path: the checkpoint.
        config: the run's; None: the one that the checkpoint holds.
        device, dtype: as for GPT.

    Raises: as `load`, and FormatError where its weights are not those of the configuration.
    """
    from pgolf.model import GPT

    arrays, values = load(path)
    try:
        config = config or Config().override(
            {f"{table}.{key}": value for table, keys in values["config"].items() for key, value in keys.items()}
        )
        weights = final_weights(path, arrays, values)
        model = GPT(config.model, seed=None, device=device, dtype=dtype)
        model.load_state_dict(weights)
        steps, train = values["step"], config.train
        model.provenance = {"steps": steps, "tokens": steps * train.train_batch_tokens, "seed": train.seed}
    except FormatError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FormatError(f"{path}: {error}") from None
    model.train_seq_len = train.train_seq_len
    model.scoring = config.eval.scoring(config.eval_seq_len)
    model.record = Record.of(RUN, str(path), values["record"]) if values.get("record") else None
    return model


def final_weights(path: Path, arrays: _Arrays, values: dict[str, Any]) -> dict[str, npt.NDArray[np.float32]]:
    """The weights in what `load` returned, by their names: averaged where there is an average, float32.

    Raises FormatError where the checkpoint does not hold what pgolf writes.
    """
    weights = {n.removeprefix("weight."): array for n, array in arrays.items() if n.startswith("weight.")}
    try:
        decays, snapshots = values["config"]["train"]["ema_decay"] > 0, values["snapshots"]
        if decays or snapshots >= 2:
            share = np.float32(1 if decays else 1 / snapshots)
            weights = {name: (share * arrays[f"average.{name}"]).reshape(w.shape) for name, w in weights.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: the checkpoint's values are not those that pgolf writes ({error}).") from None
    return weights


def drop_newer(path: Path) -> None:
    """Removes the checkpoints after `path`, from which a run goes on: what it saves next must be the newest."""
    for other in _all(path.parent):
        if other.name > path.name:
            other.unlink()


def _older(path: Path) -> str:
    older = [other for other in _all(path.parent) if other.name < path.name]
    return f" The older {older[-1]} can be resumed from instead." if older else ""


def check_same_run(path: Path, values: dict[str, Any], config: Config, dtype: str, data: Any) -> None:
    """Raises ValueError where a checkpoint belongs to another configuration or other data: it names what differs."""
    ours, theirs = config.to_dict(), with_younger_keys(values["config"])
    differences = [
        f"{table}.{key} is {ours[table][key]!r}, there {theirs[table].get(key)!r}"
        for table in ("model", "train")
        for key in ours[table]
        if key not in _FREE and json.dumps(ours[table][key]) != json.dumps(theirs[table].get(key))
    ]
    if values["dtype"] != dtype:
        differences.append(f"the dtype is {dtype}, there {values['dtype']}")
    if json.dumps(values["data"]) != json.dumps(data):
        differences.append(f"the training shards are {data}, there {values['data']}")
    if differences:
        raise ValueError(f"{path} belongs to another run: {'; '.join(differences)}.")


def cut_log(path: Path, step: int) -> None:
    """Drops the records after `step`, and a torn last line, from a log that may run ahead of its checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (json.JSONDecodeError, KeyError, TypeError):
            break
        kept.append(line + "\n")
    with atomic_write(path) as file:
        file.write("".join(kept).encode())


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.npz") if _NAME.fullmatch(path.name))
