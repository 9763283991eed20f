"""float16's loss scale, on the CPU that rounds as a GPU stores: gradients are multiplied by it, a step that overflows
changes no weight and halves it, 2,000 steps without double it (docs/gpu.md)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from pgolf import _C, GPT
from pgolf.config import NEWTON_SCHULZ
from tests.test_model import tiny, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {
    "lr": [0.02] * 4,
    "weight_decay": [0.0] * 4,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "momentum": 0.9,
    "clip": 1.0,
}
BROKEN = "blocks.0.mlp.fc.weight"


class Run:
    """Steps of a tiny model on one batch."""

    def __init__(self, dtype: str) -> None:
        config = tiny()
        self.model = GPT(config, seed=1, device="cpu", dtype=dtype)
        self.optimizer = _C.Optimizer(self.model._native, 5, NEWTON_SCHULZ["keller_jordan"], False)
        ids, targets = tokens(config, 2, 9)
        self.batch = ids.astype(np.int32), targets.astype(np.int32)
        self.factor = 1.0
        """Of the mean loss."""

    def gradients(self) -> dict[str, np.ndarray]:
        native = self.model._native
        native.begin_step(False)
        native.micro_step(*self.batch, self.factor / self.batch[0].size)
        native.end_step()
        return {name: native.read_grad(name) for name in self.model.state_dict()}

    def step(self) -> tuple[float, bool]:
        """The gradient norm, and whether all gradients were finite."""
        self.gradients()
        _, norm, finite, _, overflows = self.optimizer.wait(self.optimizer.step(SETTINGS))
        assert overflows == max(0, -self.optimizer.counts[2])
        return norm, finite

    def overflow(self) -> None:
        """A step with weights that no float16 number is: it must change nothing."""
        weight = self.model._native.read(BROKEN)
        self.model._native.write(BROKEN, np.full_like(weight, 3e38))
        before = self.model.state_dict()
        moments = {name: self.optimizer.read(name) for name in self.optimizer.state_names()}
        assert not self.step()[1]
        assert all(np.array_equal(value, before[name]) for name, value in self.model.state_dict().items())
        assert all(np.array_equal(self.optimizer.read(name), value) for name, value in moments.items())
        self.model._native.write(BROKEN, weight)


def test_gradients_are_multiplied_and_norms_are_not() -> None:
    wide, narrow = Run("float32"), Run("float16")
    expected, found = wide.gradients(), narrow.gradients()
    assert (wide.model._native.loss_scale(), narrow.model._native.loss_scale()) == (1.0, 65536.0)
    for name, gradient in expected.items():
        error = np.linalg.norm(found[name] / 65536 - gradient)
        assert error <= 0.02 * np.linalg.norm(gradient) + 1e-6, name
    assert narrow.step()[0] == pytest.approx(wide.step()[0], rel=0.01)
    for name in wide.optimizer.state_names():  # nor are moments
        moment = wide.optimizer.read(name)
        error = np.linalg.norm(narrow.optimizer.read(name) - moment)
        assert error <= 0.05 * np.linalg.norm(moment) + 1e-9, name


def test_an_overflow_changes_nothing_but_the_scale() -> None:
    run = Run("float16")
    assert run.optimizer.counts == (0, 65536.0, 0)
    assert run.step()[1] and run.optimizer.counts == (1, 65536.0, 1)
    run.overflow()
    assert run.optimizer.counts == (1, 32768.0, 0)
    assert run.step()[1] and run.optimizer.counts == (2, 32768.0, 1)


def test_two_thousand_steps_without_an_overflow_double_the_scale() -> None:
    run = Run("float16")
    run.optimizer.counts = (7, 512.0, 1998)
    assert run.step()[1] and run.optimizer.counts == (8, 512.0, 1999)
    assert run.step()[1] and run.optimizer.counts == (9, 1024.0, 0)


def test_the_scale_has_limits() -> None:
    run = Run("float16")
    run.optimizer.counts = (7, 2.0**-14, 5)
    run.overflow()
    assert run.optimizer.counts == (7, 2.0**-14, -1)
    run.overflow()
    assert run.optimizer.counts == (7, 2.0**-14, -2)  # in a row
    assert run.step()[1] and run.optimizer.counts == (8, 2.0**-14, 1)
    run.factor = 1e-4  # gradients that 2**24 times are no overflow
    run.optimizer.counts = (7, 2.0**24, 1999)
    assert run.step()[1] and run.optimizer.counts == (8, 2.0**24, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_have_no_scale_and_stop_at_what_is_not_finite(dtype: str) -> None:
    run = Run(dtype)
    assert run.step()[1] and run.optimizer.counts[:2] == (1, 1.0)
    run.overflow()
    assert run.optimizer.counts[:2] == (1, 1.0)
    before = run.model.state_dict()
    assert not run.step()[1]  # nor does a later step change anything, until the host knows
    assert all(np.array_equal(value, before[name]) for name, value in run.model.state_dict().items())
    run.optimizer.go_on()
    assert run.step()[1] and run.optimizer.counts[:2] == (2, 1.0)


def test_counts_that_no_run_has_are_refused() -> None:
    run = Run("float16")
    for counts, sentence in (
        ((-1, 1.0, 0), "Adam's step count is -1; it cannot be negative."),
        ((0, 0.0, 0), "The loss scale is 0; it must be above 0."),
        ((0, 1.0, 2**40), f"The steps since the loss scale changed are {2**40}, which no run has taken."),
        ((0, 1.0, -(2**63)), f"The steps since the loss scale changed are -{2**63}, which no run has taken."),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            run.optimizer.counts = counts
