"""Replaying a run: the decisions of a time-limited run, taken from its log, give the same bits on any clock."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pgolf.common.errors import FormatError
from pgolf.config import TrainConfig

_NUMBERS = ("lr_scale", "momentum")
_FLAGS = ("qat", "snapshot")


class Replay:
    """Has the methods of `schedule.Schedule`, and answers with what `train.replay`, a log.jsonl, recorded.

    Raises FileNotFoundError where there is no such log, and FormatError naming the line that is not a step record.
    """

    def __init__(self, train: TrainConfig) -> None:
        path = Path(train.replay)
        if not path.is_file():
            raise FileNotFoundError(
                f"train.replay names {path}, which does not exist; expected the log.jsonl of a run."
            )
        self._steps: list[dict[str, Any]] = []
        self._validated: set[int] = set()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            record = _record(path, number, line)
            if record.get("val_loss") is not None:
                self._validated.add(record["step"])
            if record["step"] == 0:
                continue
            if record["step"] != len(self._steps) + 1:
                raise FormatError(f"{path}, line {number}: step {record['step']}; expected {len(self._steps) + 1}.")
            self._steps.append(record)
        if not self._steps:
            raise FormatError(f"{path} holds no training step to replay.")

    def lr_scale(self, step: int, seconds: float, timed_steps: int | None = None) -> float:
        return float(self._steps[step]["lr_scale"])

    def momentum(self, step: int) -> float:
        return float(self._steps[step]["momentum"])

    def qat(self, step: int, seconds: float) -> bool:
        return bool(self._steps[step]["qat"])

    def looping(self, step: int, seconds: float) -> bool:
        return bool(self._steps[step].get("looping", False))  # a log from before there were loops

    def snapshot(self, step: int, lr_scale: float) -> bool:
        return bool(self._steps[step]["snapshot"])

    def done(self, step: int, seconds: float) -> bool:
        return step >= len(self._steps)

    def validate(self, step: int, done: bool) -> bool:
        return done or step in self._validated


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}, line {number} is not JSON ({error}); expected a step record.") from None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise FormatError(f"{path}, line {number} has no step; expected a step record.")
    if record["step"] > 0:
        for name in _NUMBERS:
            value: Any = record.get(name)
            # Compared, for an integer beyond the largest float cannot be converted.
            if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
                raise FormatError(f"{path}, line {number}: {name} is {value!r}; expected a finite number.")
        for name in (*_FLAGS, *(["looping"] if "looping" in record else [])):
            if not isinstance(record.get(name), bool):
                raise FormatError(f"{path}, line {number}: {name} is {record.get(name)!r}; expected true or false.")
    return record
