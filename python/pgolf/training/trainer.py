"""Training: the loop decides (schedule, averaging, validation, the end), native code computes.

A run is an iterator over its steps:

    trainer = pgolf.Trainer(config, data="data/books", run_dir="runs/books")
    for step in trainer:
        print(step.step, step.loss, step.val_loss)
    report = trainer.finish()
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from pgolf import _C
from pgolf.artifacts.quantize import FIXED_GRID, qat_clips
from pgolf.common.errors import DeviceError, FormatError, NonFiniteError
from pgolf.common.files import atomic_write, naming, remove_partials
from pgolf.common.types import Progress
from pgolf.config import Config
from pgolf.data.batches import BatchStream
from pgolf.data.declared import RUN, Record, Split, record_of_split
from pgolf.data.folder import find_data
from pgolf.data.shards import ShardSet
from pgolf.data.tokenizer import Tokenizer
from pgolf.model import GPT, parameter_shapes
from pgolf.runs import checkpoint, run_folder
from pgolf.runs.records import Report, StepRecord
from pgolf.scoring.evaluation import ValidationData, evaluate, plan_windows
from pgolf.system import speed
from pgolf.training.finish import finish_run
from pgolf.training.forecast import Forecast, forecast
from pgolf.training.replay import Replay
from pgolf.training.schedule import Schedule

StrPath = str | os.PathLike[str]

# Sequences of a micro-batch where the configuration leaves it open: the largest of these that fits in
# _MICRO_BATCH_TOKENS, so that a core's share of every activation stays near its caches.
_MICRO_BATCH_SIZES = (64, 32, 16, 8, 4, 2, 1)
_MICRO_BATCH_TOKENS = 8_192

# On a GPU the largest that fits in its memory: larger products, fewer launches.
_GPU_MICRO_BATCH_SIZES = (256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
_GPU_MICRO_BATCH_TOKENS = 131_072
_GPU_MEMORY_SHARE = 0.85  # of the memory limit; the rest is for validation, libraries and other programs

# Steps that a GPU's host may be ahead of the step whose results it waits for.
_GPU_STEPS_AHEAD = 2
# Steps in a row that overflow float16 at the least loss scale, 2⁻¹⁴, and end a run: what is left to halve is nothing.
_MOST_OVERFLOWS = 10


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step that was handed to the device and whose results have not been waited for."""

    ticket: int
    started: float
    position: int
    """Of the data stream, before the step."""
    snapshots: int
    """Before the step."""
    lr_scale: float
    momentum: float
    qat: bool
    snapshot: bool
    looping: bool


class Trainer:
    """A training run; iterate over it for its steps, then call `finish`.

    An iteration raises NonFiniteError where a gradient became NaN or infinite; in float16, where such steps are skipped
    and halve the loss scale, where ten in a row have done so at its least. It can be taken up again.

    Args:
        config: the run's configuration; it is not changed. (`Trainer.config` is a copy that knows the run's data.)
        data: a folder with *_train_*.bin and *_val_*.bin shards; None: config.train.data_path.
        tokenizer: a SentencePiece model, by path or opened; None: config.train.tokenizer_path, else the data folder's.
            Without any, losses are reported but no bits per byte.
        run_dir: where config.toml, log.jsonl, checkpoint/, model.pgolf, loss.png and report.json go; None: nowhere.
        device: as `pgolf.GPT`.
        resume: True continues the run in run_dir from its newest checkpoint, if it has one; a path, from that one, and
            removes newer ones.

    Raises:
        ValueError: an impossible configuration; a tokenizer of another vocabulary, or another one than the data names;
            a run_dir that holds another run.
        FileNotFoundError: missing data or tokenizer.
        FormatError: a shard, tokenizer, checkpoint or log that cannot be read; shards that are not those declared.
    """

    def __init__(
        self,
        config: Config,
        data: StrPath | None = None,
        tokenizer: StrPath | Tokenizer | None = None,
        run_dir: StrPath | None = None,
        device: str | None = None,
        resume: bool | StrPath = False,
    ) -> None:
        config.validate()
        self.run_dir = _check_run_dir(run_dir, bool(resume))
        before = run_folder.record_of(self.run_dir) if self.run_dir is not None and resume else None
        source = self._data_source(config, data, bool(resume))
        self.data = find_data(source, record=before)
        self.tokenizer = self._find_tokenizer(config, tokenizer, bool(resume))
        self.config = config = _as_started(config, source, self.tokenizer, tokenizer)
        """The run's configuration: as given, and with the data, the tokenizer and the BOS token that were found."""
        train, model = config.train, config.model
        self.validation = ValidationData.load(
            source, self.tokenizer, vocab_size=model.vocab_size, bos_id=model.bos_id, record=before
        )
        self._shards = ShardSet(self.data.train, model.vocab_size)
        self.data_fingerprints = {"train": self._shards.fingerprint(), "val": ShardSet(self.data.val).fingerprint()}
        """What tells the shards that are trained on and scored from others; see `ShardSet.fingerprint`."""
        self._stream = BatchStream(self._shards, train.train_batch_tokens, train.grad_accum_steps, train.train_seq_len)
        self.schedule: Schedule | Replay = Replay(train) if train.replay else Schedule(train)
        self._check_evaluation()

        self.model = GPT(model, seed=train.seed, device=device, dtype=train.dtype)
        self.model.train_seq_len = train.train_seq_len
        self.model.scoring = config.eval.scoring(config.eval_seq_len)
        self.model.record = self._record()
        self._native = self.model._native
        if train.qat_start_frac < 1:
            policy = config.export.policy if train.qat_grid == "export" else FIXED_GRID
            self._native.set_qat_clips(qat_clips(parameter_shapes(model), policy))
        rule = (train.muon_backend_steps, train.muon_coefficients, train.muon_row_normalize)
        self._optimizer = _C.Optimizer(self._native, *rule)
        self._loops = model.num_loops > 0
        self._flop = [speed.flop_per_token(model, train.train_seq_len, looping) for looping in (False, True)]
        self.limit = speed.known_limit(self.model.device)
        """What this machine reaches at most; None until it is measured, after the first step."""
        self._measures_limit, self._measured_limit = self.limit is None, False
        self.watch: Callable[[str, int, int], object] | None = None
        """Called as watch(what, done, total) within a step on a CPU and while validation is scored: either can take
        minutes."""
        if train.ema_decay > 0:
            self._optimizer.start_ema()
        self._ahead = 0 if self.model.device == "cpu" else _GPU_STEPS_AHEAD
        self.micro_batch_seqs = train.micro_batch_seqs or self._automatic_micro_batch()
        self.step = 0
        """Finished steps."""
        self.seconds = 0.0
        """Training time so far, validation excluded."""
        self.last_validation: StepRecord | None = None
        self._taken: list[StepRecord] = []  # finished steps that are not validated and logged yet
        self._flights: deque[_Flight] = deque()
        self._overflows = 0  # in a row at float16's least loss scale, the last step's among them
        self._clock = 0.0  # when the last finished step ended
        self._warm = False  # whether the device has run and recorded what a step runs
        self._validated = -1  # the step after which validation was last measured
        self._warned = False  # of a warmdown from the start
        self._looped = 0  # finished steps in which the model's layers ran with their loops

        if train.warmup_steps:
            self._prime(train.warmup_steps)
        if self.run_dir is not None:
            _make_run_dir(self.run_dir)
            if resume:
                self._resume(resume)
                self._warn_of_another_processor(self.run_dir)
            with atomic_write(self.run_dir / "config.toml") as file:
                file.write(config.to_toml().encode())
            self._write_record(self.run_dir, source)

    def _data_source(self, config: Config, data: StrPath | None, resume: bool) -> Path:
        """The data folder: the given one, else the configuration's; of a run that goes on, wherever it is found."""
        if data is not None:
            return Path(data)
        found = run_folder.data_path(self.run_dir, config) if resume and self.run_dir is not None else None
        if found is None and not config.train.data_path:
            raise ValueError("No training data was given: pass data= or set train.data_path.")
        return found or Path(config.train.data_path)

    def _find_tokenizer(self, config: Config, given: StrPath | Tokenizer | None, resume: bool) -> Tokenizer | None:
        """The given one, else the configuration's, else the data folder's; None where there is none."""
        if given is None and resume and self.run_dir is not None:
            given = run_folder.tokenizer_path(self.run_dir, config)
        return _open_tokenizer(given or config.train.tokenizer_path or self.data.tokenizer or None)

    def _record(self) -> Record:
        """What the run's scores are of, for its artifact, its checkpoints and run.json."""
        shards = ShardSet(self.data.val)
        text, known = self.validation.text, self.validation.bos_id >= 0
        split = Split(
            shards=shards.tokens_by_name(),
            tokens=len(shards),
            documents=int(self.validation.starts.size) if known else None,
            text_bytes=None if text is None else text.text_bytes,
            source_bytes=self.validation.source_bytes,
            sha256=self.data_fingerprints["val"]["sha256"],
        )
        opened = self.tokenizer
        tokenizer = (
            None
            if opened is None
            else {
                "identity": opened.identity,
                "vocab_size": opened.vocab_size,
                "bos_id": opened.bos_id,
            }
        )
        source = "this run" if self.run_dir is None else str(self.run_dir / run_folder.NAME)
        return Record(RUN, source, tokenizer, record_of_split(split), self.validation.byte_basis)

    def _warn_of_another_processor(self, run_dir: Path) -> None:
        before, now = run_folder.RunRecord.find(run_dir), self.model.device_name
        if before is not None and before.device not in (None, now):
            warnings.warn(
                f"{run_dir} was begun on {before.device} and goes on on {now}: from here on its bits are others than "
                "there, within rounding.",
                stacklevel=4,
            )

    def _write_record(self, run_dir: Path, source: Path) -> None:
        assert self.model.record is not None
        train, opened = self.config.train, self.tokenizer
        named = opened is not None and bool(train.tokenizer_path)
        run_folder.RunRecord(
            data=run_folder.place(source, run_dir, train.data_path),
            tokenizer=run_folder.place(opened.path, run_dir, train.tokenizer_path) if named and opened else None,
            record=self.model.record,
            device=self.model.device_name,
        ).write(run_dir)

    def _check_evaluation(self) -> None:
        """Refuses now what could not be scored after the training."""
        targets, ev = self.validation.tokens.size - 1, self.config.eval
        plan_windows("standard", targets, self.config.train.train_seq_len, 1, "exact")
        if ev.method != "ttt":  # which any data will do for
            plan_windows(ev.method, targets, self.config.eval_seq_len, ev.eval_stride, ev.tail)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.step * self.config.train.train_batch_tokens

    @property
    def peak_memory_mib(self) -> float | None:
        """As a StepRecord's memory_mib, up to now."""
        peak = self._native.peak_memory() or speed.peak_rss()
        return None if peak is None else peak / 2**20

    def forecast(self) -> Forecast | None:
        """What the run takes at least, in seconds; None on a GPU whose limit has not been measured yet.

        On a CPU whose limit is not known it is measured now, which takes a third of a second.
        """
        if self.limit is None and self.model.device == "cpu":
            self._measure_limit()
        return None if self.limit is None else forecast(self.config, self.validation.tokens.size - 1, self.limit.flops)

    def share_of_limit(self, tokens_per_second: float, looped: float | None = None) -> float | None:
        """What a training speed is of the limit; None where that is not known.

        looped: the share of the tokens that ran with the model's loops; None: of those trained on so far.
        """
        if self.limit is None:
            return None
        share = self._looped / max(self.step, 1) if looped is None else looped
        return tokens_per_second * ((1 - share) * self._flop[0] + share * self._flop[1]) / self.limit.flops

    @property
    def snapshots(self) -> int:
        """Weights added to the running mean so far."""
        return int(self._optimizer.snapshots)

    @property
    def done(self) -> bool:
        """Whether the run has reached its end."""
        return not self._flights and self.schedule.done(self.step, self.seconds)

    def __iter__(self) -> Iterator[StepRecord]:
        """Trains until the schedule ends the run. An iteration that was left can be taken up by another one."""
        if self.step == 0 and self._validated < 0 and self.schedule.validate(0, self.done):
            device = self.model.device_name
            start = StepRecord(0, 0, None, None, None, False, False, None, 0.0, None, device=device)
            self._taken.append(replace(start, looping=self._loops and self.schedule.looping(0, 0.0)))
        while self._taken or not self.done:
            if not self._taken:
                self._taken.append(self._next_step())
            record = self._taken[0]
            if self._validated != self.step == record.step and self.schedule.validate(self.step, self.done):
                record = self._validate(record)
            self._log_taken()  # before the checkpoint: on resume the log is cut back to it
            if record.step == self.step and self._saves_after(self.step):
                self.save_checkpoint()
            yield record

    def _saves_after(self, step: int) -> bool:
        every = self.config.train.checkpoint_every
        return step > 0 and (self.done or (every > 0 and step % every == 0))

    def _next_step(self) -> StepRecord:
        """The next finished step. The device is given steps ahead, but none beyond one that is looked at afterwards."""
        if self._overflows >= _MOST_OVERFLOWS:
            self._stop_overflowing()
        with self.model._training:  # nobody else's gradients in between
            if self._measures_limit and self._clock and not self._flights:
                self._measure_limit()
            while len(self._flights) <= self._ahead and not self._rests_after(self.step + len(self._flights)):
                self._launch()
            return self._land()

    def _rests_after(self, step: int) -> bool:
        """Whether the step after `step` waits until that one has been looked at, validated or saved."""
        if self.schedule.done(step, self.seconds):
            return True
        if not self._flights:
            return False
        if self._measures_limit:
            return True
        every = self.config.train.checkpoint_every
        return self.schedule.validate(step, False) or (every > 0 and step % every == 0)

    def _measure_limit(self) -> None:
        """Between two steps, so that it is no training time, and after the first, which is waited for most."""
        self._measures_limit, self._measured_limit = False, True
        with suppress(DeviceError):  # no room for it; what else is wrong, the next step will say
            self.limit = speed.measure_limit(self.model.device)

    def _launch(self) -> None:
        """Gives the device one optimizer step, whole or not at all: an interrupted one can be given again."""
        train, schedule, position = self.config.train, self.schedule, self._stream.position
        step = self.step + len(self._flights)
        self._warn_of_early_warmdown()
        if not self._warm:
            self._warm_up()
        started = time.perf_counter()
        lr_scale, momentum = schedule.lr_scale(step, self.seconds, self.step), schedule.momentum(step)
        qat = schedule.qat(step, self.seconds)
        snapshot = schedule.snapshot(step, lr_scale)
        looping = self._loops and schedule.looping(step, self.seconds)
        try:
            ids, targets = self._stream.next()
            self._native.looping = looping
            self._native.begin_step(qat)
            for start in range(0, len(ids), self.micro_batch_seqs):
                part = slice(start, start + self.micro_batch_seqs)
                self._native.micro_step(ids[part], targets[part], 1.0 / ids.size)
                if self.watch is not None and not self._ahead:
                    self.watch(f"step {step + 1:,}", min(part.stop, len(ids)), len(ids))
            self._native.end_step()
        except BaseException:
            self._stream.position = position
            raise
        with _uninterrupted():
            snapshots = self.snapshots
            ticket = self._optimizer.step(step_settings(self.config, lr_scale, momentum))
            if train.ema_decay > 0:
                self._optimizer.update_ema(train.ema_decay)
            if snapshot:
                self._optimizer.add_snapshot()
            decided = (lr_scale, momentum, qat, snapshot, looping)
            self._flights.append(_Flight(ticket, started, position, snapshots, *decided))

    def _land(self) -> StepRecord:
        """Waits for the oldest step under way."""
        with _uninterrupted():
            flight = self._flights[0]
            loss_sum, grad_norm, finite, saturated, self._overflows = self._optimizer.wait(flight.ticket)
            now = time.perf_counter()
            if not finite and self.model.dtype != "float16":
                self._stop(flight)
            self._flights.popleft()
            tokens, elapsed = self.config.train.train_batch_tokens, now - max(flight.started, self._clock)
            self._clock = now
            self.step, self.seconds = self.step + 1, self.seconds + elapsed
            self.model.provenance = {"steps": self.step, "tokens": self.tokens, "seed": self.config.train.seed}
            self._looped += flight.looping
            loss, share = loss_sum / tokens, self.share_of_limit(tokens / elapsed, float(flight.looping))
            if share is not None and share > 1 and not self._measured_limit:
                self._measures_limit = True  # the machine was busy when the limit was measured
            return StepRecord(
                step=self.step,
                tokens=self.tokens,
                loss=loss if math.isfinite(loss) else None,
                lr_scale=flight.lr_scale,
                momentum=flight.momentum,
                qat=flight.qat,
                snapshot=flight.snapshot,
                grad_norm=grad_norm if finite else None,
                seconds=self.seconds,
                tokens_per_second=tokens / elapsed,
                skipped=not finite,
                saturated=saturated,
                share_of_limit=share,
                memory_mib=self.peak_memory_mib,
                device=self.model.device_name,
                looping=flight.looping,
            )

    def _stop(self, flight: _Flight) -> None:
        """Ends a run whose gradients are not finite: neither this step nor those after it changed anything."""
        late = len(self._flights) > 1
        while self._flights:
            other = self._flights.popleft()
            if other is not flight:
                self._optimizer.wait(other.ticket)
        self._optimizer.go_on()
        self._optimizer.snapshots = flight.snapshots
        self._stream.position = flight.position
        raise NonFiniteError(self._describe_non_finite(self.step + 1, late))

    def _stop_overflowing(self) -> None:
        """Ends a run in float16 that no loss scale helps: its steps would be skipped for ever."""
        overflows, self._overflows = self._overflows, 0
        raise NonFiniteError(
            f"The gradients overflowed float16 in {overflows:,} steps in a row, the last of them step {self.step:,}, "
            "although the losses were scaled by 2**-14, the least factor; no weight was changed by them. Set "
            "train.dtype to 'bfloat16' or 'float32', or lower the learning rates."
        )

    def _settle(self) -> None:
        """Waits for all steps under way; their records are handed out when the iteration goes on."""
        while self._flights:
            self._taken.append(self._land())

    def _warm_up(self) -> None:
        """On a GPU: lets every kernel run once and records the steps' graphs, before time is counted."""
        train = self.config.train
        if self._ahead:
            sequences = train.train_batch_tokens // train.train_seq_len
            sizes = {min(self.micro_batch_seqs, sequences), sequences % self.micro_batch_seqs} - {0}
            qat, looping = train.qat_start_frac < 1, self._loops and train.enable_looping_at > 0
            averaging = train.swa_enabled or train.ema_decay > 0
            scale = 1.0 / train.train_batch_tokens
            self._optimizer.warm_up(sorted(sizes), train.train_seq_len, scale, qat, looping, averaging)
        self._warm = True

    def _automatic_micro_batch(self) -> int:
        """Sequences of a micro-batch: from the shapes and the device's total memory, never from what is free now."""
        train, limit = self.config.train, self._native.memory_limit()
        length = train.train_seq_len
        sequences = train.train_batch_tokens // length
        if not self._ahead or not limit:
            return _largest(_MICRO_BATCH_SIZES, _MICRO_BATCH_TOKENS, sequences, length)
        room = _GPU_MEMORY_SHARE * limit - self._optimizer.bytes() - 4 * 4 * self.model.num_parameters
        sizes = [n for n in _GPU_MICRO_BATCH_SIZES if n == 1 or self._native.training_bytes(n, length) <= room]
        return _largest(sizes, _GPU_MICRO_BATCH_TOKENS, sequences, length)

    def validation_loss(self, model: GPT | None = None) -> tuple[float, float | None]:
        """Mean loss in nats and bits per byte (None without a tokenizer) on the validation data, standard method."""
        train, watch = self.config.train, self.watch
        score = evaluate(
            model or self.model,
            self.validation,
            method="standard",
            seq_len=train.train_seq_len,
            batch_seqs=max(1, train.val_batch_tokens // train.train_seq_len),
            progress=None if watch is None else lambda done, total, tokens: watch("validation", done, total),
        )
        return score.loss, score.bpb

    def _validate(self, record: StepRecord) -> StepRecord:
        self._native.looping = record.looping  # as it trains
        loss, bpb = self.validation_loss()
        self._validated = record.step
        measured = self.last_validation = self._taken[0] = replace(record, val_loss=loss, val_bpb=bpb)
        return measured

    def finish(self, progress: Progress | None = None, code: StrPath | None = None) -> Report:
        """Averages the weights, exports them, loads the artifact and scores it; writes the run folder's report.

        Args:
            progress: called as progress(what, done, total) while it works.
            code: the script whose bytes count beside the artifact's.

        Returns:
            The report, as report.json has it.

        Raises:
            NonFiniteError: a weight is NaN or infinite; it is named.
        """
        self._settle()
        while self._taken:
            self._log_taken()
        self._native.looping = True  # as whoever loads the artifact will run it
        return finish_run(self, progress, code)

    def use_average(self) -> bool:
        """Replaces the weights by their average, if there is one: the EMA, or the mean of at least two snapshots."""
        if self.config.train.ema_decay > 0:
            self._optimizer.use_ema()
            return True
        if self.snapshots >= 2:
            self._optimizer.use_snapshot_mean()
            return True
        return False

    def memory_table(self) -> list[tuple[str, float]]:
        """What the run keeps in memory, as (what, MiB), planned if no step has been taken yet."""
        self._native.prepare_training(self.micro_batch_seqs, self.config.train.train_seq_len)
        return [*self.model.memory_table(), ("optimizer", self._optimizer.bytes() / 2**20)]

    # ---- State: what a checkpoint holds, and what priming restores.

    def state(self) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
        """Everything the next step depends on: arrays by name, and plain values."""
        self._settle()
        arrays = {f"weight.{name}": value for name, value in self.model.state_dict().items()}
        arrays |= {name: self._optimizer.read(name) for name in self._optimizer.state_names()}
        values = {
            "step": self.step,
            "seconds": self.seconds,
            "position": self._stream.position,
            "counts": list(self._optimizer.counts),
            "snapshots": self.snapshots,
            "validated": self._validated,
            "warned": self._warned,
            "looped": self._looped,
            "taken": [asdict(record) for record in self._taken],
            "micro_batch_seqs": self.micro_batch_seqs,
            "dtype": self.model.dtype,
            "config": self.config.to_dict(),
            "data": self._shards.fingerprint(),
            "record": None if self.model.record is None else self.model.record.to_dict(),
        }
        return arrays, values

    def load_state(self, arrays: dict[str, np.ndarray[Any, Any]], values: dict[str, Any]) -> None:
        """Puts back what `state` returned."""
        prefix = "weight."
        self.model.load_state_dict({n[len(prefix) :]: a for n, a in arrays.items() if n.startswith(prefix)})
        self._optimizer.snapshots = values["snapshots"]  # makes room for the average
        for name in self._optimizer.state_names():
            if name in arrays:
                self._optimizer.write(name, arrays[name])
            elif name.startswith("average."):  # made by a snapshot of the priming steps
                self._optimizer.write(name, np.zeros_like(self._optimizer.read(name)))
            else:
                raise FormatError(f"The checkpoint lacks {name}.")
        self._optimizer.counts = tuple(values["counts"])
        self._overflows = max(0, -values["counts"][2])
        self.step, self.seconds = values["step"], values["seconds"]
        self._stream.position = values["position"]
        self._validated, self._warned = values["validated"], values["warned"]
        self._looped = values.get("looped", 0)
        self._taken = [StepRecord(**record) for record in values["taken"]]
        if self.micro_batch_seqs != values["micro_batch_seqs"]:
            self.micro_batch_seqs, self._warm = values["micro_batch_seqs"], False
        if self.step:
            self.model.provenance = {"steps": self.step, "tokens": self.tokens, "seed": self.config.train.seed}

    def save_checkpoint(self) -> Path | None:
        """Writes the state into the run folder; None without one."""
        return checkpoint.save(self.run_dir / "checkpoint", *self.state()) if self.run_dir is not None else None

    def _resume(self, source: bool | StrPath) -> None:
        assert self.run_dir is not None
        remove_partials(self.run_dir)
        remove_partials(self.run_dir / "checkpoint")
        found = checkpoint.newest(self.run_dir / "checkpoint") if isinstance(source, bool) else Path(source)
        if found is not None:
            arrays, values = checkpoint.load(found)
            checkpoint.check_same_run(found, values, self.config, self.model.dtype, self._shards.fingerprint())
            self.load_state(arrays, values)
            checkpoint.drop_newer(found)
        checkpoint.cut_log(self.run_dir / "log.jsonl", self.step if found is not None else -1)

    def _prime(self, steps: int) -> None:
        """Runs a few steps and forgets them, as the reference scripts do to trigger their compilation."""
        arrays, values = self.state()
        self._warned = True  # the run itself will warn
        for _ in range(steps):
            self._next_step()
        self._settle()
        self.load_state(arrays, values)
        self.model.provenance = None

    # ---- Log and warnings

    def _log_taken(self) -> None:
        """Appends the first record that waits for it to the run folder's log."""
        with _uninterrupted():
            if self.run_dir is not None:
                path = self.run_dir / "log.jsonl"
                with naming(path), path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(self._taken[0])) + "\n")
            del self._taken[0]

    def _warn_of_early_warmdown(self) -> None:
        """Once: at step 0 or, under a time limit, at the first step that knows a time."""
        last = 1 if self.config.train.max_wallclock_seconds > 0 else 0
        if self._warned or self.step > last or not isinstance(self.schedule, Schedule):
            return
        message = self.schedule.early_warmdown(self.step, self.seconds, self.step)
        if message:
            self._warned = True
            warnings.warn(message, stacklevel=3)

    def _describe_non_finite(self, step: int, late: bool) -> str:
        if late:  # the gradients in memory are those of a later step
            return f"A gradient became NaN or infinite in step {step}; no weight was changed by it or since."
        for name in self.model._shapes:
            if not np.isfinite(self._native.read_grad(name)).all():
                return f"The gradient of {name} became NaN or infinite in step {step}; no weight was changed by it."
        return f"The gradient norm overflowed in step {step}; no weight was changed by it."

    def __repr__(self) -> str:
        where = f", run folder {self.run_dir}" if self.run_dir is not None else ""
        return f"Trainer(step {self.step}, {self.seconds:.1f} s trained, {self.model!r}{where})"


def step_settings(config: Config, lr_scale: float = 1.0, momentum: float = 0.95) -> dict[str, Any]:
    """What one native optimizer step needs; groups in the order matrix, embedding, scalar, head."""
    train = config.train
    embed_lr = train.tied_embed_lr if config.model.tie_embeddings else train.embed_lr
    rates = (train.matrix_lr, embed_lr, train.scalar_lr, train.head_lr)
    return {
        "lr": [lr_scale * rate for rate in rates],
        "weight_decay": [train.muon_weight_decay, train.weight_decay, train.weight_decay, 0.0],
        "beta1": train.beta1,
        "beta2": train.beta2,
        "eps": train.adam_eps,
        "momentum": momentum,
        "clip": train.grad_clip_norm,
    }


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the block ends; elsewhere than in the main thread Python delivers none anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if received and callable(previous):
            previous(*received[0])


def _largest(sizes: Sequence[int], most_tokens: int, sequences: int, seq_len: int) -> int:
    """The first of falling sizes that holds at most `most_tokens` and no more than the step has; else 1."""
    return next((n for n in sizes if n * seq_len <= most_tokens and n <= sequences), 1)


def _as_started(config: Config, data: Path, opened: Tokenizer | None, tokenizer: StrPath | Tokenizer | None) -> Config:
    """A copy of the configuration that knows the run's data, its tokenizer where one was given, and its BOS token.

    Raises ValueError where the configuration has another BOS token than the tokenizer.
    """
    keys: dict[str, Any] = {}
    if not config.train.data_path or os.path.abspath(config.train.data_path) != os.path.abspath(data):
        keys["train.data_path"] = str(data)
    if tokenizer is not None and opened is not None:
        keys["train.tokenizer_path"] = str(opened.path)
    if opened is not None:
        given = config.model.bos_id
        if given not in (-1, opened.bos_id):
            begins = f"begins documents with the id {opened.bos_id}" if opened.bos_id >= 0 else "has no BOS token"
            raise ValueError(
                f"model.bos_id is {given}; the tokenizer {opened.path} {begins}. Leave model.bos_id out (or -1), and "
                "it is the tokenizer's."
            )
        keys["model.bos_id"] = opened.bos_id
    return config.override(keys)


def _open_tokenizer(tokenizer: StrPath | Tokenizer | None) -> Tokenizer | None:
    if tokenizer is None or isinstance(tokenizer, Tokenizer):
        return tokenizer
    return Tokenizer(tokenizer)


def _check_run_dir(run_dir: StrPath | None, resume: bool) -> Path | None:
    if run_dir is None:
        if resume:
            raise ValueError("resume=True needs the run_dir of the run that is to go on.")
        return None
    path = Path(run_dir)
    log = path / "log.jsonl"
    if not resume and log.exists() and log.stat().st_size > 0:
        raise ValueError(f"{path} already holds a run; resume it (resume=True, --resume) or choose another folder.")
    return path


def _make_run_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "log.jsonl").touch()
    except OSError as error:
        raise OSError(error.errno, f"The run folder {path} cannot be written ({error.strerror}).") from error
