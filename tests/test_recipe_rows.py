"""Every row of the recipes' table, acted out: a recipe that ignored it would fail.

TABLE and POLICIES state what the submissions say (openai/parameter-golf #180, #286, #289, #465, #560, #997); (b): not
stated, taken from the base. Each row has one test, marked with its title, which runs for every recipe: the recipe,
scaled down by overrides that leave the row's own key alone or divide it by SHRINK, trains, exports or scores, and what
it did is compared with the cell. What all recipes share is at the end. That the files hold the documented numbers is
tests/test_recipes.py.
"""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import zstandard

import pgolf
import pgolf.training.trainer
from pgolf.artifacts.artifact import export_with, read_artifact
from pgolf.artifacts.container import unpack
from pgolf.config import NEWTON_SCHULZ, Config, ModelConfig
from pgolf.data.folder import find_data
from pgolf.model import GPT, parameter_shapes
from pgolf.runs.records import Report, StepRecord
from pgolf.scoring.evaluation import evaluate
from pgolf.training.trainer import Trainer
from tests.reference import evaluate as reference_evaluate
from tests.reference import quant as reference_quant
from tests.reference.model import fake_quantise, perturb, qat_clips
from tests.reference.rng import init_state
from tests.reference.trainer import ReferenceTrainer, newton_schulz
from tests.runs import Clock
from tests.test_cuda_library import COMPILER, python, stand_in_gpu
from tests.test_training import batches, use_float64

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("one_thread")

TABLE = """
| | base | pr286 | pr289 | pr465 | pr560 | pr997 |
| --- | --- | --- | --- | --- | --- | --- |
| layers | 10 | 10 | 11 | 10 | 10 | 10 |
| train length T | 2048 | 2048 | 1024 | 2048 | 2048 (b) | 2048 (b) |
| batch, tokens | 786,432 | 786,432 | 524,288 | 786,432 | 131,072 | 131,072, micro-batches that fit 16 GB |
| bigram buckets n | 10,240 | 4,096 | 2,048 | 4,096 | 10,240 | 4,096 |
| matrix lr | 0.02 | 0.025 | 0.02 (b) | 0.02 | 0.02 (b) | 0.02 (b) |
| AdamW decay | 0.04 | 0.01 | 0.04 (b) | 0.01 | 0.04 (b) | 0.04 |
| clip | 0.3 | 0.3 | 0.3 (b) | 0.3 | 0.3 (b) | 0.3 (b) |
| warmdown | 3000 linear | 3000 linear | 3000 linear (b) | 3000 cosine | 3000 linear (b) | 3000 linear (b) |
| SWA start / every | 0.4 / 50 | 0.5 / 50 | 0.5 / 200 | 0.5 / 50 | 0.4 / 50 (b) | 0.4 (b) / 60 (about 20 snapshots) |
| late QAT | – | from 0.85 | – | – | – | – |
| time limit, s | 600 | 600 | 600 | 600 | 2700 | 5400 |
| pruning | 3 % | – | – | – | 3 % (b) | – |
| small_numel → fp16 | 8,192 | 65,536 | 8,192 (b) | 8,192 (b) | 8,192 (b) | 8,192 (b) |
| scored by | sliding 64, T 2048, reference tail | sliding 64, exact tail | sliding 64, T 1024, reference tail (b) \
| sliding 64, reference tail (b) | sliding 64, reference tail (b) | round trip, standard |
| also needed | | | document batching | | bf16→fp16 fallback, weights-only restore for eval \
| runs with no compiler on the user's machine, 16 GB |
"""
POLICIES = """
| recipe | policy |
| --- | --- |
| base, pr560 | tok_emb.* fp16, blocks.8.attn.c_k.* fp16, *.mlp.* int5, *.attn.* int6, bigram.* int6, lm_head.* fp16, \
* int8 |
| pr286 | tok_emb.* fp16, blocks.9.attn.c_k.* fp16, *.mlp.* int5, *.attn.* int6, bigram.* int8, lm_head.* fp16, * int8 |
| pr289 | tok_emb.* fp16, *.mlp.* int6, *.attn.* int6, bigram.* int6, lm_head.* fp16, * int8 |
| pr465 | tok_emb.* int6, *.mlp.* int5, *.attn.* int6, bigram.* int6, lm_head.* int6, * int8 |
| pr997 | tok_emb.* fp16, *.mlp.* int6, *.attn.* int6, bigram.* int8, lm_head.* fp16, * int8 |
"""
CONTROLS = (
    *("blocks.0.attn_scale", "blocks.0.mlp_scale", "blocks.0.resid_mix", "blocks.0.attn.q_gain"),
    *("skip_weights", "smear.gate", "bigram.scale"),
)
# The steps that the submissions report for their time limits.
STEPS = {"base": 6709, "pr286": 4354, "pr289": 9906, "pr465": 7600, "pr560": 14085, "pr997": 2469}
SHRINK = 10  # of steps, and of what is counted in steps: the warmdown, snapshots
SLOTS = 8


def cells(table: str) -> list[list[str]]:
    lines = table.strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


(_, *NAMES), *_ROWS = cells(TABLE)
ROWS = {title: dict(zip(NAMES, values, strict=True)) for title, *values in _ROWS}
POLICY = {
    name: re.findall(r"(\S+) (int5|int6|int8|fp16|fp32)", policy)
    for names, policy in cells(POLICIES)[1:]
    for name in names.split(", ")
}
TESTED: list[str] = []


def row(title: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks the test of a row: it runs once for each recipe, with the row's cell."""
    TESTED.append(title)
    return pytest.mark.parametrize(("recipe", "cell"), ROWS[title].items(), ids=NAMES)


def number(cell: str) -> float:
    """The cell's first number."""
    return float(re.findall(r"[\d,]*\.?\d+", cell)[0].replace(",", ""))


def test_every_row_has_a_test() -> None:
    assert sorted(TESTED) == sorted(ROWS)
    assert sorted(POLICY) == sorted(NAMES)


# Runs -----------------------------------------------------------------------------------------------------------------

TOKENS = 12  # ids that the data holds: few pairs, so that some bigram buckets are never read
SMALL = {
    "model.vocab_size": 64,
    "model.num_layers": 2,
    "model.model_dim": 8,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.bigram_vocab_size": 300,
    "model.bigram_dim": 6,
    "train.train_batch_tokens": 16 * SLOTS,
    "train.train_seq_len": 16,
    "train.val_batch_tokens": 4096,
    "train.val_loss_every": 0,
    "train.micro_batch_seqs": 0,
    "eval.eval_seq_len": 128,  # at least the stride
}
# One step at the full rate.
ONE_STEP = {"train.iterations": 1, "train.max_wallclock_seconds": 0, "train.warmdown_iters": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100,000 training and 4,700 validation tokens, each drawn with the one before it in mind."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    for split, count in (("train", 100_000), ("val", 4_700)):
        tokens = (2 + rng.geometric(0.3, count).cumsum() % TOKENS).astype(np.uint16)  # no BOS: one document
        pgolf.write_shard(folder / f"tiny_{split}_000000.bin", tokens)
    return folder


def scaled(recipe: str, *kept: str, **changes: Any) -> Config:
    """The recipe with SMALL's values but for the `kept` keys; `changes` with __ for the dot."""
    small = {key: value for key, value in SMALL.items() if key not in kept}
    return Config.from_recipe(recipe, {**small, **{key.replace("__", "."): value for key, value in changes.items()}})


def lively(model: Any) -> dict[str, np.ndarray]:
    """A state in which no tensor is zero, every one matters, and logits are no longer nearly equal."""
    rng = np.random.default_rng(1)
    state = perturb(init_state(model, 42), 1)
    return {name: w + 0.4 * rng.standard_normal(w.shape) if w.ndim == 2 else w for name, w in state.items()}


def perturbed(config: Config, data: Path, **arguments: Any) -> Trainer:
    """A Trainer at such a state."""
    trainer = Trainer(config, data, device="cpu", **arguments)
    trainer.model.load_state_dict(lively(config.model))
    return trainer


def bigram_buckets(last: np.ndarray, this: np.ndarray, buckets: int) -> np.ndarray:
    """Of pairs of small token ids, no product of which leaves 32 bits."""
    return ((36313 * this) ^ (27191 * last)) % (buckets - 1)


@dataclass
class Run:
    """A recipe from its first to its last step, at the submission's speed by the clock, with a tenth of its steps."""

    config: Config
    pace: float
    records: list[StepRecord]
    states: list[dict[str, np.ndarray]]
    """The weights before the first step and after each."""
    final: dict[str, np.ndarray]
    """After averaging."""
    report: Report

    @property
    def times(self) -> list[float]:
        """Of each step, the seconds before it."""
        return [0.0, *(record.seconds for record in self.records[:-1])]

    @functools.cached_property
    def unread(self) -> np.ndarray:
        """(steps + 1, k): values of the bigram table that no token read, which only decay moves."""
        buckets = self.config.model.bigram_vocab_size
        ids = np.arange(2, 2 + TOKENS, dtype=np.int32)
        read = {buckets - 1, *bigram_buckets(ids[:, None], ids, buckets).ravel().tolist()}
        rows = sorted(set(range(buckets)) - read)
        table = np.stack([state["bigram.embed.weight"][rows] for state in self.states]).astype(np.float64)
        return table.reshape(len(table), -1)


@pytest.fixture(scope="module")
def runs(data: Path) -> Callable[[str], Run]:
    @functools.cache
    def run(recipe: str) -> Run:
        config = scaled(recipe)
        config.train.warmdown_iters //= SHRINK
        config.train.swa_every //= SHRINK
        pace = SHRINK * number(ROWS["time limit, s"][recipe]) / STEPS[recipe]
        with mock.patch.object(pgolf.training.trainer, "time", Clock(pace)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The learning rate falls from the start")
            trainer = perturbed(config, data)
            states = [trainer.model.state_dict()]
            records = []
            for record in trainer:
                records.append(record)
                states.append(trainer.model.state_dict())
            report = trainer.finish()
        return Run(config, pace, records, states, trainer.model.state_dict(), report)

    return run


def one_step(config: Config, data: Path, run_dir: Path) -> tuple[Trainer, StepRecord, Report]:
    trainer = perturbed(config, data, run_dir=run_dir)
    (record,) = [record for record in trainer if record.step]
    return trainer, record, trainer.finish()


# The model and its batches --------------------------------------------------------------------------------------------


@row("layers")
def test_layers(recipe: str, cell: str, data: Path, tmp_path: Path) -> None:
    """Each layer is trained, and exported."""
    config = scaled(recipe, "model.num_layers", **ONE_STEP)
    before = lively(config.model)
    trainer, _, _ = one_step(config, data, tmp_path / "run")
    after = trainer.model.state_dict()
    header, stored = read_artifact(tmp_path / "run" / "model.pgolf")
    for state in (after, stored):
        assert {name.split(".")[1] for name in state if name.startswith("blocks.")} == {
            str(layer) for layer in range(int(number(cell)))
        }
    assert header["model"]["num_layers"] == number(cell)
    assert all(np.any(after[name] != before[name]) for name in after)


@row("train length T")
def test_train_length(recipe: str, cell: str, data: Path, tmp_path: Path) -> None:
    """The first step's loss is that of sequences of T tokens, whose context ends with them."""
    length = int(number(cell))
    config = scaled(
        recipe, "train.train_seq_len", model__num_layers=1, train__train_batch_tokens=2048 * SLOTS, **ONE_STEP
    )
    trainer = perturbed(config, data)
    (shard,) = find_data(data).train
    spans = pgolf.read_shard(shard)[: SLOTS * 2049].astype(np.int64).reshape(SLOTS, 2049)
    ids, targets = (part.reshape(-1, length) for part in (spans[:, :-1], spans[:, 1:]))
    expected = trainer.model.loss(ids, targets)
    assert trainer.model.loss(ids.reshape(-1, 512), targets.reshape(-1, 512)) != pytest.approx(expected, rel=1e-5)
    assert next(iter(trainer)).loss == pytest.approx(expected, rel=1e-6)
    assert trainer.model.train_seq_len == length


@row("batch, tokens")
def test_batch(recipe: str, cell: str, data: Path) -> None:
    """A step takes eight spans with a token more each, and its loss is the mean over all of them."""
    tokens = int(number(cell))
    config = scaled(recipe, "train.train_batch_tokens", model__num_layers=1, model__model_dim=4, **ONE_STEP)
    trainer = perturbed(config, data)
    (shard,) = find_data(data).train
    stream = np.resize(pgolf.read_shard(shard), SLOTS * (tokens // SLOTS + 1)).astype(np.int64).reshape(SLOTS, -1)
    expected = trainer.model.loss(stream[:, :-1].reshape(-1, 16), stream[:, 1:].reshape(-1, 16))
    record = next(iter(trainer))
    assert record.tokens == tokens
    assert record.loss == pytest.approx(expected, rel=1e-6)
    assert trainer._stream.position == (tokens + SLOTS) % 100_000
    if "16 GB" in cell:
        check_16_gb(recipe, data, data)


@row("bigram buckets n")
def test_bigram_buckets(recipe: str, cell: str, data: Path) -> None:
    """Exactly the buckets that the hash modulo n − 1 selects are trained."""
    buckets = int(number(cell))
    config = scaled(recipe, "model.bigram_vocab_size", **ONE_STEP)
    trainer = perturbed(config, data)
    ids, targets = next(batches(config, data))
    before = trainer.model.state_dict()["bigram.embed.weight"]
    assert before.shape == (buckets, 6)
    _, gradients = trainer.model.loss_and_grads(ids, targets)
    read = {buckets - 1, *bigram_buckets(ids[:, :-1], ids[:, 1:], buckets).ravel().tolist()}
    assert set(np.flatnonzero(np.abs(gradients["bigram.embed.weight"]).max(axis=1))) == read


# Optimizers -----------------------------------------------------------------------------------------------------------


@row("matrix lr")
def test_matrix_lr(recipe: str, cell: str, runs: Callable[[str], Run], data: Path) -> None:
    """What the first step did to each matrix, over the decay and the orthogonalised gradient that it did it with."""
    run = runs(recipe)
    model = GPT(run.config.model, seed=None, device="cpu")
    model.load_state_dict(run.states[0])
    _, gradients = model.loss_and_grads(*next(batches(run.config, data)))
    matrices = [name for name in gradients if re.search(r"(attn|mlp|bigram)\.(c_.|proj|fc)\.weight", name)]
    assert len(matrices) == 2 * 6 + 1
    for name in matrices:
        before, after = (run.states[step][name].astype(np.float64) for step in (0, 1))
        update = newton_schulz(torch.from_numpy(gradients[name].astype(np.float64))).numpy()
        direction = 0.04 * before + math.sqrt(max(1.0, before.shape[0] / before.shape[1])) * update
        rate = np.vdot(before - after, direction) / np.vdot(direction, direction)
        assert rate == pytest.approx(number(cell), rel=1e-3), name


@row("AdamW decay")
def test_adamw_decay(recipe: str, cell: str, runs: Callable[[str], Run]) -> None:
    """Rows of the bigram table that are never read shrink by 1 − m · 0.03 · decay a step, and by nothing else."""
    run = runs(recipe)
    scales = np.array([record.lr_scale for record in run.records])
    expected = np.log1p(-scales * 0.03 * number(cell)).sum()
    assert np.log(run.unread[-1] / run.unread[0]) == pytest.approx(expected, rel=1e-3)


@row("clip")
def test_clip(recipe: str, cell: str, data: Path) -> None:
    """Adam's first moments after one step are a tenth of the gradients, scaled to the norm of the cell."""
    config = scaled(recipe, **ONE_STEP)
    trainer = perturbed(config, data)
    _, gradients = trainer.model.loss_and_grads(*next(batches(config, data)))
    record = next(iter(trainer))
    assert record.grad_norm is not None and record.grad_norm > 1.5 * number(cell)
    for name in ("tok_emb.weight", "blocks.0.resid_mix", "smear.gate"):
        moment = trainer._optimizer.read(f"adam_m.{name}").reshape(gradients[name].shape)
        expected = 0.1 * number(cell) / record.grad_norm * gradients[name]
        np.testing.assert_allclose(moment, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


# Schedules ------------------------------------------------------------------------------------------------------------


@row("warmdown")
def test_warmdown(recipe: str, cell: str, runs: Callable[[str], Run]) -> None:
    """The multiplier of every step, as logged and as the optimizer applied it."""
    run = runs(recipe)
    limit, warmdown = run.config.train.max_wallclock_seconds, number(cell) / SHRINK
    for step, (record, t) in enumerate(zip(run.records, run.times, strict=True)):
        m = min(1.0, max(limit - t, 0.0) / (warmdown * t / step)) if step else 1.0
        expected = 0.5 * (1 - math.cos(math.pi * m)) if cell.split()[1] == "cosine" else m
        assert record.lr_scale == pytest.approx(expected, rel=1e-9, abs=1e-12)
    rate = 0.03 * run.config.train.weight_decay
    applied = (1 - run.unread[1:] / run.unread[:-1]).mean(axis=1) / rate
    assert applied == pytest.approx([record.lr_scale for record in run.records], abs=2e-3)
    assert min(applied) < 0.01


@row("SWA start / every")
def test_swa(recipe: str, cell: str, runs: Callable[[str], Run]) -> None:
    """The final weights are the mean of those after the steps that the row names."""
    run = runs(recipe)
    found = re.match(r"([\d.]+)(?: \(b\))? / (\d+)", cell)
    assert found is not None
    start, every = float(found[1]), int(found[2]) // SHRINK
    steps = [r.step for r in run.records if r.lr_scale is not None and r.lr_scale < start and r.step % every == 0]
    assert [record.step for record in run.records if record.snapshot] == steps
    assert run.report.snapshots == len(steps) >= 2
    if "about 20" in cell:
        assert abs(len(steps) - 20) <= 1
    for name, weights in run.final.items():
        mean = np.mean([run.states[step][name] for step in steps], axis=0, dtype=np.float64)
        np.testing.assert_allclose(weights, mean, rtol=1e-5, atol=1e-7)
    assert any(np.abs(run.final[name] - weights).max() > 1e-4 for name, weights in run.states[-1].items())


@row("late QAT")
def test_late_qat(recipe: str, cell: str, runs: Callable[[str], Run], data: Path) -> None:
    """From the row's share of the time on, and not before, the loss is that of the quantised matrices."""
    run = runs(recipe)
    limit = run.config.train.max_wallclock_seconds
    start = number(cell) if cell != "–" else math.inf
    active = [t >= start * limit for t in run.times]
    assert [record.qat for record in run.records] == active
    assert any(active) == (cell != "–")
    switch = active.index(True) if any(active) else len(active) - 3
    clips = qat_clips(run.config.model)
    assert {clips["blocks.0.mlp.fc.weight"], clips["blocks.1.attn.c_q.weight"]} == {15, 31}
    model = GPT(run.config.model, seed=None, device="cpu")
    for step, batch in enumerate(batches(run.config, data)):
        if step == switch + 3:
            break
        if step not in (0, switch - 1, switch, switch + 1, switch + 2):
            continue
        state = run.states[step]
        coarse = {
            name: fake_quantise(torch.from_numpy(w), clips[name]).numpy() if name in clips else w
            for name, w in state.items()
        }
        losses = []
        for weights in (state, coarse):
            model.load_state_dict(weights)
            losses.append(model.loss(*batch))
        assert losses[0] != pytest.approx(losses[1], rel=1e-5)
        assert run.records[step].loss == pytest.approx(losses[active[step]], rel=1e-6)


@row("time limit, s")
def test_time_limit(recipe: str, cell: str, runs: Callable[[str], Run]) -> None:
    """The run ends with the first step that ends at the limit or after it."""
    run = runs(recipe)
    before, last = run.times[-1], run.records[-1].seconds
    assert before < number(cell) <= last < number(cell) + run.pace
    assert run.records[-1].step == len(run.records) == run.report.steps
    assert abs(len(run.records) - STEPS[recipe] / SHRINK) <= 1


# The artifact ---------------------------------------------------------------------------------------------------------


@row("pruning")
def test_pruning(recipe: str, cell: str, data: Path, tmp_path: Path) -> None:
    """In the artifact the row's share of every matrix with more than 65,536 elements is zero: the smallest ones."""
    share = number(cell) / 100 if cell != "–" else 0.0
    config = scaled(
        recipe,
        model__vocab_size=512,
        model__num_layers=1,
        model__model_dim=160,
        model__num_heads=4,
        model__bigram_vocab_size=1700,
        model__bigram_dim=40,
        **ONE_STEP,
    )
    trainer, _, _ = one_step(config, data, tmp_path / "run")
    weights = trainer.model.state_dict()
    path = tmp_path / "run" / "model.pgolf"
    _, tensors = unpack(path)
    _, loaded = read_artifact(path)
    large = [name for name, w in weights.items() if w.size > 65_536]
    assert large == ["tok_emb.weight", "bigram.embed.weight", "blocks.0.mlp.fc.weight", "blocks.0.mlp.proj.weight"]
    for name, w in weights.items():
        pruned = reference_quant.prune(w, share) if share and name in large else w
        np.testing.assert_array_equal(
            loaded[name], reference_quant.roundtrip(pruned, tensors[name].encoding), err_msg=name
        )
        if name in large:
            assert np.mean(pruned == 0) == pytest.approx(share, abs=1e-4)


def exported(state: dict[str, np.ndarray], recipe: str, folder: Path) -> dict[str, str]:
    """The encodings that the recipe gives tensors of no model."""
    model = SimpleNamespace(config=ModelConfig(), train_seq_len=None, provenance=None, state_dict=lambda: state)
    export_with(model, folder / "tensors.pgolf", Config.from_recipe(recipe).export)  # type: ignore[arg-type]
    _, stored = unpack(folder / "tensors.pgolf")
    return {name: stored[name].encoding for name in state}


@row("small_numel → fp16")
def test_small_numel(recipe: str, cell: str, tmp_path: Path) -> None:
    """The largest tensor that is fp16 for its size alone, and the one that is an element larger."""
    size = int(number(cell))
    state = {name: np.ones((1, size + extra), np.float32) for extra, name in enumerate(("blocks.0.mlp.a", "mlp_scale"))}
    state["blocks.0.mlp.b"] = state["mlp_scale"]
    assert list(exported(state, recipe, tmp_path).values()) == ["fp16", "fp32", dict(POLICY[recipe])["*.mlp.*"]]


@pytest.mark.parametrize("recipe", POLICY)
def test_policy(recipe: str, tmp_path: Path) -> None:
    """Every tensor's encoding in the artifact of the whole model, untied, so that the head's rule counts too."""
    config = Config.from_recipe(recipe, {"model.tie_embeddings": False})
    report = export_with(
        GPT(config.model, seed=None, device="cpu"),
        tmp_path / "model.pgolf",
        config.export,
    )
    _, stored = unpack(tmp_path / "model.pgolf")
    small = int(number(ROWS["small_numel → fp16"][recipe]))
    shapes = parameter_shapes(config.model)
    expected = {
        name: reference_quant.resolve(name, math.prod(shape), POLICY[recipe], small) for name, shape in shapes.items()
    }
    assert {name: tensor.encoding for name, tensor in stored.items()} == expected
    assert {tensor.name: tensor.encoding for tensor in report.tensors} == expected
    assert expected["bigram.proj.weight"] == ("fp16" if recipe == "pr286" else dict(POLICY[recipe])["bigram.*"])
    fp16_keys = [name for name in expected if name.endswith("c_k.weight") and expected[name] == "fp16"]
    assert fp16_keys == [f"{name[:8]}.attn.c_k.weight" for name, _ in POLICY[recipe] if name.startswith("blocks.")]
    # What no other pattern names, and control tensors that are not small.
    expected = {"value_embeds.weight": dict(POLICY[recipe])["*"], **dict.fromkeys(CONTROLS, "fp32")}
    assert exported(dict.fromkeys(expected, np.ones((2, 40_000), np.float32)), recipe, tmp_path) == expected


# The score ------------------------------------------------------------------------------------------------------------


@row("scored by")
def test_scored_by(recipe: str, cell: str, data: Path, tmp_path: Path) -> None:
    """The score is the mean over the row's windows of what the reloaded artifact says, 32 windows at a time."""
    length = int(number(re.findall(r"T \d+", cell)[0] if " T " in cell else ROWS["train length T"][recipe]))
    kept = ("train.train_seq_len", "eval.eval_seq_len")
    config = scaled(recipe, *kept, model__num_layers=1, train__train_batch_tokens=2048 * SLOTS, **ONE_STEP)
    batch_seqs: list[int | None] = []

    def spy(*args: Any, **named: Any) -> Any:
        batch_seqs.append(named.get("batch_seqs"))
        return evaluate(*args, **named)

    with mock.patch("pgolf.training.finish.evaluate", spy):
        _, _, report = one_step(config, data, tmp_path / "run")
    tokens = pgolf.read_shard(next(data.glob("*_val_*.bin"))).astype(np.int64)
    sliding, tails = re.match(r"sliding (\d+)", cell), re.findall(r"(exact|reference) tail", cell)
    if sliding:
        windows = reference_evaluate.sliding_windows(tokens.size - 1, length, int(sliding[1]), tails[0])
        assert (report.score_method, report.score_stride, report.score_tail) == ("sliding", int(sliding[1]), tails[0])
    else:
        assert cell == "round trip, standard"
        windows = reference_evaluate.standard_windows(tokens.size - 1, length)
        assert (report.score_method, report.score_stride, report.score_tail) == ("standard", None, None)
    assert report.score_seq_len == length
    assert batch_seqs == [32]
    model = pgolf.load(tmp_path / "run" / "model.pgolf", device="cpu")
    losses = [
        model.window_losses(tokens[None, start : start + size], tokens[None, start + 1 : start + size + 1], first)
        for start, size, first in windows
    ]
    assert report.score_loss == pytest.approx(np.concatenate(losses, axis=1).mean(dtype=np.float64), rel=1e-7)
    assert report.val_loss_quantised != report.val_loss


# Also needed ----------------------------------------------------------------------------------------------------------


def check_fallback(recipe: str, data: Path, tmp_path: Path) -> None:
    """On a GPU without bfloat16 the recipe's dtype is float16, in which it trains as in float32, with a loss scale."""
    assert COMPILER is not None, "a C compiler is needed for the stand-in"
    program = f"""
import pgolf
from pgolf.model import resolve_dtype
pgolf.model.gpt.resolve_device = lambda device: ("cuda", 0)
print(resolve_dtype(pgolf.Config.from_recipe({recipe!r}).train.dtype, "cuda"))
"""
    for major, minor, dtype in ((7, 5, "float16"), (8, 0, "bfloat16"), (9, 0, "bfloat16")):
        library = stand_in_gpu(tmp_path / f"gpu{major}{minor}.so", major, minor)
        assert python(program, PGOLF_CUDA_LIBRARY=library) == dtype
    losses = {}
    for dtype in ("float32", "float16"):
        config = scaled(recipe, train__iterations=20, train__max_wallclock_seconds=0, train__dtype=dtype)
        config.train.warmdown_iters = 0
        trainer = Trainer(config, data, device="cpu")
        records = [record for record in trainer if record.step]
        assert not any(record.skipped for record in records)
        losses[dtype] = [record.loss for record in records]
    assert trainer._optimizer.counts[1] == 65536.0
    assert losses["float16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["float16"][-1] < 0.9 * losses["float16"][0]
    trainer.finish()


def check_no_compiler(recipe: str, data: Path, tmp_path: Path) -> None:
    """`pgolf train` runs to its score where no program can be found or started, torch and Triton least of all."""
    settings = {**SMALL, "train.iterations": 2, "train.max_wallclock_seconds": 0, "train.warmdown_iters": 0}
    program = """
import sys
for name in ("torch", "triton", "matplotlib"):
    sys.modules[name] = None
def forbid(event, arguments):
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn"):
        raise AssertionError(f"{event} {arguments}")
sys.addaudithook(forbid)
from pgolf.cli import main
main()
"""
    arguments = [
        "train",
        "--recipe",
        recipe,
        "--data",
        str(data),
        "--run-dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    environment = {key: value for key, value in os.environ.items() if key not in ("PATH", "CC", "CXX")}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, *sets],
        env={**environment, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.json").is_file()


class Limited:
    """A model whose GPU has 16 GB in all."""

    def __init__(self, native: Any) -> None:
        self.native = native

    def memory_limit(self) -> int:
        return 16_000_000_000

    def __getattr__(self, name: str) -> Any:
        return getattr(self.native, name)


@functools.cache
def gpu_bytes(recipe: str, micro_batch_seqs: int) -> float:
    """What training the whole model takes on a GPU of 16 GB; with micro_batch_seqs 0, pgolf chooses.

    Planned by the CPU's backend, which keeps float32 where a GPU keeps 16 bits: an upper bound (at 98,304 tokens of the
    base recipe it plans 16,791 MiB of activations, where the GPU's whole run takes 9,012).
    """
    config = Config.from_recipe(recipe)
    model = GPT(config.model, seed=None, device="cpu")
    optimizer = pgolf._C.Optimizer(model._native, 5, NEWTON_SCHULZ["keller_jordan"], False)
    run = SimpleNamespace(config=config, model=model, _native=Limited(model._native), _optimizer=optimizer, _ahead=2)
    size = micro_batch_seqs or Trainer._automatic_micro_batch(run)  # type: ignore[arg-type]
    assert size >= 8
    weights = sum(mebibytes for _, mebibytes in model.memory_table()) * 2**20
    activations = model._native.training_bytes(size, config.train.train_seq_len)
    return float(weights + 4 * model.num_parameters + optimizer.bytes() + activations)


def check_16_gb(recipe: str, data: Path, tmp_path: Path) -> None:
    """With the recipe's micro-batches, and with those that are chosen where it is told to choose."""
    own = Trainer(scaled(recipe, "train.micro_batch_seqs"), data, device="cpu").micro_batch_seqs
    for size in (own, 0):
        assert gpu_bytes(recipe, size) <= 0.85 * 16e9
    assert own * Config.from_recipe(recipe).train.train_seq_len <= 16_384


NEEDED: dict[str, Callable[[str, Path, Path], None] | None] = {
    "bf16→fp16 fallback": check_fallback,
    "runs with no compiler on the user's machine": check_no_compiler,
    "16 GB": check_16_gb,
    # These are tested with the features themselves.
    "document batching": None,
    "weights-only restore for eval": None,
}


@row("also needed")
def test_also_needed(recipe: str, cell: str, data: Path, tmp_path: Path) -> None:
    for need in filter(None, cell.split(", ")):
        check = NEEDED[need]
        if check is not None:
            check(recipe, data, tmp_path)


@pytest.mark.parametrize("recipe", NAMES)
def test_automatic_micro_batches_fit_16_gb(recipe: str) -> None:
    assert gpu_bytes(recipe, 0) <= 0.85 * 16e9


# What all share -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", NAMES)
def test_common_shapes(recipe: str) -> None:
    """V = 1024, d = 512, H = 8, K = 4, F = 1536, e = 128, tied embeddings."""
    shapes = parameter_shapes(Config.from_recipe(recipe).model)
    assert shapes["tok_emb.weight"] == (1024, 512) and "lm_head.weight" not in shapes
    assert shapes["blocks.0.attn.q_gain"] == (8,)
    assert shapes["blocks.0.attn.c_k.weight"] == shapes["blocks.0.attn.c_v.weight"] == (256, 512)
    assert shapes["blocks.0.mlp.fc.weight"] == (1536, 512)
    assert shapes["bigram.proj.weight"] == (512, 128)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("recipe", NAMES)
def test_common_steps(recipe: str, tied: bool, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps in float64 against the reference with every value written out here."""
    use_float64(monkeypatch)
    config = scaled(recipe, model__tie_embeddings=tied, train__max_wallclock_seconds=0)
    shape = {key.split(".")[1]: value for key, value in SMALL.items() if key.startswith("model.")}
    model = SimpleNamespace(
        **shape,
        mlp_mult=3.0,
        mlp_negative_slope=0.0,
        ln_scale=False,
        tie_embeddings=tied,
        tied_embed_init_std=0.005,
        logit_softcap=30.0,
        rope_base=10_000.0,
        rope_dims=0,
        loop_start=0,
        loop_end=0,
        num_loops=0,
        qk_gain_init=1.5,
        smear_reset_at_bos=False,
        bos_id=1,
        rope_tables="exact",
    )
    train = SimpleNamespace(
        iterations=20_000,
        max_wallclock_seconds=0,
        warmdown_iters=3000,
        warmdown_frac=0,
        warmdown_shape="linear",
        tied_embed_lr=0.03,
        embed_lr=0.6,
        head_lr=0.008,
        scalar_lr=0.02,
        matrix_lr=number(ROWS["matrix lr"][recipe]),
        muon_coefficients=[(3.4445, -4.7750, 2.0315)],
        muon_row_normalize=False,
        qat_grid="export",
        enable_looping_at=0.0,
        muon_weight_decay=0.04,
        weight_decay=number(ROWS["AdamW decay"][recipe]),
        muon_momentum=0.99,
        muon_momentum_warmup_start=0.92,
        muon_momentum_warmup_steps=1500,
        muon_backend_steps=5,
        beta1=0.9,
        beta2=0.95,
        adam_eps=1e-8,
        grad_clip_norm=number(ROWS["clip"][recipe]),
        qat_start_frac=None,
        ema_decay=0,
        swa_enabled=False,
    )
    initial = init_state(model, 42)
    trainer = Trainer(config, data, device="cpu")
    for name, w in trainer.model.state_dict().items():
        np.testing.assert_allclose(w, initial[name], rtol=1e-6, atol=1e-12, err_msg=name)
    state = lively(model)
    trainer.model.load_state_dict(state)
    reference = ReferenceTrainer(model, train, state)
    for record, batch in zip(trainer, batches(config, data), strict=False):
        assert record.loss == pytest.approx(reference.step([batch]).loss, rel=1e-12)
        if record.step == 4:
            break
    for name, w in reference.state().items():
        error = np.linalg.norm(trainer.model.state_dict()[name] - w)
        assert error <= 1e-10 * np.linalg.norm(w), name


@pytest.mark.parametrize("recipe", NAMES)
def test_common_ends(recipe: str, data: Path, tmp_path: Path) -> None:
    """20,000 iterations at the most, validation every 500, level 22, 16,000,000 bytes."""
    config = scaled(recipe, "train.val_loss_every", train__max_wallclock_seconds=0)
    config.train.swa_enabled = False
    trainer = perturbed(config, data, run_dir=tmp_path / "run")
    for begin, end in ((498, 501), (19_998, 20_001)):
        trainer.step = begin
        validated = {}
        for record in trainer:
            validated[record.step] = record.val_loss is not None
            if record.step == end:
                break
        assert validated == ({499: False, 500: True, 501: False} if end == 501 else {19_999: False, 20_000: True})
    report = trainer.finish()
    assert report.limit_bytes == 16_000_000
    artifact = (tmp_path / "run" / "model.pgolf").read_bytes()  # 32 bytes, the frame's size, the frame of the header
    frame = artifact[36 : 36 + int.from_bytes(artifact[32:36], "little")]
    assert zstandard.ZstdCompressor(level=22).compress(zstandard.ZstdDecompressor().decompress(frame)) == frame
