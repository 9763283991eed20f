"""What changes while a model trains: learning rate, momentum, late QAT, snapshots, validation and the end of the run.

Every method is a pure function of the configuration and of where the run stands, so a new idea for a schedule is an
edit to this file alone. The definitions are docs/spec.md §3; the symbols there are

    step     s: optimizer steps finished before the one that is decided
    seconds  t: training time so far, validation excluded, as far as the host knows it

On a device that runs behind its host, t belongs to an earlier step; ``timed_steps`` is then the number of steps that
were finished at that t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pgolf.config import TrainConfig


@dataclass(frozen=True, slots=True)
class Schedule:
    """The schedule of one run."""

    train: TrainConfig

    def lr_scale(self, step: int, seconds: float, timed_steps: int | None = None) -> float:
        """The factor in [0, 1] on every learning rate of the step that follows ``step`` finished ones."""
        scale = self._linear(step, seconds, step if timed_steps is None else timed_steps)
        if self.train.warmdown_shape == "cosine":
            return 0.5 * (1.0 - math.cos(math.pi * scale))
        return scale

    def momentum(self, step: int) -> float:
        """Muon's momentum: linear from ``muon_momentum_warmup_start``, then ``muon_momentum`` for good."""
        start, end = self.train.muon_momentum_warmup_start, self.train.muon_momentum
        length = self.train.muon_momentum_warmup_steps
        part = min(step / length, 1.0) if length > 0 else 1.0
        return (1.0 - part) * start + part * end

    def qat(self, step: int, seconds: float) -> bool:
        """Whether this step's forward pass sees quantised matrices; decided once, at the step's start."""
        return self._progress(step, seconds) >= self.train.qat_start_frac

    def looping(self, step: int, seconds: float) -> bool:
        """Whether the model's layers run with their loops in this step; decided once, at its start."""
        return self._progress(step, seconds) >= self.train.enable_looping_at

    def _progress(self, step: int, seconds: float) -> float:
        limit = self.train.max_wallclock_seconds
        return seconds / limit if limit > 0 else step / self.train.iterations

    def snapshot(self, step: int, lr_scale: float) -> bool:
        """Whether the weights join the running mean after this step, which used the multiplier ``lr_scale``."""
        averaging = self.train.swa_enabled and self.train.ema_decay == 0
        return averaging and lr_scale < self.train.swa_start_frac and (step + 1) % self.train.swa_every == 0

    def done(self, step: int, seconds: float) -> bool:
        """Whether the run ends here: N steps are finished, or the time limit has passed."""
        steps, limit = self.train.iterations, self.train.max_wallclock_seconds
        return (0 < steps <= step) or (0 < limit <= seconds)

    def validate(self, step: int, done: bool) -> bool:
        """Whether the validation loss is measured after ``step`` steps; always where the run is ``done``."""
        every = self.train.val_loss_every
        return done or (every > 0 and step % every == 0)

    def early_warmdown(self, step: int, seconds: float, timed_steps: int | None = None) -> str | None:
        """A warning with its remedy if the learning rate is already falling, else None.

        For the start of a run: asked at step 0 and, under a time limit, once more at the first step with t > 0.
        """
        scale = self.lr_scale(step, seconds, timed_steps)
        if scale == 1:
            return None
        limit, iterations, iters = self.train.max_wallclock_seconds, self.train.iterations, self.train.warmdown_iters
        remedy = "Set train.warmdown_frac (0.5: the second half) or lower train.warmdown_iters."
        if self.train.warmdown_frac > 0:
            reason = f"train.warmdown_frac = {self.train.warmdown_frac:g} leaves no time at the full rate"
            remedy = "Lower train.warmdown_frac."
        elif limit > 0:
            pace = seconds / max(step if timed_steps is None else timed_steps, 1)
            reason = (
                f"train.warmdown_iters = {iters} steps of {pace:.3g} s each exceed the {limit - seconds:.4g} s left"
            )
        else:
            reason = f"train.warmdown_iters = {iters} exceeds train.iterations = {iterations}"
        return (
            f"The learning rate falls from the start, its multiplier at step {step} is {scale:.3g}: {reason}. {remedy}"
        )

    def _linear(self, step: int, seconds: float, timed_steps: int) -> float:
        """The multiplier before it is shaped: time left over warmdown time, or steps left over warmdown steps."""
        limit, frac = self.train.max_wallclock_seconds, self.train.warmdown_frac
        if limit > 0:
            left = max(limit - seconds, 0.0)
            # A step has taken t/s so far: W of them are the warmdown's length in seconds.
            warmdown = frac * limit if frac > 0 else self.train.warmdown_iters * seconds / max(timed_steps, 1)
        else:
            left = float(max(self.train.iterations - step, 0))
            warmdown = frac * self.train.iterations if frac > 0 else float(self.train.warmdown_iters)
        return min(1.0, left / warmdown) if warmdown > 0 else 1.0
