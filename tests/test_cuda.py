"""Models and training on a GPU: against the float64 reference, the CPU's emulation of the same rounding, and PyTorch.

Collected only where a GPU can be used (tests/conftest.py). Single operations are tested in test_places.py.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pgolf
from pgolf import _C, ops
from pgolf.common.errors import DeviceError, NonFiniteError
from pgolf.config import NEWTON_SCHULZ, Config, ModelConfig
from pgolf.model import GPT
from pgolf.system import speed
from pgolf.training.trainer import Trainer
from tests.conftest import CORPUS_VOCAB
from tests.places import GPU_DTYPES, GPU_PLACES, Place
from tests.reference.model import ReferenceGPT, perturb, qat_clips
from tests.reference.rng import init_state
from tests.runs import assert_same_state
from tests.test_model import assert_gradients_close, relative, tokens
from tests.test_places import CASES, rounded

ROOT = Path(__file__).resolve().parent.parent

SMALL = {
    "vocab_size": 97,
    "num_layers": 5,
    "model_dim": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "bigram_vocab_size": 50,
    "bigram_dim": 24,
    "tied_embed_init_std": 0.3,
}
# name: (what differs from SMALL, B, T)
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "five layers": ({}, 2, 65),
    "one layer, one position": ({"num_layers": 1}, 5, 1),
    "untied": ({"tie_embeddings": False}, 2, 63),
    "no bigram": ({"bigram_vocab_size": 0, "num_layers": 4}, 2, 64),
    "bigram as wide as the model": ({"bigram_dim": 128, "num_layers": 2}, 3, 33),
    "smear reset": ({"smear_reset_at_bos": True, "vocab_size": 4, "bos_id": 2, "num_layers": 2}, 3, 20),
    "bf16 rope tables": ({"rope_tables": "bf16", "num_layers": 2}, 1, 300),
    "loops": ({"loop_start": 1, "loop_end": 2, "num_loops": 2}, 2, 65),
    "part of a head turned": ({"num_heads": 2, "num_kv_heads": 1, "rope_dims": 16, "num_layers": 2}, 2, 65),
    "leaky, norms scaled by depth": ({"mlp_negative_slope": 0.5, "ln_scale": True, "num_layers": 2}, 3, 43),
    "heads of 64": ({"num_heads": 2, "num_kv_heads": 1}, 2, 130),
    "heads of 40": ({"model_dim": 160, "num_layers": 3}, 2, 130),
    "d 640": ({"model_dim": 640, "num_heads": 10, "num_kv_heads": 5, "vocab_size": 1000, "num_layers": 3}, 1, 257),
    "V 8192": ({"vocab_size": 8192, "num_layers": 2}, 1, 130),
}


def model_of(case: str) -> tuple[ModelConfig, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    changes, batch, length = MODELS[case]
    config = ModelConfig(**{**SMALL, **changes})
    state = perturb(init_state(config, 42), 7)
    return config, state, *tokens(config, batch, length)


def made(config: ModelConfig, state: dict[str, np.ndarray], device: str, dtype: str) -> GPT:
    model = GPT(config, seed=None, device=device, dtype=dtype)
    model.load_state_dict(state)
    return model


# Numerics -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MODELS)
def test_float32_equals_the_reference(case: str) -> None:
    config, state, ids, targets = model_of(case)
    reference = ReferenceGPT(config, state)
    expected, gradients = reference.loss_and_grads(ids, targets)
    model = made(config, state, "cuda", "float32")
    assert relative(model.logits(ids), reference.logits(ids).detach()) <= 1e-5
    assert relative(model.token_losses(ids, targets), reference.token_losses(ids, targets).detach()) <= 1e-5
    loss, found = model.loss_and_grads(ids, targets)
    assert loss == pytest.approx(expected, rel=1e-5)
    alone = ("attn.c_q.weight", "attn.c_k.weight", "attn.q_gain") if ids.shape[1] == 1 else ()
    assert_gradients_close(found, gradients, 1e-4, zero=alone)


def errors_of(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: float(np.linalg.norm(found[name].astype(np.float64) - g)) for name, g in expected.items()}


@pytest.mark.skipif("bfloat16" not in GPU_DTYPES, reason="this GPU has no bfloat16")
@pytest.mark.parametrize("case", [case for case in MODELS if "one position" not in case])
def test_bfloat16_gradients(case: str) -> None:
    """Not worse than the same rounding on the CPU, and near what autocast, with its float32 residual stream, gives."""
    config, state, ids, targets = model_of(case)
    loss, gradients = ReferenceGPT(config, state).loss_and_grads(ids, targets)
    found_loss, found = made(config, state, "cuda", "bfloat16").loss_and_grads(ids, targets)
    emulated = errors_of(made(config, state, "cpu", "bfloat16").loss_and_grads(ids, targets)[1], gradients)
    autocast = errors_of(autocast_gradients(config, state, ids, targets), gradients)
    found_errors = errors_of(found, gradients)
    assert found_loss == pytest.approx(loss, rel=4e-3)
    everything = math.sqrt(sum(float(np.sum(g**2)) for g in gradients.values()))
    large = {name: g for name, g in gradients.items() if g.size >= 1000}
    norms = {name: float(np.linalg.norm(g)) for name, g in gradients.items()}
    for name in gradients:
        if name not in large:
            assert found_errors[name] <= 0.1 * max(norms[name], 0.01 * everything), name
    total = math.sqrt(sum(norms[name] ** 2 for name in large))
    for name in large:
        floor = 1e-3 * total / math.sqrt(len(large))  # below it nothing is left but rounding
        assert found_errors[name] <= 4e-2 * max(norms[name], floor), (name, found_errors[name] / norms[name])
        assert found_errors[name] <= 1.25 * max(emulated[name], 1e-3 * norms[name]), (name, emulated[name])
        assert found_errors[name] <= 2.2 * max(autocast[name], 1e-3 * norms[name]), (name, autocast[name])


def autocast_gradients(
    config: ModelConfig, state: dict[str, np.ndarray], ids: np.ndarray, targets: np.ndarray
) -> dict[str, np.ndarray]:
    """Of the reference model in float32 under torch.autocast."""
    reference = ReferenceGPT(config, state, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return reference.loss_and_grads(ids, targets)[1]


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_late_qat(dtype: str) -> None:
    config, state, ids, targets = model_of("five layers")
    results = []
    for device in ("cuda", "cpu"):
        native = made(config, state, device, dtype)._native
        native.set_qat_clips(qat_clips(config))
        for qat in (False, True):
            native.begin_step(qat)
            native.micro_step(ids.astype(np.int32), targets.astype(np.int32), 1.0 / ids.size)
            native.end_step()
            scale = native.loss_scale()
            results.append((native.loss_sum(), {name: native.read_grad(name) / scale for name in state}))
    bound = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2}[dtype]
    for (loss, found), (expected_loss, expected) in ((results[0], results[2]), (results[1], results[3])):
        assert loss == pytest.approx(expected_loss, rel=bound / 10)
        assert_gradients_close(found, expected, bound)
    assert abs(results[1][0] - results[0][0]) > 1e-4 * results[0][0]  # QAT did something


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_the_future_and_the_neighbours_change_no_bit(dtype: str) -> None:
    config, state, ids, targets = model_of("heads of 64")
    model = made(config, state, "cuda", dtype)
    other, _ = tokens(config, *ids.shape, seed=1)
    logits, losses = model.logits(ids), model.token_losses(ids, targets)
    for t in (0, 1, 63, 64, 100, 128):
        changed = np.concatenate([ids[:, : t + 1], other[:, t + 1 :]], axis=1)
        assert np.array_equal(model.logits(changed)[:, : t + 1], logits[:, : t + 1])
        assert not np.array_equal(model.logits(changed)[:, t + 1 :], logits[:, t + 1 :])
    neighbour = np.concatenate([ids[:1], other[1:]])
    assert np.array_equal(model.token_losses(neighbour, targets)[0], losses[0])


def test_window_losses_are_the_tail_of_token_losses() -> None:
    config, state, ids, targets = model_of("five layers")
    model = made(config, state, "cuda", "float32")
    losses = model.token_losses(ids, targets)
    for first in (0, 1, 40, 64):
        np.testing.assert_allclose(model.window_losses(ids, targets, first), losses[:, first:], rtol=1e-5, atol=1e-6)


def test_generation_is_the_cpu_s() -> None:
    config, state, ids, _ = model_of("five layers")
    found = [
        made(config, state, device, "float32").generate(ids[0, :5], 20, temperature=0) for device in ("cuda", "cpu")
    ]
    assert np.array_equal(*found)


@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("case", [case for case in MODELS if "one position" not in case])
def test_kept_keys_and_values_give_the_logits_of_the_whole_text(case: str, dtype: str) -> None:
    config, state, ids, _ = model_of(case)
    model = made(config, state, "cuda", dtype)
    text = ids[0].astype(np.int32)
    logits = model.logits(text[None])[0]
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}[dtype]
    for prompt in (1, 2, len(text) // 2):
        decoder = _C.Decoder(model._native, 8)  # grows on the way
        ends = [prompt, prompt + 1, prompt + 5, *range(prompt + 6, len(text) + 1)]
        rows = [decoder.read(text[first:last]) for first, last in itertools.pairwise([0, *ends])]
        assert relative(np.stack(rows), logits[np.array(ends) - 1]) <= tolerance, prompt


def test_generation_after_training_begins_anew() -> None:
    config, state, ids, targets = model_of("five layers")
    model = made(config, state, "cuda", "float32")
    decoder = _C.Decoder(model._native, 8)
    decoder.read(ids[0, :3].astype(np.int32))
    model.loss_and_grads(ids, targets)
    decoder.read(ids[0, 3:4].astype(np.int32))
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="weights have changed"):
        decoder.read(ids[0, 4:5].astype(np.int32))


@pytest.mark.parametrize("dtype", GPU_DTYPES)
@pytest.mark.parametrize("heads", [1, 64, 128, 8])
def test_a_head_width_that_attention_lacks_is_refused_when_the_model_is_made(heads: int, dtype: str) -> None:
    width = 1024 // heads + (4 if heads == 8 else 0)
    config = ModelConfig(**{**SMALL, "model_dim": width * heads, "num_heads": heads, "num_kv_heads": heads})
    expected = f"Attention heads are {width} wide; on a GPU the width of a head must be a multiple of 8 from 32 to 128."
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        GPT(config, device="cuda", dtype=dtype)


# Bits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", GPU_PLACES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_repeats_beside_other_work_give_the_same_bits(case: Any, place: Place) -> None:
    """A hundred of each operation, while products on another stream move every block to other places and times."""
    case = rounded(case, place)
    _, upstream, gradients = case.reference()
    starts = case.starts(gradients)

    def results() -> list[bytes]:
        with ops.on(place.device, place.dtype):
            outputs, found = case.native("float32", upstream, starts)
        return [array.tobytes() for array in (*outputs.values(), *found.values())]

    first = results()
    noise, stream = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    large = sum(array.size for array in case.inputs.values()) > 500_000
    for _ in range(3 if large else 100):
        with torch.cuda.stream(stream):
            for _ in range(3):
                noise @ noise
        assert results() == first
    torch.cuda.synchronize()


@pytest.mark.parametrize("place", GPU_PLACES, ids=str)
def test_repeats_of_the_optimizer_give_the_same_bits(place: Place) -> None:
    """A hundred of each of its operations, and of those on weights, beside the same other work."""
    rng = np.random.default_rng(22)
    shapes = [(136, 40), (40, 136), (65, 33), (1, 7), (512, 129)]
    w, g, m, v = ([rng.standard_normal(shape).astype(np.float32) for shape in shapes] for _ in range(4))
    row = rng.standard_normal(512).astype(np.float32)

    def results() -> list[bytes]:
        with ops.on(place.device, place.dtype):
            found: list[Any] = [*ops.muon(w, g, m, lr=0.02), *ops.adam(w, g, m, [a * a for a in v], step=2, lr=0.1)]
            found.append(
                [ops.newton_schulz(w[0]), ops.working_copy(w[4], row, clip=31), ops.axpby(0.3, w[4], 0.7, g[4])]
            )
            found.append([*ops.finish_projection(w[4], row, g[4], row, clip=15), *ops.quantize_rows(w[4], 15)])
            found.append([np.array([*ops.grad_norm(g, 0.3)[:2], ops.sum(w[4])])])
        return [array.tobytes() for arrays in found for array in arrays]

    first, noise, stream = results(), torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for _ in range(100):
        with torch.cuda.stream(stream):
            noise @ noise
        assert results() == first
    torch.cuda.synchronize()


TINY = {
    "model.vocab_size": CORPUS_VOCAB,
    "model.num_layers": 3,
    "model.model_dim": 64,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.bigram_vocab_size": 100,
    "model.bigram_dim": 16,
    "train.iterations": 12,
    "train.max_wallclock_seconds": 0,
    "train.train_batch_tokens": 640,
    "train.train_seq_len": 32,
    "train.grad_accum_steps": 2,
    "train.val_batch_tokens": 2000,
    "train.val_loss_every": 0,
    "train.warmdown_frac": 0,
    "train.warmdown_iters": 6,
    "train.swa_every": 2,
    "train.swa_start_frac": 1.0,
    "train.micro_batch_seqs": 8,  # of 20: the last micro-batch is smaller
    "train.qat_start_frac": 0.5,
    "eval.eval_stride": 8,
}


def tiny(**changes: Any) -> Config:
    return Config.from_recipe("tiny", {**TINY, **{f"train.{key}": value for key, value in changes.items()}})


def run(config: Config, data: Path, **arguments: Any) -> Trainer:
    trainer = Trainer(config, data, device="cuda", **arguments)
    assert [record.step for record in trainer if record.step] == list(range(1, config.train.iterations + 1))
    return trainer


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_two_runs_have_the_same_bits(small_corpus: Path, dtype: str) -> None:
    assert_same_state(run(tiny(dtype=dtype), small_corpus), run(tiny(dtype=dtype), small_corpus))


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_recorded_steps_have_the_bits_of_launched_ones(
    small_corpus: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = run(tiny(dtype=dtype), small_corpus)
    monkeypatch.setenv("PGOLF_CUDA_GRAPHS", "0")
    assert_same_state(recorded, run(tiny(dtype=dtype), small_corpus))


def test_fifty_replays_with_changing_rates_follow_the_cpu(small_corpus: Path) -> None:
    """Loops come on after half of them: from then on the other recording is replayed, in the same memory."""
    config = tiny(iterations=50, dtype="float32", warmdown_iters=45, muon_momentum_warmup_steps=40, qat_start_frac=1.0)
    config = config.override({"model.num_loops": 2, "model.loop_end": 1, "train.enable_looping_at": 0.5})
    losses = []
    for device in ("cuda", "cpu"):
        trainer = Trainer(config, small_corpus, device=device)
        losses.append([record.loss for record in trainer if record.step])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("swap", ["swa", "ema"])
def test_a_checkpoint_goes_on_to_the_same_bits(small_corpus: Path, tmp_path: Path, swap: str) -> None:
    config = tiny(checkpoint_every=5, ema_decay=0.9 if swap == "ema" else 0.0)
    whole = run(config, small_corpus)
    first = Trainer(config, small_corpus, run_dir=tmp_path, device="cuda")
    for record in first:
        if record.step == 7:
            break
    del first
    resumed = Trainer(config, small_corpus, run_dir=tmp_path, device="cuda", resume=True)
    assert resumed.step == 5
    list(resumed)
    assert_same_state(whole, resumed)
    log = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [step for step in log if step] == list(range(1, 13))


def test_a_state_is_put_back_in_place(small_corpus: Path) -> None:
    """Into a trainer whose graphs are recorded: they read the new weights and moments."""
    config = tiny()
    whole, other = run(config, small_corpus), Trainer(config, small_corpus, device="cuda")
    for record in other:
        if record.step == 4:
            break
    arrays, values = other.state()
    list(other)
    assert_same_state(whole, other)
    other.load_state(arrays, values)
    list(other)
    assert_same_state(whole, other)


def test_a_killed_run_resumes_to_the_same_bits(small_corpus: Path, tmp_path: Path) -> None:
    config = tiny(iterations=60, checkpoint_every=3, warmdown_iters=30)
    whole = run(config, small_corpus)
    (tmp_path / "mine.toml").write_text(config.to_toml())
    code = (
        "import sys, pgolf\n"
        "config = pgolf.Config.from_toml(sys.argv[1])\n"
        "for _ in pgolf.Trainer(config, sys.argv[2], run_dir=sys.argv[3], device='cuda', resume=True): pass\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "mine.toml"), str(small_corpus), str(tmp_path / "run")]
    checkpoints = tmp_path / "run" / "checkpoint"
    for kill_at in (6, 27):
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": python_path()})
        while process.poll() is None and not list(checkpoints.glob(f"step-{kill_at:08d}.npz")):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = Trainer(config, small_corpus, run_dir=tmp_path / "run", device="cuda", resume=True)
    list(resumed)
    assert_same_state(whole, resumed)


def python_path() -> str:
    return os.pathsep.join(path for path in sys.path if path)


# The step machinery ---------------------------------------------------------------------------------------------------


def test_a_nan_in_one_micro_batch_changes_no_weight(small_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do the steps that were already under way: the error names the first one."""
    trainer = Trainer(tiny(swa_every=1), small_corpus, device="cuda")
    steps = iter(trainer)
    while next(steps).step < 3:
        pass
    trainer._settle()
    before, snapshots = trainer.model.state_dict(), trainer.snapshots
    settled = trainer.step
    name = "blocks.1.attn.c_v.weight"
    weight = trainer._native.read(name)
    poisoned = weight.copy()
    poisoned[3, 5] = np.nan
    trainer._native.write(name, poisoned)
    with pytest.raises(NonFiniteError, match=f"became NaN or infinite in step {settled + 1}; no weight was changed"):
        list(steps)
    trainer._native.write(name, weight)
    after = trainer.model.state_dict()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert (trainer.step, trainer.snapshots) == (settled, snapshots)
    whole = run(tiny(swa_every=1), small_corpus)
    list(trainer)  # the run goes on as if nothing had been
    assert_same_state(whole, trainer)


@pytest.mark.skipif("float16" not in GPU_DTYPES, reason="the GPU has float16 always")
def test_float16_skips_what_overflows(small_corpus: Path) -> None:
    """Halves the loss scale, goes on with the next data, and counts no step for Adam."""
    trainer = Trainer(tiny(dtype="float16"), small_corpus, device="cuda")
    steps, scale, _ = trainer._optimizer.counts
    assert (steps, scale) == (0, 2.0**16)
    trainer._optimizer.counts = (0, 2.0**24, 0)
    records = list(trainer)
    skipped = [record for record in records if record.skipped]
    assert skipped and all(record.grad_norm is None for record in skipped)
    adam_steps, scale, _ = trainer._optimizer.counts
    assert adam_steps == 12 - len(skipped) and scale == 2.0 ** (24 - len(skipped))
    assert records[-1].loss < records[0].loss


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_float16_counts_what_saturates(device: str) -> None:
    """Hidden values beyond 65,504·16 are cut off, in both places as often; nothing becomes infinite."""
    config, state, ids, targets = model_of("five layers")
    for name, w in state.items():
        if name.endswith("mlp.fc.weight"):
            w[0] *= 3000
        if name.endswith("mlp.proj.weight"):
            w[:, 0] = 0  # nobody reads that hidden unit
    model = made(config, state, device, "float16")
    optimizer = _C.Optimizer(model._native, 5, NEWTON_SCHULZ["keller_jordan"], False)
    model._native.begin_step(False)
    model._native.micro_step(ids.astype(np.int32), targets.astype(np.int32), 1.0 / ids.size)
    model._native.end_step()
    assert math.isfinite(model._native.loss_sum())
    settings = {"lr": [0.0] * 4, "weight_decay": [0.0] * 4, "momentum": 0.9, "clip": 0.0}
    saturated = optimizer.wait(optimizer.step({**settings, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}))[3]
    assert 0 < saturated <= 5 * ids.size


def test_nothing_is_allocated_while_training(small_corpus: Path) -> None:
    trainer = Trainer(tiny(iterations=30), small_corpus, device="cuda")
    steps = iter(trainer)
    while next(steps).step < 4:
        pass
    free = torch.cuda.mem_get_info()[0]
    while next(steps).step < 28:  # the last one is followed by a validation, whose arena is new
        assert trainer._native.step_allocations == 0
        assert torch.cuda.mem_get_info()[0] == free


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_the_whole_job(small_corpus: Path, tmp_path: Path, dtype: str) -> None:
    config = tiny(dtype=dtype, val_loss_every=6, iterations=40, swa_every=5)
    trainer = Trainer(config, small_corpus, run_dir=tmp_path / "run", device="cuda")
    records = list(trainer)
    report = trainer.finish()
    assert records[0].val_loss is not None and records[-1].val_loss < records[0].val_loss
    assert "cuda" in report.device and report.fits
    artifact = (tmp_path / "run" / "model.pgolf").read_bytes()
    scores = [
        pgolf.evaluate(
            pgolf.load(tmp_path / "run" / "model.pgolf", device=device, dtype=d),
            small_corpus,
            stride=8,
            batch_seqs=config.eval.eval_batch_seqs,
        )
        for device, d in (("cuda", dtype), ("cuda", "float32"), ("cpu", "float32"))
    ]
    assert scores[0].bpb == pytest.approx(report.score_bpb, abs=1e-12)
    assert scores[1].bpb == pytest.approx(scores[2].bpb, abs=1e-5)
    assert scores[0].bpb == pytest.approx(
        scores[2].bpb, abs={"float32": 1e-5, "float16": 1e-3, "bfloat16": 5e-3}[dtype]
    )
    again = Trainer(config, small_corpus, run_dir=tmp_path / "again", device="cuda")
    list(again)
    again.finish()
    assert (tmp_path / "again" / "model.pgolf").read_bytes() == artifact


# Speed ----------------------------------------------------------------------------------------------------------------


def test_records_tell_share_memory_and_gpu(small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is measured after the first step, with no step under way, and moves no bit."""
    monkeypatch.setenv("PGOLF_CACHE", str(tmp_path / "cache"))
    first = Trainer(tiny(iterations=8), small_corpus, device="cuda")
    assert first.limit is None
    records = list(first)
    steps = [record for record in records if record.step]
    assert [record.share_of_limit is None for record in steps] == [True] + [False] * 7
    assert all(0 < record.share_of_limit < 1 for record in steps[1:])
    assert {record.device for record in records} == {_C.cuda_status().devices[0].name}
    planned = sum(size for what, size in first.memory_table() if not what.startswith(" "))
    assert 0 < steps[0].memory_mib <= steps[-1].memory_mib <= first.peak_memory_mib
    assert planned <= first.peak_memory_mib < planned + 256
    assert first.limit is not None and first.limit.product.startswith("8192×8192×8192 ")
    assert speed.known_limit("cuda") == first.limit
    again = Trainer(tiny(iterations=8), small_corpus, device="cuda")
    assert all(record.share_of_limit is not None for record in again if record.step)
    assert_same_state(first, again)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_out_of_memory_names_buffers_and_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGOLF_CUDA_MEMORY_LIMIT", "64MiB")
    config = ModelConfig(**SMALL)
    model = GPT(config, device="cuda")
    with pytest.raises(DeviceError, match=r"MiB.*lower train\.micro_batch_seqs"):
        model.loss_and_grads(np.zeros((256, 512), int), np.zeros((256, 512), int))
    assert math.isfinite(model.loss(np.zeros((1, 8), int), np.zeros((1, 8), int)))


@pytest.mark.parametrize(("heads", "width"), [(8, 16), (1, 128 + 8)])
def test_head_widths_that_attention_lacks_are_named(heads: int, width: int) -> None:
    config = ModelConfig(**{**SMALL, "model_dim": heads * width, "num_heads": heads, "num_kv_heads": 1})
    with pytest.raises(ValueError, match=f"{width}.*32.*128"):
        GPT(config, device="cuda").loss(np.zeros((1, 8), int), np.zeros((1, 8), int))


def test_a_missing_device_and_a_foreign_tensor() -> None:
    config = ModelConfig(**SMALL)
    with pytest.raises(DeviceError, match="99"):
        GPT(config, device="cuda:99")
    model = GPT(config, device="cuda")
    with pytest.raises(TypeError, match="ids cannot be read as an array in CPU memory"):
        model.logits(torch.zeros((1, 8), dtype=torch.int32, device="cuda"))


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_models_are_copied_and_told(dtype: str) -> None:
    import copy

    config, state, ids, targets = model_of("five layers")
    model = made(config, state, "cuda", dtype)
    other = copy.deepcopy(model)
    assert np.array_equal(model.token_losses(ids, targets), other.token_losses(ids, targets))
    assert "cuda" in repr(model) and dtype in repr(model) and "cuda" in model.description
