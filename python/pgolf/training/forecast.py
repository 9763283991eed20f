"""How long a run will take on this machine, before its first step: a recipe for eight GPUs on two cores takes days."""

from __future__ import annotations

from dataclasses import dataclass

from pgolf.config import Config
from pgolf.scoring.evaluation import plan_windows
from pgolf.system.speed import flop_per_token

SLOW_STEP, SLOW_RUN = 30.0, 24 * 3600.0  # seconds from which a person wants to be told before


@dataclass(frozen=True)
class Forecast:
    """Least times in seconds, at the machine's measured limit; real ones are up to three times as long.

    step: one training step. training: all of them, or as many as start within the time limit. scoring: the validations
    and the final score.
    """

    step: float
    training: float
    scoring: float

    @property
    def run(self) -> float:
        """The whole run."""
        return self.training + self.scoring

    @property
    def is_slow(self) -> bool:
        """Whether a person should be told before the run begins."""
        return self.step > SLOW_STEP or self.run > SLOW_RUN


def forecast(config: Config, val_targets: int, flops: float) -> Forecast:
    """What a run takes at least.

    Args:
        config: the run's.
        val_targets: validation targets.
        flops: what the machine reaches at most, FLOP/s (`pgolf.system.speed.Limit`).
    """
    train, ev = config.train, config.eval
    plain, looped = (flops / flop_per_token(config.model, train.train_seq_len, looping) for looping in (False, True))
    step = train.train_batch_tokens / (looped if train.enable_looping_at == 0 else plain)  # the first
    late = train.train_batch_tokens / looped
    at = train.enable_looping_at
    limits = [train.iterations * (at * step + (1 - at) * late)] if train.iterations else []
    if train.max_wallclock_seconds:
        # The last step begins within the limit.
        limits.append(max(train.max_wallclock_seconds, step))
    training = min(limits)
    # A forward pass is a third of a step's arithmetic. Validated are the beginning, every so many steps, and the end as
    # trained, averaged and quantised.
    times = 4 + (int(training / step) // train.val_loss_every if train.val_loss_every else 0)
    tokens = times * val_targets + _scored_tokens(config, val_targets) * (3 if ev.method == "ttt" else 1)
    return Forecast(step, training, tokens / (3 * looped))


def _scored_tokens(config: Config, targets: int) -> int:
    """Tokens that the final score's windows read, all together."""
    ev = config.eval
    if ev.method == "ttt":  # a window of at most the context for every chunk
        return targets * ev.ttt_eval_seq_len // ev.ttt_chunk_size
    plan = plan_windows(ev.method, targets, config.eval_seq_len, ev.eval_stride, ev.tail)
    return int(plan.length.sum())
