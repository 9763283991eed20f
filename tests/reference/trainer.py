"""The optimizers and schedules of docs/spec.md §3, all in float64. s = steps finished before this one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tests.reference.model import ReferenceGPT, as_ids, qat_clips
from tests.reference.shapes import is_control

# Schedules ------------------------------------------------------------------------------------------------------------


def lr_multiplier(cfg: Any, step: int, seconds: float) -> float:
    """The shaped learning-rate multiplier of the step after `step` finished ones, `seconds` into training."""
    m = linear_multiplier(cfg, step, seconds)
    return 0.5 * (1 - math.cos(math.pi * m)) if cfg.warmdown_shape == "cosine" else m


def linear_multiplier(cfg: Any, step: int, seconds: float) -> float:
    """m before the shape: the time form if there is a limit, else the iteration form; `warmdown_frac` 0: not given."""
    limit, frac, total = cfg.max_wallclock_seconds, cfg.warmdown_frac, cfg.iterations
    if limit > 0:
        ramp = frac * limit if frac > 0 else cfg.warmdown_iters * seconds / max(step, 1)
        return min(1.0, max(limit - seconds, 0.0) / ramp) if ramp > 0 else 1.0
    ramp = frac * total if frac > 0 else cfg.warmdown_iters
    return (total - step) / ramp if ramp > 0 and step >= max(total - ramp, 0) else 1.0


def muon_momentum(cfg: Any, step: int) -> float:
    """`lerp(start, end, min(s/length, 1))`; length 0 is the end at once."""
    length = cfg.muon_momentum_warmup_steps
    f = min(step / length, 1.0) if length > 0 else 1.0
    return cfg.muon_momentum_warmup_start * (1 - f) + cfg.muon_momentum * f


def looping_active(cfg: Any, step: int, seconds: float) -> bool:
    """§2.3: whether the step runs the layers with their loops."""
    limit = cfg.max_wallclock_seconds
    return (seconds / limit if limit > 0 else step / cfg.iterations) >= cfg.enable_looping_at


def qat_active(cfg: Any, step: int, seconds: float) -> bool:
    """Whether the step trains through quantised weights; `qat_start_frac` None is never."""
    if cfg.qat_start_frac is None:
        return False
    limit = cfg.max_wallclock_seconds
    progress = seconds / limit if limit > 0 else step / cfg.iterations
    return progress >= cfg.qat_start_frac


def snapshot_due(cfg: Any, step: int, multiplier: float) -> bool:
    """Whether the weights after this step, whose shaped multiplier is given, enter the SWA sum."""
    return cfg.swa_enabled and multiplier < cfg.swa_start_frac and (step + 1) % cfg.swa_every == 0


# Optimizers -----------------------------------------------------------------------------------------------------------


def clip_scale(gradients: Sequence[Tensor], limit: float) -> tuple[float, float]:
    """The factor `min(1, limit/(norm + 1e−6))` (1 where the limit is 0) and the norm over all gradients."""
    norm = math.sqrt(sum(g.to(torch.float64).square().sum().item() for g in gradients))
    return (min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0), norm


KELLER_JORDAN = ((3.4445, -4.7750, 2.0315),)


def newton_schulz(u: Tensor, steps: int = 5, coefficients: Sequence[Sequence[float]] = KELLER_JORDAN) -> Tensor:
    """NS5: the quintic iterations that drive the singular values of u towards 1."""
    if u.shape[0] > u.shape[1]:
        return newton_schulz(u.T, steps, coefficients).T
    x = u / (u.norm() + 1e-7)
    for step in range(steps):
        one, two, three = coefficients[min(step, len(coefficients) - 1)]
        a = x @ x.T
        b = two * a + three * a @ a
        x = one * x + b @ x
    return x


def muon_update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    lr: float,
    mu: float,
    decay: float,
    steps: int,
    coefficients: Sequence[Sequence[float]] = KELLER_JORDAN,
    normalize_rows: bool = False,
) -> None:
    """One Muon step on p, with its momentum m, in place."""
    m.copy_(mu * m + g)
    u = g + mu * m
    if normalize_rows:
        u = u / u.norm(dim=-1, keepdim=True).clamp_min(1e-7)
    u = newton_schulz(u, steps, coefficients)
    rows, cols = p.shape
    p.copy_(p * (1 - lr * decay) - lr * math.sqrt(max(1, rows / cols)) * u)


def adamw_update(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, t: int, lr: float, betas: tuple[float, float], eps: float, decay: float
) -> None:
    """Step t (from 1) of AdamW on p, with its moments m and v, in place."""
    b1, b2 = betas
    p.copy_(p * (1 - lr * decay))
    m.copy_(b1 * m + (1 - b1) * g)
    v.copy_(b2 * v + (1 - b2) * g.square())
    p.copy_(p - lr * (m / (1 - b1**t)) / (v.sqrt() / math.sqrt(1 - b2**t) + eps))


def parameter_group(name: str) -> str:
    """The optimizer group of the table of §1: `head`, `embed`, `scalar` or `matrix`."""
    if name == "lm_head.weight":
        return "head"
    if name in ("tok_emb.weight", "bigram.embed.weight"):
        return "embed"
    return "scalar" if is_control(name) else "matrix"


# Training -------------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """What one training step did: its mean loss before the update, the gradients' norm and the schedules' values."""

    loss: float
    grad_norm: float
    lr_scale: float
    momentum: float
    qat: bool
    snapshot: bool


class ReferenceTrainer:
    """Training from `state` in float64; `model` holds the running weights."""

    def __init__(self, cfg_model: Any, cfg_train: Any, state: Mapping[str, npt.ArrayLike]) -> None:
        self.cfg = cfg_train
        self.model = ReferenceGPT(cfg_model, state)
        self.finished = 0
        self.snapshots = 0
        params = self.model.params
        self.m = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
        self.v = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
        self.swa_sum = {name: torch.zeros_like(p, requires_grad=False) for name, p in params.items()}
        self.ema = {name: p.detach().clone() for name, p in params.items()}

    def mean_gradients(self, batches: Sequence[tuple[Any, Any]]) -> tuple[float, dict[str, Tensor]]:
        """The loss and its gradients averaged over all tokens of the step, whatever its parts."""
        tokens = sum(as_ids(targets).numel() for _, targets in batches)
        loss = 0.0
        total = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.model.params.items()}
        for ids, targets in batches:
            part = self.model.token_losses(ids, targets).sum() / tokens
            loss += part.item()
            for name, g in self.model.gradients(part).items():
                total[name] += g
        return loss, total

    def step(self, batches: Sequence[tuple[Any, Any]], seconds: float = 0.0) -> Step:
        """One optimizer step over the (ids, targets) parts in `batches`, `seconds` into training."""
        cfg, s = self.cfg, self.finished
        multiplier = lr_multiplier(cfg, s, seconds)
        momentum = muon_momentum(cfg, s)
        qat = qat_active(cfg, s, seconds)
        self.model.clips = qat_clips(self.model.cfg) if qat else {}
        self.model.looping = looping_active(cfg, s, seconds)
        loss, gradients = self.mean_gradients(batches)
        self.model.clips = {}
        scale, norm = clip_scale(list(gradients.values()), cfg.grad_clip_norm)
        with torch.no_grad():
            for name, g in gradients.items():
                self.update(name, scale * g, multiplier, momentum)
            snapshot = self.average(s, multiplier)
        self.finished += 1
        return Step(loss, norm, multiplier, momentum, qat, snapshot)

    def update(self, name: str, g: Tensor, multiplier: float, momentum: float) -> None:
        """One parameter's step with its group's optimizer."""
        cfg, p, m, v = self.cfg, self.model.params[name], self.m[name], self.v[name]
        group = parameter_group(name)
        if group == "matrix":
            lr = cfg.matrix_lr * multiplier
            polynomials, normalize = cfg.muon_coefficients, cfg.muon_row_normalize
            decay, steps = cfg.muon_weight_decay, cfg.muon_backend_steps
            muon_update(p, g, m, lr, momentum, decay, steps, polynomials, normalize)
            return
        embed_lr = cfg.tied_embed_lr if self.model.cfg.tie_embeddings else cfg.embed_lr
        lr = {"embed": embed_lr, "scalar": cfg.scalar_lr, "head": cfg.head_lr}[group] * multiplier
        decay = 0.0 if group == "head" else cfg.weight_decay
        adamw_update(p, g, m, v, self.finished + 1, lr, (cfg.beta1, cfg.beta2), cfg.adam_eps, decay)

    def average(self, s: int, multiplier: float) -> bool:
        """After step s: move the exponential average, or add a snapshot to the sum; whether a snapshot was taken."""
        decay, params = self.cfg.ema_decay, self.model.params
        if decay > 0:
            for name, p in params.items():
                self.ema[name] = decay * self.ema[name] + (1 - decay) * p
            return False
        if not snapshot_due(self.cfg, s, multiplier):
            return False
        for name, p in params.items():
            self.swa_sum[name] += p
        self.snapshots += 1
        return True

    def state(self) -> dict[str, np.ndarray]:
        """A copy of the running weights, float64."""
        return self.model.state()

    def final_state(self) -> dict[str, np.ndarray]:
        """The weights training ends with: EMA, the mean of at least two snapshots, or the running ones; float64."""
        if self.cfg.ema_decay > 0:
            return {name: value.numpy().copy() for name, value in self.ema.items()}
        if self.snapshots >= 2:
            return {name: (value / self.snapshots).numpy() for name, value in self.swa_sum.items()}
        return self.state()
