"""A run's folder: the weights in it, and run.json, what a run knows from its first step on of its data and tokenizer.

config.toml says what was asked for; this file says what was found: where the data lies, seen from any folder, and the
validation split and the tokenizer that the run's scores are of.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf.common.errors import FormatError
from pgolf.common.files import atomic_write
from pgolf.config import Config
from pgolf.data.declared import RUN, Record
from pgolf.runs import checkpoint

NAME = "run.json"
_FORMAT = "pgolf-run-1"
_NAMED = 8  # of a folder's files, in a sentence that says what it holds
_ENDINGS = (".pgolf", ".ptz", ".pt", ".safetensors", ".npz")


@dataclass(frozen=True)
class RunRecord:
    """The whole of run.json.

    data, tokenizer: where they lie, as given, as an absolute path and seen from the run folder; None where there is
    none. record: what the run's scores are of. device: as `pgolf.GPT.device_name`, the instruction set on a CPU.
    """

    data: dict[str, str] | None
    tokenizer: dict[str, str] | None
    record: Record
    device: str | None

    def write(self, run: Path) -> None:
        """Write run.json; an existing file is replaced whole."""
        from pgolf import __version__

        values = {
            "format": _FORMAT,
            "pgolf": __version__,
            "data": self.data,
            "tokenizer_path": self.tokenizer,
            **self.record.to_dict(),
            "device": self.device,
        }
        with atomic_write(run / NAME) as file:
            file.write(json.dumps(values, indent=2).encode() + b"\n")

    @classmethod
    def find(cls, run: Path) -> RunRecord | None:
        """The record of a run folder; None where it has none, as runs of 0.1.0.

        Raises FormatError, naming the file, where it is damaged.
        """
        path = run / NAME
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_bytes())
            if values["format"] != _FORMAT:
                raise ValueError(f"its format is {values['format']!r:.100}")
            data, tokenizer = (_place(values.get(name)) for name in ("data", "tokenizer_path"))
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise FormatError(f"{path}: this is not a run's record ({error}).") from None
        device = values.get("device")
        record = Record.of(RUN, str(path), values)
        return cls(data, tokenizer, record, device if isinstance(device, str) else None)


def place(path: str | os.PathLike[str], run: Path, given: str) -> dict[str, str]:
    """A path as run.json keeps it; `given`: as config.toml has it, which may be seen from another folder."""
    absolute = os.path.abspath(path)
    return {"given": given, "absolute": absolute, "from_run": os.path.relpath(absolute, os.path.abspath(run))}


def _place(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not all(isinstance(value.get(name), str) for name in ("given", "absolute", "from_run")):
        raise TypeError(f"a path is {value!r:.100}")
    return dict(value)


def data_path(run: Path, config: Config) -> Path | None:
    """Where the data of a run lies, from whatever folder it is looked for; None where nobody recorded it.

    A path that is not there any more comes back as it was given, so that an error can name it.
    """
    record = RunRecord.find(run)
    return _find(None if record is None else record.data, config.train.data_path, run)


def tokenizer_path(run: Path, config: Config) -> Path | None:
    """Where the tokenizer of a run lies, likewise; None leaves it to the data folder."""
    record = RunRecord.find(run)
    return _find(None if record is None else record.tokenizer, config.train.tokenizer_path, run)


def _find(known: dict[str, str] | None, configured: str, run: Path) -> Path | None:
    if known is None:
        if not configured:
            return None
        candidates = [Path(configured), run / configured, run.parent / configured]
    else:
        if configured and configured != known["given"]:  # somebody says another one
            return Path(configured)
        candidates = [Path(known["absolute"]), run / known["from_run"], Path(known["given"])]
    return next((path for path in candidates if path.exists()), candidates[-1] if known else candidates[0])


def record_of(run: Path) -> Record | None:
    """What a run's scores are of: run.json's, else what an older run's report.json has of it; None where neither is."""
    record = RunRecord.find(run)
    if record is not None:
        return record.record
    from pgolf.runs.records import read_report

    report = read_report(run / "report.json")
    split = None if report is None else report.data.get("val")
    if not isinstance(split, dict):
        return None
    known = {"tokens": split.get("tokens"), "files": split.get("shards"), "sha256": split.get("sha256")}
    return Record.of(RUN, str(run / "report.json"), {"validation": known})


def weights_file(path: str | os.PathLike[str]) -> Path:
    """The file with weights that a path means: itself, or of a run folder its artifact, else its newest checkpoint.

    Raises FileNotFoundError where a folder has neither; it says what the folder holds and what to do. A path where
    nothing is, is returned as it is.
    """
    folder = Path(path)
    if not folder.is_dir():
        return folder
    artifact = folder / "model.pgolf"
    found = artifact if artifact.is_file() else checkpoint.newest(folder / "checkpoint")
    if found is None:
        raise FileNotFoundError(f"{folder}: {_lacks_weights(folder)}")
    return found


def _lacks_weights(folder: Path) -> str:
    """The rest of a sentence about a folder without model.pgolf and without a checkpoint."""
    if (folder / "config.toml").is_file():
        log = folder / "log.jsonl"
        begun = log.is_file() and log.stat().st_size > 0
        return (
            f"the run folder holds no artifact (model.pgolf) and no checkpoint, only {_listed(folder)}; "
            f"{'finish the run, or train again' if begun else 'train the run first'}."
        )
    if any(folder.glob("*_train_*.bin")) or any(folder.glob("*_val_*.bin")):
        return "this is a data folder and holds no weights; give a run folder or a file with weights."
    below = sorted(other.name for other in folder.iterdir() if (other / "config.toml").is_file())
    if below:
        return f"this folder is not a run folder but holds some; give one of them: {_some(below)}."
    files = sorted(other.name for other in folder.iterdir() if other.suffix in _ENDINGS)
    if files:
        return f"this folder is not a run folder, as it holds no config.toml; give one of its files: {_some(files)}."
    return (
        f"this folder is not a run folder, as it holds no config.toml; it holds {_listed(folder)}. "
        "Give a run folder or a file with weights."
    )


def _listed(folder: Path) -> str:
    return _some(sorted(other.name + "/" * other.is_dir() for other in folder.iterdir())) or "nothing"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
