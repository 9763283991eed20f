"""The fitted budget: sizes are exact, losses are those of the artifact, and the choice is the best of the model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pgolf
from pgolf.artifacts import budget
from pgolf.config import ExportConfig, ModelConfig
from pgolf.report.plot import plot_frontier
from tests.runs import pgolf_

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ModelConfig(
    vocab_size=512, num_layers=2, model_dim=32, num_heads=2, num_kv_heads=1, bigram_vocab_size=64, bigram_dim=16
)
SETTINGS = ExportConfig(policy=[("*.mlp.*", "int5"), ("*", "int6")], prune=0.03, small_numel=600)
DATA = np.random.default_rng(1).integers(0, 512, 3000)


@pytest.fixture(scope="module")
def model() -> pgolf.GPT:
    """Weights that all matter: at initialisation most projections are zero."""
    made = pgolf.GPT(SMALL, seed=3, device="cpu")
    dice = np.random.default_rng(2)
    made.load_state_dict(
        {name: w + dice.normal(0, 0.1, w.shape).astype(np.float32) for name, w in made.state_dict().items()}
    )
    made.train_seq_len = 32
    return made


def fitted(model: pgolf.GPT, path: Path, limit: int = 30_000, **arguments: Any) -> budget.FitReport:
    return pgolf.fit(
        model, path, DATA, limit_bytes=limit, policy=SETTINGS, **{"margin": 100, "tokens": 300, **arguments}
    )


def test_the_artifact_is_the_largest_that_fits_and_scores_what_was_measured(model: pgolf.GPT, tmp_path: Path) -> None:
    code = tmp_path / "train.py"
    code.write_text("#" * 2000)
    before = model.state_dict()
    found = fitted(model, tmp_path / "m.pgolf", code=code)
    size = (tmp_path / "m.pgolf").stat().st_size
    assert found.export.bytes == found.chosen.bytes == size
    assert 0.98 * 27_900 < size <= 30_000 - 2000 - 100
    assert found.export.fits and found.export.margin >= 100
    assert found.tokens == 320 and found.exact_bpb is None

    loaded = pgolf.load(tmp_path / "m.pgolf", device="cpu")
    rows = np.stack([DATA[i * (3000 - 33) // 19 :][:33] for i in range(20)])[1::2]
    assert loaded.loss(rows[:, :-1], rows[:, 1:]) == pytest.approx(found.chosen.loss, abs=1e-6)
    assert model.loss(rows[:, :-1], rows[:, 1:]) == pytest.approx(found.exact_loss, abs=1e-6)
    for name, w in model.state_dict().items():
        np.testing.assert_array_equal(w, before[name])


def test_the_policy_makes_the_same_bytes_again(model: pgolf.GPT, tmp_path: Path) -> None:
    found = fitted(model, tmp_path / "a.pgolf")
    pgolf.export(model, tmp_path / "b.pgolf", policy=found.policy, prune=0, small_numel=SETTINGS.small_numel)
    assert (tmp_path / "a.pgolf").read_bytes() == (tmp_path / "b.pgolf").read_bytes()
    encodings = {tensor.name: tensor.encoding for tensor in found.export.tensors}
    assert encodings["smear.gate"] == "fp16"
    assert set(found.sensitivity) == {name for name, kind in encodings.items() if kind.startswith("rms:")}
    assert all(value > 0 for value in found.sensitivity.values())


def test_more_bytes_promise_less_loss(model: pgolf.GPT, tmp_path: Path) -> None:
    found = fitted(model, tmp_path / "m.pgolf")
    sizes = [point.bytes for point in found.frontier]
    promised = [point.predicted for point in found.frontier]
    assert sizes == sorted(sizes) and promised == sorted(promised, reverse=True)
    for point in found.frontier:
        assert point.bytes == pytest.approx(float(point.name.strip("%")) / 100 * found.recipe.bytes, rel=0.02)


def test_the_report_as_a_dictionary_and_a_picture(model: pgolf.GPT, tmp_path: Path) -> None:
    found = fitted(model, tmp_path / "m.pgolf")
    values = json.loads(json.dumps(found.to_dict()))
    assert values["chosen"] == json.loads(json.dumps(vars(found.chosen)))
    assert values["export"]["bytes"] == found.export.bytes
    plot_frontier(found, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_on_the_command_line(model: pgolf.GPT, small_corpus: Path, tmp_path: Path) -> None:
    pgolf.export(model, tmp_path / "m.pgolf", policy=[("*", "fp16")])
    result = pgolf_(
        "export", tmp_path / "m.pgolf", "--out", tmp_path / "small.pgolf", "--fit", 40_000, "--small-numel", 600,
        "--data", small_corpus, "--tokens", 200, "--plot", tmp_path / "f.png", "--device", "cpu", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["export"]["bytes"] == (tmp_path / "small.pgolf").stat().st_size <= 39_000
    assert report["chosen"]["bpb"] > 0 and (tmp_path / "f.png").is_file()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, r"The coarsest encodings take [\d,]+ bytes; 900 are left", {"limit": 1000}),
        (
            ValueError,
            "is 500; the code takes 0 and the margin 500, and nothing is left",
            {"limit": 500, "margin": 500},
        ),
        (ValueError, "limit_bytes is 0; the code takes 0 and the margin 100", {"limit": 0}),
        (ValueError, "margin is -1; expected at least 0", {"margin": -1}),
        (ValueError, "tokens is 0; ", {"tokens": 0}),
        (TypeError, r"tokens is 2\.5; expected an integer", {"tokens": 2.5}),
        (ValueError, "seq_len is 0; expected at least 1", {"seq_len": 0}),
        (ValueError, "seq_len is -5; expected at least 1", {"seq_len": -5}),
        (ValueError, r"data has 3,000 tokens; 188 windows of 33 are needed. Ask for fewer", {"tokens": 3000}),
        (FileNotFoundError, "There is no script", {"code": "no.py"}),
    ],
)
def test_refusals_leave_no_file(
    model: pgolf.GPT, tmp_path: Path, error: type[Exception], message: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        fitted(model, tmp_path / "m.pgolf", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_weight_beyond_fp16_is_stored_in_steps(tmp_path: Path) -> None:
    name = "blocks.0.mlp.fc.weight"
    fresh = pgolf.GPT(SMALL, seed=3, device="cpu")
    state = fresh.state_dict()
    state[name][0, 0] = 1e5
    fresh.load_state_dict(state)
    found = fitted(fresh, tmp_path / "m.pgolf", limit=10**6, seq_len=32)
    encodings = {tensor.name: tensor.encoding for tensor in found.export.tensors}
    assert encodings[name].startswith("rms:") and encodings["blocks.1.mlp.fc.weight"] == "fp16"
    assert all(np.isfinite(point.bytes) for point in (found.chosen, *found.frontier))


def test_a_model_without_training_length_or_large_matrices_is_named(tmp_path: Path) -> None:
    fresh = pgolf.GPT(SMALL, seed=1, device="cpu")
    with pytest.raises(ValueError, match="no training length to take; give seq_len"):
        fitted(fresh, tmp_path / "m.pgolf")
    with pytest.raises(ValueError, match="No matrix is left to the policy"):
        pgolf.fit(fresh, tmp_path / "m.pgolf", DATA, seq_len=32, policy=ExportConfig(small_numel=10**6))


def test_sensitivities_are_second_derivatives() -> None:
    """Of a loss with a steep slope, which one probe alone would see instead."""
    dice = np.random.default_rng(4)
    state = {name: dice.normal(0, 1, (40, 50)).astype(np.float32) for name in ("a", "b")}
    curvature = {"a": 0.5, "b": 2.0}

    class Parabola:
        def of(self, text: object, replaced: dict[str, Any] | None = None) -> float:
            moves = {name: w.astype(np.float64) - state[name] for name, w in (replaced or {}).items()}
            return 7 + sum(100 * move.sum() + curvature[name] * (move**2).sum() for name, move in moves.items())

    found = budget._sensitivities(Parabola(), None, state, ["a", "b"], lambda *_: None)  # type: ignore[arg-type]
    assert found == pytest.approx(curvature, rel=1e-4)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(1e-3, 1e3), st.integers(1, 50)), min_size=2, max_size=3), st.floats(0.2, 0.9))
def test_no_other_plan_of_the_same_size_promises_less(tensors: list[tuple[float, int]], share: float) -> None:
    """Bytes fall by an eighth of a byte a weight and octave, errors by a factor of four: as steps do."""
    curves = {}
    octaves = np.append(budget._GRID, 11.0)
    for index, (_, weights) in enumerate(tensors):
        curves[f"{index}"] = (1000 * weights * (2 + octaves) / 8, weights / 4**octaves)
    solver = budget._Solver(curves, {f"{index}": a for index, (a, _) in enumerate(tensors)}, 0)
    total = share * sum(size[-2] for size, _ in curves.values())
    plan = solver.solve(total)
    promised = size = 0.0
    for index, (a, _) in enumerate(tensors):
        name = f"{index}"
        at = -1 if plan[name] == "fp16" else int(np.argmin(abs(octaves - np.log2(float(plan[name][4:])))))
        size, promised = size + curves[name][0][at], promised + a * curves[name][1][at]
    assert size <= total * 1.001 or all(encoding == "rms:1" for encoding in plan.values())
    of = [curves[f"{index}"] for index in range(len(tensors))]
    for choice in itertools.product(range(0, octaves.size, 20), repeat=len(tensors)):
        if sum(sizes[at] for (sizes, _), at in zip(of, choice, strict=True)) <= size:
            losses = [a * errors[at] for (a, _), (_, errors), at in zip(tensors, of, choice, strict=True)]
            assert sum(losses) >= promised * 0.99
