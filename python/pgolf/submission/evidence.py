"""What a run's files have to say, read when a rule asks for it and only once.

`Evidence` is everything that a rule may ask; `RunFolder` answers from pgolf's own run folder. What a folder cannot
answer raises Unchecked with the reason, so that a rule need not know where its facts come from.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pgolf.common.errors import FormatError
from pgolf.common.types import Progress, StrPath
from pgolf.config import Config, ExportConfig
from pgolf.data.declared import Record
from pgolf.data.folder import DataFolder, find_data
from pgolf.data.shards import ShardSet
from pgolf.runs import run_folder
from pgolf.scoring.audit import defined_scores
from pgolf.scoring.evaluation import AUDITS, Score, ValidationData
from pgolf.scoring.evaluation import Model as ScoredModel
from pgolf.submission.verdict import Unchecked

if TYPE_CHECKING:
    from pgolf.runs.records import Report


RUN_FILES = ("config.toml", "log.jsonl", "report.json", "model.pgolf")
"""What a submission keeps of a run folder."""
GPU_STEPS_IN_FLIGHT = 2
"""Steps that a GPU has been given and not finished when its host learns that the time is over (docs/spec.md §3)."""

_T = TypeVar("_T")


class Model(ScoredModel, Protocol):
    """What the rules need of a model; pgolf.GPT has it."""

    def logits(self, ids: npt.NDArray[Any]) -> npt.ArrayLike:
        """(B, T) token ids to (B, T, V)."""


class kept(Generic[_T]):
    """A property that is computed once; an error is kept too, as it may have taken as long as a value."""

    def __init__(self, compute: Callable[[Any], _T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> _T:
        if instance is None:
            return self  # type: ignore[return-value]
        memory: dict[str, tuple[_T | None, Exception | None]] = instance.__dict__.setdefault("_kept", {})
        if self._name not in memory:
            try:
                memory[self._name] = self._compute(instance), None
            except Exception as error:
                memory[self._name] = None, error
        value, failure = memory[self._name]
        if failure is not None:
            raise failure.with_traceback(None)
        return value  # type: ignore[return-value]


@dataclass(frozen=True)
class Settings:
    """How a check is made.

    data: a data folder, in place of the one that the run names. tokenizer, device: as for `pgolf.evaluate` and
    `pgolf.load`. code: the script whose bytes count; None: the folder's own. audit: look up a "sample" of the
    validation documents among the training ones, or the "full" set. rescore: score every artifact again. limit_bytes:
    artifact and code together. limit_seconds: training time, and scoring time; 0: none. load: from an artifact's path
    and a device to a model; None: `pgolf.load`. progress: called as progress(what, done, total).

    Raises ValueError for an unknown audit, and for limits that are none.
    """

    data: StrPath | None = None
    tokenizer: StrPath | None = None
    device: str | None = None
    code: StrPath | None = None
    audit: str = "full"
    rescore: bool = True
    limit_bytes: int = field(default_factory=lambda: ExportConfig().limit_bytes)
    limit_seconds: float = 600.0
    load: Callable[[Path, str | None], Model] | None = None
    progress: Progress = lambda what, done, total: None

    def __post_init__(self) -> None:
        if self.audit not in AUDITS:
            raise ValueError(f"audit is {self.audit!r}; expected one of {', '.join(map(repr, AUDITS))}.")
        if self.limit_bytes < 1 or not self.limit_seconds >= 0:
            raise ValueError(
                f"limit_bytes is {self.limit_bytes} and limit_seconds {self.limit_seconds}; expected at least 1 and 0."
            )


@dataclass(frozen=True)
class Claim:
    """What a folder says of its score; None where it says nothing.

    val_loss: nats per token; val_bpb: bits per byte. tokens, bytes: scored. Sizes in bytes. loss_precision,
    bpb_precision: how far val_loss and val_bpb may be off by the digits that are given. steps: of training. byte_basis:
    whose bytes val_bpb is over, as a Score's.
    """

    val_loss: float | None = None
    val_bpb: float | None = None
    tokens: int | None = None
    bytes: int | None = None
    artifact_bytes: int | None = None
    code_bytes: int | None = None
    total_bytes: int | None = None
    score_seconds: float | None = None
    loss_precision: float = 0.0
    bpb_precision: float = 0.0
    steps: int | None = None
    byte_basis: str | None = None


@dataclass(frozen=True)
class Timeline:
    """When training steps ended, validation excluded: rising (step, seconds), from (0, 0.0).

    in_flight: steps that may start after the limit, as the host cannot know it yet. source: the file's name. claimed:
    how many steps the run is said to have taken; None where nothing says it.
    """

    ends: tuple[tuple[int, float], ...]
    in_flight: int
    source: str
    claimed: int | None = None

    def started_after(self, limit: float) -> int:
        """Steps that started at or after ``limit`` seconds; where not every step is logged, at their mean pace."""
        for (step, seconds), (later_step, later) in zip(self.ends, self.ends[1:], strict=False):
            if later >= limit:
                pace = (later - seconds) / (later_step - step)
                return self.ends[-1][0] - (step + ceil(max(limit - seconds, 0.0) / pace) if pace > 0 else step)
        return 0


class Library:
    """Validation data that several runs share: read and audited once."""

    def __init__(self) -> None:
        self._read: dict[tuple[Any, ...], ValidationData] = {}

    def validation(
        self, data: Path, tokenizer: Path | None, vocab_size: int, bos_id: int, audit: str, record: Record | None
    ) -> ValidationData:
        known = "" if record is None else json.dumps(record.to_dict(), sort_keys=True)
        key = (data, tokenizer, vocab_size, bos_id, audit, known)
        if key not in self._read:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of duplicates, which are a rule's finding here
                self._read[key] = ValidationData.load(
                    data, tokenizer, vocab_size=vocab_size, bos_id=bos_id, audit=audit, record=record
                )
        return self._read[key]


class Evidence:
    """All that a rule may ask of one run. This one knows nothing: every answer is Unchecked with the reason."""

    def __init__(self, path: Path, settings: Settings, library: Library, name: str) -> None:
        self.path, self.settings, self.library = path, settings, library
        self.name = name
        """The run's, as findings have it."""

    @kept
    def claim(self) -> Claim:
        """The score and the sizes that the folder claims."""
        raise self._nothing("says what the run scored")

    @kept
    def timeline(self) -> Timeline:
        """When the steps ended."""
        raise self._nothing("says when the steps ended")

    @kept
    def code(self) -> Path:
        """The script whose bytes count."""
        if self.settings.code is None:
            raise Unchecked("No script is known whose bytes count; give --code.")
        path = Path(self.settings.code)
        if not path.is_file():
            raise Unchecked(f"{path}: no such script, whose bytes count.")
        return path

    @kept
    def artifact(self) -> Path:
        """The artifact's file."""
        raise self._nothing("is an artifact that pgolf reads")

    @kept
    def config(self) -> Config:
        """The run's configuration."""
        raise self._nothing("is a pgolf run's config.toml")

    @kept
    def report(self) -> Report:
        """The run's report."""
        raise self._nothing("is a pgolf run's report.json")

    @kept
    def records(self) -> list[dict[str, Any]]:
        """The records of the run's log, all fields as they were written."""
        raise self._nothing("is a pgolf run's log.jsonl")

    @kept
    def header(self) -> dict[str, Any]:
        """The artifact's header."""
        from pgolf.artifacts.artifact import read_artifact

        return read_artifact(self.artifact)[0]

    @kept
    def model(self) -> Model:
        """The artifact's model, on the settings' device."""
        if self.settings.load is not None:
            return self.settings.load(self.artifact, self.settings.device)
        from pgolf.artifacts.artifact import load

        return load(self.artifact, device=self.settings.device)

    @kept
    def record(self) -> Record | None:
        """What is recorded of the data and the tokenizer that the scores are of; None where nothing is."""
        return None

    @kept
    def data(self) -> DataFolder:
        """The data folder: where there is one, that of the settings."""
        if self.settings.data is None:
            raise Unchecked("No validation data is at hand; give --data.")
        return find_data(self.settings.data, splits=("val",))

    @kept
    def validation(self) -> ValidationData:
        """The validation stream with its audit; raises ValueError where the byte count is not that of the text."""
        from pgolf.data.tokenizer import Tokenizer

        path = self._tokenizer_path()
        if path is None:
            raise Unchecked(f"{self.data.path} holds no tokenizer to count bytes by; give --tokenizer.")
        tokenizer = Tokenizer(path)
        return self._validation(tokenizer.vocab_size, tokenizer.bos_id)

    @kept
    def times(self) -> npt.NDArray[np.int32]:
        """How often each validation target is scored, (N,): once, where no method says otherwise."""
        return np.ones(max(self.validation.tokens.size - 1, 0), dtype=np.int32)

    @kept
    def score(self) -> Score:
        """The artifact's score, measured again by the run's own method."""
        from pgolf.training.finish import score_as_configured

        if not self.settings.rescore:
            raise Unchecked("The artifact was not scored again, as was asked for.")
        config, progress = self.config, self.settings.progress
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another byte basis, which is a rule's finding here
            return score_as_configured(
                self.model,
                self.validation,
                config,
                lambda what, done, total: progress(f"{what} {self.name}", done, total),
            )

    def _tokenizer_path(self) -> Path | None:
        if self.settings.tokenizer is not None:
            return Path(self.settings.tokenizer)
        return self.data.tokenizer

    def _validation(self, vocab_size: int, bos_id: int) -> ValidationData:
        path, audit = self._tokenizer_path(), self.settings.audit
        return self.library.validation(self.data.path, path, vocab_size, bos_id, audit, self.record)

    def _nothing(self, what: str) -> Unchecked:
        return Unchecked(f"Nothing in {self.path} {what}.")


class RunFolder(Evidence):
    """A folder that a pgolf run wrote."""

    def _file(self, name: str) -> Path:
        path = self.path / name
        if not path.is_file():
            raise Unchecked(f"{self.path} holds no {name}; a finished run's folder does.")
        return path

    @kept
    def artifact(self) -> Path:
        return self._file("model.pgolf")

    @kept
    def config(self) -> Config:
        return Config.from_toml(self._file("config.toml"))

    @kept
    def report(self) -> Report:
        from pgolf.runs.records import read_report

        report = read_report(self._file("report.json"))
        assert report is not None
        return report

    @kept
    def records(self) -> list[dict[str, Any]]:
        from pgolf.runs.records import read_records

        return read_records(self._file("log.jsonl"))

    @kept
    def claim(self) -> Claim:
        report = self.report
        return Claim(
            report.score_loss,
            report.score_bpb,
            report.score_tokens,
            report.score_bytes,
            report.artifact_bytes,
            report.code_bytes,
            report.total_bytes,
            report.score_seconds,
            steps=report.steps,
            byte_basis=report.byte_basis,
        )

    @kept
    def timeline(self) -> Timeline:
        ends = [(record["step"], number(record, "seconds", self.path)) for record in self.records if record["step"] > 0]
        in_flight = 0 if self.report.device.startswith("cpu ") else GPU_STEPS_IN_FLIGHT
        return Timeline(((0, 0.0), *ends), in_flight, "log.jsonl", self.report.steps)

    @kept
    def data(self) -> DataFolder:
        """As for Evidence, else the run's own; refused where its shards are not those that the run has recorded."""
        path = self.settings.data or run_folder.data_path(self.path, self.config)
        if not path:
            raise Unchecked(f"Nothing in {self.path} says where the data lies; give --data.")
        folder = find_data(path, splits=("val",))
        for split, shards in (("val", folder.val), ("train", folder.train)):
            recorded = self.report.data.get(split)
            if recorded is not None and shards and ShardSet(shards).fingerprint() != recorded:
                raise Unchecked(
                    f"The {split} shards in {folder.path} are not those of the run, whose report.json has another "
                    "fingerprint; give the run's own data with --data."
                )
        return find_data(path, splits=("val",), record=self.record)

    @kept
    def times(self) -> npt.NDArray[np.int32]:
        config, targets = self.config, max(self.validation.tokens.size - 1, 0)
        if config.eval.method not in ("standard", "sliding"):  # documents: every target is one's
            return np.ones(targets, dtype=np.int32)
        ev = config.eval
        return defined_scores(targets, ev.method, config.eval_seq_len, ev.eval_stride, ev.tail)

    @kept
    def validation(self) -> ValidationData:
        return self._validation(self.config.model.vocab_size, self.config.model.bos_id)

    def _tokenizer_path(self) -> Path | None:
        named = run_folder.tokenizer_path(self.path, self.config)
        if self.settings.tokenizer is None and named is not None and named.is_file():
            return named
        return super()._tokenizer_path()

    @kept
    def record(self) -> Record | None:
        """The artifact's, else the run's."""
        from pgolf.artifacts.artifact import record_of

        of_artifact = None
        with contextlib.suppress(Unchecked, FormatError):  # of which other rules speak
            of_artifact = record_of(self.artifact, self.header)
        return of_artifact or run_folder.record_of(self.path)


def number(record: Mapping[str, Any], name: str, path: Path) -> float:
    """A number of a log's record; raises FormatError where it is none."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise FormatError(f"{path / 'log.jsonl'}: {name} of step {record['step']} is {value!r}; expected a number.")
    return float(value)
