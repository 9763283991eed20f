"""What a run writes down: a line of log.jsonl for every step, report.json at its end; and who reads them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Union, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from pgolf.common.errors import FormatError
from pgolf.common.types import StrPath

Records = Iterable[Union[Mapping[str, Any], "StepRecord"]]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished training step, as a line of log.jsonl; record 0 is the validation before training.

    step: finished steps, from 1. tokens: trained so far. loss: the step's mean loss before its update, nats; None in
    record 0. lr_scale, momentum, qat, snapshot: what the schedule decided, exactly. grad_norm: before clipping.
    seconds: training time so far, validation excluded. tokens_per_second: of this step. val_loss, val_bpb: None unless
    measured after this step. skipped: the step overflowed float16 and changed no weight; grad_norm is None then, and
    loss where it overflowed itself. saturated: hidden values of the MLPs that float16 could not hold and cut off.
    share_of_limit: the step's useful arithmetic (`speed.flop_per_token`) over its time, as a share of what the
    machine was measured to reach; None where that is not known yet. memory_mib: the most that the model has had
    allocated on a GPU, without what CUDA takes itself; on a CPU the process's largest resident set; None where the
    system does not say. device: the GPU's name, or the CPU's instruction set. looping: whether the model's layers ran
    with their loops.
    """

    step: int
    tokens: int
    loss: float | None
    lr_scale: float | None
    momentum: float | None
    qat: bool
    snapshot: bool
    grad_norm: float | None
    seconds: float
    tokens_per_second: float | None
    val_loss: float | None = None
    val_bpb: float | None = None
    skipped: bool = False
    saturated: int = 0
    share_of_limit: float | None = None
    memory_mib: float | None = None
    device: str | None = None
    looping: bool = False


MEASURED = ("seconds", "tokens_per_second", "share_of_limit", "memory_mib", "device")
"""Fields of a StepRecord that clock and machine decide; a resumed or replayed run repeats all others exactly."""


@dataclass(frozen=True)
class Report:
    """What a run came to, as report.json has it.

    Losses are nats per token, bpb bits per byte (None without a tokenizer). val_*: standard windows over the validation
    data, of the weights as trained, after averaging (None: nothing was averaged) and of the loaded artifact. score_*:
    the artifact, scored by the [eval] table's method; score_seq_len, score_stride and score_tail: with which windows
    (stride and tail None where the method has none). Sizes in bytes; code_bytes and total_bytes None where no
    script was named. seconds: training time; score_seconds: scoring. memory: (what, MiB) of what training keeps.
    score_tokens, score_bytes: what the score is a mean over. data: fingerprints of the shards that were trained on and
    scored, {"train", "val"}. share_of_limit, peak_memory_mib: as a StepRecord's share_of_limit and memory_mib, of the
    whole training. limit_tflops: the limit itself. byte_basis, source_bytes: as a Score's. declared_by, tokenizer (its
    identity): as an Audit's. None where they are not known, as in reports of older versions.
    """

    val_loss: float
    val_bpb: float | None
    val_loss_averaged: float | None
    val_bpb_averaged: float | None
    val_loss_quantised: float
    val_bpb_quantised: float | None
    score_method: str
    score_seq_len: int
    score_stride: int | None
    score_tail: str | None
    score_loss: float
    score_bpb: float | None
    score_seconds: float
    artifact_bytes: int
    code_bytes: int | None
    total_bytes: int | None
    limit_bytes: int
    fits: bool
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    snapshots: int
    parameters: int
    seed: int
    micro_batch_seqs: int
    device: str
    versions: dict[str, str]
    memory: list[tuple[str, float]]
    score_tokens: int | None = None
    score_bytes: int | None = None
    data: dict[str, Any] = field(default_factory=dict)
    share_of_limit: float | None = None
    limit_tflops: float | None = None
    peak_memory_mib: float | None = None
    byte_basis: str | None = None
    source_bytes: int | None = None
    declared_by: str | None = None
    tokenizer: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Curves:
    """(n,) steps and losses of every training step, (m,) of every validation, bits per byte of the last one."""

    steps: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]
    val_steps: npt.NDArray[np.int64]
    val_losses: npt.NDArray[np.float64]
    val_bpb: float | None

    @classmethod
    def of(cls, log: StrPath | Records) -> Curves:
        """The losses in a run's ``log.jsonl``, or in its records.

        Raises FileNotFoundError where there is no such log, FormatError naming the line that is not a step record, or
        the log where no loss was recorded; ValueError for records without a loss.
        """
        if not isinstance(log, (str, os.PathLike)):
            return cls._of_records(log)
        try:
            return cls._of_records(read_records(log))
        except FormatError:
            raise
        except ValueError as error:
            raise FormatError(f"{Path(log)}: {error}") from None

    @classmethod
    def _of_records(cls, records: Records) -> Curves:
        rows = [_fields(record) for record in records]
        training = [(step, loss) for step, loss, _, _ in rows if loss is not None]
        validation = [(step, val_loss) for step, _, val_loss, _ in rows if val_loss is not None]
        if not training and not validation:
            raise ValueError("the records hold no loss; at least one step is needed for a plot.")
        bpb = [val_bpb for *_, val_bpb in rows if val_bpb is not None]
        return cls(
            np.array([step for step, _ in training], dtype=np.int64),
            np.array([loss for _, loss in training]),
            np.array([step for step, _ in validation], dtype=np.int64),
            np.array([loss for _, loss in validation]),
            bpb[-1] if bpb else None,
        )

    @property
    def last_step(self) -> int:
        """The last step that is known."""
        return int(max(self.steps.max(initial=0), self.val_steps.max(initial=0)))

    @property
    def last_losses(self) -> dict[str, float | None]:
        """The last loss, val_loss and val_bpb; None where none was measured."""
        return {
            "loss": float(self.losses[-1]) if self.losses.size else None,
            "val_loss": float(self.val_losses[-1]) if self.val_losses.size else None,
            "val_bpb": self.val_bpb,
        }

    @property
    def verdict(self) -> str:
        """The last losses in words."""
        if not self.val_losses.size:
            return f"training loss {self.losses[-1]:.4f}"
        loss = f"validation loss {self.val_losses[-1]:.4f}"
        return loss if self.val_bpb is None else f"{loss}, {self.val_bpb:.4f} bits per byte"


def read_records(log: StrPath) -> list[dict[str, Any]]:
    """The step records in a run's ``log.jsonl``, whose step and losses have been checked.

    A last line without its end, which a run is writing or was killed over, is left out.

    Raises FileNotFoundError where there is no such log, FormatError naming the line that is not a step record.
    """
    path = Path(log)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such log; a run's log.jsonl is expected.")
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            _fields(record)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            raise FormatError(
                f"{path}, line {number}: this is not a step record; a line of log.jsonl is expected."
            ) from None
        records.append(record)
    return records


def _fields(record: Mapping[str, Any] | StepRecord) -> tuple[int, float | None, float | None, float | None]:
    """step, loss, val_loss and val_bpb of a record; losses that are not finite are None, for no curve shows them."""
    values = record if isinstance(record, Mapping) else asdict(record)
    step = int(values["step"])
    if not 0 <= step < 2**53:
        raise ValueError(f"the step is {step}; it must be from 0 to 2**53 - 1.")
    losses = (None if values.get(name) is None else float(values[name]) for name in ("loss", "val_loss", "val_bpb"))
    loss, val_loss, val_bpb = (None if loss is None or not math.isfinite(loss) else loss for loss in losses)
    return step, loss, val_loss, val_bpb


def read_report(path: Path) -> Report | None:
    """A run's report.json; None where there is none, FormatError where it is not what a run writes."""
    if not path.is_file():
        return None
    try:
        report = Report(**json.loads(path.read_bytes()))
        for name, kind in get_type_hints(Report).items():
            if not _is_a(getattr(report, name), kind):
                raise ValueError(f"{name} is {getattr(report, name)!r}"[:500])
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(f"{path}: this is not the report of a run ({error}).") from None
    return report


def _is_a(value: object, kind: Any) -> bool:
    """Whether JSON's value is one of a field's type; of lists and objects only that they are."""
    kind = get_origin(kind) if get_origin(kind) in (dict, list) else kind
    return isinstance(value, kind) or (type(value) is int and isinstance(1.0, kind))
