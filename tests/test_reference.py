"""The reference itself: published vectors, known counts, and properties that SPEC's definitions imply."""

from __future__ import annotations

import math
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import evaluate, model, quant, rng, trainer
from tests.reference.model import ModelShape, ReferenceGPT, parameter_shapes, perturb

TINY = {
    "vocab_size": 13,
    "num_layers": 3,
    "model_dim": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "bigram_vocab_size": 11,
    "bigram_dim": 6,
}


def tiny(**changes: Any) -> ModelShape:
    return ModelShape(**{**TINY, **changes})


def perturbed(cfg: ModelShape) -> dict[str, np.ndarray]:
    return perturb(rng.init_state(cfg, 42), 7)


def batch(cfg: ModelShape, sequences: int = 2, length: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(0, cfg.vocab_size, (sequences, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


# §1 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """Random123's published vectors for philox4x32, 10 rounds."""
    assert tuple(int(word) for word in rng.philox4x32(counter, key)) == expected


def test_a_draw_is_one_block_of_its_seed_name_and_element():
    seed, name, i = 0x0123456789ABCDEF, "blocks.0.mlp.fc.weight", 5
    x = [int(w) for w in rng.philox4x32((i, 0, zlib.crc32(name.encode()), 0), (0x89ABCDEF, 0x01234567))]
    u = ((x[0] * 2**32 + x[1]) >> 11) / 2**53
    v = ((x[2] * 2**32 + x[3]) >> 11) / 2**53
    assert rng.normal64(seed, name, (2, 3))[1, 2] == pytest.approx(
        math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v), rel=1e-13
    )
    assert rng.uniform(seed, name, (6,), 0.25)[i] == np.float32((2 * u - 1) * 0.25)


def test_draws_are_distributed_as_named():
    z = rng.normal64(1, "z", (100_000,))
    assert abs(z.mean()) < 0.01 and abs(z.std() - 1) < 0.01 and abs((z**3).mean()) < 0.05
    u = rng.uniform(1, "u", (100_000,), 0.5)
    assert u.min() >= -0.5 and u.max() < 0.5 and abs(u.mean()) < 0.005 and abs(u.var() - 1 / 12) < 0.002


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
def test_orthogonal_is_the_q_with_a_positive_diagonal_of_r(shape):
    q = rng.orthogonal(42, "w", shape).astype(np.float64)
    matrix = rng.normal64(42, "w", shape)
    if shape[0] < shape[1]:
        q, matrix = q.T, matrix.T
    r = q.T @ matrix
    assert np.abs(q.T @ q - np.eye(64)).max() < 1e-6
    assert np.abs(np.tril(r, -1)).max() < 1e-5
    assert np.diag(r).min() > 0


@pytest.mark.parametrize(
    ("layers", "buckets", "count"), [(10, 10240, 25_517_137), (10, 4096, 24_730_705), (11, 2048, 26_829_913)]
)
def test_parameter_counts(layers, buckets, count):
    shapes = parameter_shapes(ModelShape(num_layers=layers, bigram_vocab_size=buckets))
    assert sum(math.prod(shape) for shape in shapes.values()) == count


def test_optional_tensors():
    assert parameter_shapes(tiny(num_layers=1))["skip_weights"] == (0, 16)
    assert "bigram.proj.weight" not in parameter_shapes(tiny(bigram_dim=16))
    assert not any(name.startswith("bigram") for name in parameter_shapes(tiny(bigram_vocab_size=0)))
    assert "lm_head.weight" not in parameter_shapes(tiny())
    assert parameter_shapes(tiny(tie_embeddings=False))["lm_head.weight"] == (13, 16)


def test_initial_weights():
    cfg = ModelShape(num_layers=2, model_dim=128, num_heads=2, num_kv_heads=1, bigram_vocab_size=50, bigram_dim=64)
    state = rng.init_state(cfg, 42)
    assert {name: value.shape for name, value in state.items()} == parameter_shapes(cfg)
    assert all(value.dtype == np.float32 for value in state.values())
    assert state["tok_emb.weight"].std() == pytest.approx(0.005, rel=0.01)
    proj = state["bigram.proj.weight"].astype(np.float64)
    assert np.abs(proj.T @ proj - np.eye(64) / 4).max() < 1e-6
    assert state["bigram.scale"] == np.float32(0.05)
    assert (state["blocks.1.resid_mix"] == np.repeat([[1.0], [0.0]], 128, axis=1)).all()
    assert (state["blocks.1.attn.q_gain"] == 1.5).all()
    for name in ("attn_scale", "mlp_scale"):
        assert (state[f"blocks.1.{name}"] == 1).all()
    for name in ("bigram.embed.weight", "smear.gate", "blocks.1.attn.proj.weight", "blocks.1.mlp.proj.weight"):
        assert not state[name].any()
    untied = rng.init_state(ModelShape(**{**vars(cfg), "tie_embeddings": False}), 42)
    assert untied["tok_emb.weight"].std() == pytest.approx(1, rel=0.01)
    assert not untied["lm_head.weight"].any()
    assert (untied["blocks.1.attn.c_k.weight"] == state["blocks.1.attn.c_k.weight"]).all()


def test_small_matrices_start_uniform_and_a_small_bigram_projection_at_zero():
    state = rng.init_state(tiny(), 42)
    fc = state["blocks.0.mlp.fc.weight"]
    assert 0.24 < np.abs(fc).max() <= 0.25
    assert not state["bigram.proj.weight"].any()


# §2 -------------------------------------------------------------------------------------------------------------------


def test_bigram_hash_is_32_bit_arithmetic():
    def wrapped(value: int) -> int:
        return (value + 2**31) % 2**32 - 2**31

    ids = np.array([[5, 65535, 61000, 60000, 3, 3]])
    expected = [10239] + [
        (wrapped(36313 * int(b)) ^ wrapped(27191 * int(a))) % 10239
        for a, b in zip(ids[0, :-1], ids[0, 1:], strict=True)
    ]
    assert 36313 * 61000 > 2**31
    assert model.bigram_hash(model.as_ids(ids), 10240).tolist() == [expected]
    assert model.bigram_hash(model.as_ids(ids), 2).tolist() == [[1, 0, 0, 0, 0, 0]]


def test_smear_mixes_in_the_previous_position_and_resets():
    x = torch.tensor([[[1.0], [10.0], [100.0]]], dtype=torch.float64)
    gate = torch.tensor([math.log(1 / 3)], dtype=torch.float64)  # g = 1/4
    assert model.smear(x, gate).flatten().tolist() == pytest.approx([0.75, 7.75, 77.5])
    reset = torch.tensor([[True, False, True]])
    assert model.smear(x, gate, reset).flatten().tolist() == pytest.approx([0.75, 7.75, 75.0])


def test_rope_makes_scores_depend_on_distance_alone():
    cos, sin = model.rope_tables(9, 8, 10000.0, "exact", torch.float64)
    q, k = (model.apply_rope(v.expand(1, 9, 1, 8), cos, sin)[0, :, 0] for v in (randn(8), randn(2, 8)[1]))
    scores = q @ k.T
    for distance in range(9):
        assert torch.allclose(scores.diagonal(-distance), scores[distance, 0])
    assert torch.allclose(q.norm(dim=-1), q.norm(dim=-1)[0])


def test_rope_turns_a_pair_by_its_angle():
    cos, sin = model.rope_tables(3, 4, 100.0, "exact", torch.float64)
    x = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64).expand(1, 3, 1, 4)
    assert model.apply_rope(x, cos, sin)[0, 2, 0].tolist() == pytest.approx([0, math.cos(0.2), 0, -math.sin(0.2)])


def test_bf16_rope_tables_are_the_public_scripts():
    inv_freq = (1.0 / (10000.0 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64))).to(torch.bfloat16)
    freqs = torch.outer(torch.arange(2048, dtype=torch.bfloat16), inv_freq)
    cos, sin = model.rope_tables(2048, 64, 10000.0, "bf16", torch.float64)
    assert torch.equal(cos, freqs.cos().double()) and torch.equal(sin, freqs.sin().double())
    exact = 10000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    assert ((inv_freq.double() / exact - 1).abs().max()).item() == pytest.approx(0.0037, abs=0.0001)


def test_attention_agrees_with_pytorch():
    q, k, v = randn(2, 5, 6, 4), randn(2, 5, 3, 4) * 2, randn(2, 5, 3, 4)
    expected = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    assert torch.allclose(model.causal_attention(q, k, v), expected, rtol=1e-12, atol=1e-14)


def test_heads_are_normed_and_only_queries_have_a_gain():
    n, gain = randn(2, 5, 8), torch.tensor([2.0, 0.5], dtype=torch.float64)
    c_q, c_k, c_v = randn(8, 8), randn(4, 8) * 3, randn(4, 8)
    cos, sin = model.rope_tables(5, 4, 10000.0, "exact", torch.float64)
    q, k, v = model.queries_keys_values(n, c_q, c_k, c_v, gain, cos, sin)
    assert torch.allclose(q.square().mean(-1).sqrt(), gain.expand(2, 5, 2), rtol=1e-6)
    assert torch.allclose(k.square().mean(-1).sqrt(), torch.ones(2, 5, 1, dtype=torch.float64), rtol=1e-6)
    assert torch.allclose(k[0, 0, 0], model.rms(c_k @ n[0, 0]))  # position 0 is not rotated
    assert torch.allclose(v[1, 3, 0], c_v @ n[1, 3])
    proj = randn(8, 8)
    out = model.attention(n, c_q, c_k, c_v, proj, gain, cos, sin)
    assert torch.allclose(out[1, 0], proj @ torch.cat([v[1, 0, 0], v[1, 0, 0]]))  # position 0 sees itself alone


def test_mlp_by_hand():
    fc = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    proj = torch.tensor([[1.0, 10.0, 100.0]], dtype=torch.float64)
    n = torch.tensor([[3.0, 0.5], [-2.0, 0.0]], dtype=torch.float64)
    assert model.mlp(n, fc, proj).flatten().tolist() == [9 + 1600, 40]


def test_cross_entropy_and_rms_agree_with_pytorch():
    logits, targets = randn(2, 5, 9), torch.arange(10).reshape(2, 5) % 9
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").reshape(2, 5)
    assert torch.allclose(model.cross_entropy(logits, targets), expected)
    assert torch.allclose(model.rms(logits), F.rms_norm(logits, (9,), eps=2.0**-23))


@pytest.mark.parametrize(("layers", "expected"), [(4, [0, 1, 10 + 2 * 10, 100 + 3 * 1]), (5, [0, 1, 30, 103, 1000])])
def test_skips_are_last_in_first_out(layers, expected):
    """Block i stands in for 10^i, so that each block's input shows which outputs reached it."""
    seen = []

    class Recorder(ReferenceGPT):
        def block(self, i, x, x0, cos, sin):
            seen.append((x - x0)[0, 0, 0].item() if i == 0 else x[0, 0, 0].item())
            return torch.full_like(x, 10.0**i)

    cfg = tiny(num_layers=layers)
    state = perturbed(cfg)
    state["skip_weights"][:] = [[2.0], [3.0]]
    Recorder(cfg, state).logits(batch(cfg)[0])
    assert seen == pytest.approx(expected)


def test_the_residual_mix_brings_back_the_embedding():
    cfg = tiny(num_layers=2)
    state = perturbed(cfg)
    state["skip_weights"][:] = 0.0
    state["blocks.1.resid_mix"][:] = [[0.0], [2.0]]
    state["blocks.1.attn_scale"][:] = 0.0
    state["blocks.1.mlp_scale"][:] = 0.0
    reference = ReferenceGPT(cfg, state)
    ids = batch(cfg)[0]
    bigram = reference.params["bigram.embed.weight"][model.bigram_hash(model.as_ids(ids), 11)]
    x = reference.params["tok_emb.weight"][model.as_ids(ids)]
    x = x + reference.params["bigram.scale"] * (bigram @ reference.params["bigram.proj.weight"].T)
    x0 = model.smear(model.rms(x), reference.params["smear.gate"])
    assert torch.allclose(reference.hidden(ids), 2 * x0)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_norms_multiplies_and_caps(tied):
    cfg = tiny(tie_embeddings=tied, logit_softcap=5.0)
    reference = ReferenceGPT(cfg, perturbed(cfg))
    ids = batch(cfg)[0]
    x = reference.hidden(ids)
    n = x / (x.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()
    table = reference.params["tok_emb.weight" if tied else "lm_head.weight"]
    assert torch.allclose(reference.logits(ids), 5 * torch.tanh((n @ table.T) / 5))


def test_logits_are_capped_and_start_near_uniform():
    cfg = tiny()
    assert ReferenceGPT(cfg, rng.init_state(cfg, 42)).loss(*batch(cfg)).item() == pytest.approx(math.log(13), rel=0.02)
    state = perturbed(cfg)
    state["tok_emb.weight"] *= 1e5
    logits = ReferenceGPT(cfg, state).logits(batch(cfg)[0])
    assert 29.9 < logits.abs().max() <= 30


VARIANTS = [
    {},
    {"tie_embeddings": False},
    {"bigram_vocab_size": 0},
    {"bigram_dim": 16},
    {"num_layers": 1},
    {"smear_reset_at_bos": True},
    {"rope_tables": "bf16"},
    {"num_kv_heads": 1, "mlp_mult": 2.5},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_gradient_is_alive_after_perturbation(changes):
    cfg = tiny(**changes)
    _, gradients = ReferenceGPT(cfg, perturbed(cfg)).loss_and_grads(*batch(cfg))
    assert list(gradients) == list(parameter_shapes(cfg))
    assert [name for name, g in gradients.items() if g.size and not g.any()] == []


@pytest.mark.parametrize("changes", VARIANTS)
def test_gradients_are_the_loss_differences(changes):
    """Central differences along a random direction of each tensor."""
    cfg = tiny(**changes)
    state = {name: value.astype(np.float64) for name, value in perturbed(cfg).items()}
    ids, targets = batch(cfg)
    _, gradients = ReferenceGPT(cfg, state).loss_and_grads(ids, targets)
    step = 1e-6
    for name, g in gradients.items():
        direction = rng.normal64(5, name, g.shape)
        ends = [
            ReferenceGPT(cfg, {**state, name: state[name] + sign * step * direction}).loss(ids, targets).item()
            for sign in (1, -1)
        ]
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx((g * direction).sum(), rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("changes", VARIANTS)
def test_logits_ignore_later_tokens(changes):
    cfg = tiny(**changes)
    reference = ReferenceGPT(cfg, perturbed(cfg))
    ids = batch(cfg)[0]
    other = ids.copy()
    other[:, 4:] = (other[:, 4:] + 1) % cfg.vocab_size
    a, b = reference.logits(ids), reference.logits(other)
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.equal(a[:, 4], b[:, 4])


def test_reset_at_bos_changes_only_what_follows_a_bos():
    ids = np.array([[5, 6, 1, 7, 8]])
    cfg = tiny()
    state = perturbed(cfg)
    plain, reset = (
        ReferenceGPT(tiny(smear_reset_at_bos=flag), state).hidden(ids).detach().numpy() for flag in (False, True)
    )
    assert (plain[:, :2] == reset[:, :2]).all()
    assert (plain[:, 2:] != reset[:, 2:]).any(-1).all()


def test_state_must_match_the_shapes():
    cfg = tiny()
    state = perturbed(cfg)
    with pytest.raises(ValueError, match=r"missing or extra.*'extra'"):
        ReferenceGPT(cfg, {**state, "extra": np.zeros(1)})
    with pytest.raises(ValueError, match=r"smear\.gate has shape \(3,\); expected \(16,\)"):
        ReferenceGPT(cfg, {**state, "smear.gate": np.zeros(3)})


# §3 -------------------------------------------------------------------------------------------------------------------


def train_config(**changes: Any) -> SimpleNamespace:
    base = {
        "iterations": 20,
        "max_wallclock_seconds": 0.0,
        "warmdown_iters": 10,
        "warmdown_frac": 0.0,
        "warmdown_shape": "linear",
        "muon_momentum": 0.99,
        "muon_momentum_warmup_start": 0.92,
        "muon_momentum_warmup_steps": 4,
        "muon_backend_steps": 5,
        "muon_coefficients": [(3.4445, -4.7750, 2.0315)],
        "muon_row_normalize": False,
        "enable_looping_at": 0.0,
        "muon_weight_decay": 0.04,
        "weight_decay": 0.04,
        "embed_lr": 0.6,
        "tied_embed_lr": 0.03,
        "head_lr": 0.008,
        "matrix_lr": 0.02,
        "scalar_lr": 0.02,
        "beta1": 0.9,
        "beta2": 0.95,
        "adam_eps": 1e-8,
        "grad_clip_norm": 0.3,
        "swa_enabled": True,
        "swa_start_frac": 0.4,
        "swa_every": 2,
        "ema_decay": 0.0,
        "qat_start_frac": None,
    }
    return SimpleNamespace(**{**base, **changes})


def test_iteration_form_of_the_multiplier():
    cfg = train_config()
    assert [trainer.lr_multiplier(cfg, s, 1e9) for s in (0, 9, 10, 11, 15, 19)] == pytest.approx(
        [1, 1, 1, 0.9, 0.5, 0.1]
    )
    assert trainer.lr_multiplier(train_config(warmdown_iters=40), 0, 0.0) == 0.5
    assert trainer.lr_multiplier(train_config(warmdown_iters=0), 19, 0.0) == 1
    assert trainer.lr_multiplier(train_config(warmdown_frac=0.1), 19, 0.0) == 0.5


def test_time_form_of_the_multiplier():
    cfg = train_config(max_wallclock_seconds=100.0)
    assert trainer.lr_multiplier(cfg, 0, 0.0) == 1
    assert trainer.lr_multiplier(cfg, 25, 50.0) == 1  # 2 s a step: the last 20 s
    assert trainer.lr_multiplier(cfg, 45, 90.0) == pytest.approx(0.5)
    assert trainer.lr_multiplier(cfg, 45, 101.0) == 0
    assert trainer.lr_multiplier(train_config(max_wallclock_seconds=100.0, warmdown_iters=0), 45, 99.0) == 1
    frac = train_config(max_wallclock_seconds=100.0, warmdown_frac=0.4)
    assert [trainer.lr_multiplier(frac, 3, t) for t in (0.0, 60.0, 90.0, 101.0)] == pytest.approx([1, 1, 0.25, 0])


def test_cosine_shape():
    cfg = train_config(warmdown_shape="cosine")
    assert [trainer.lr_multiplier(cfg, s, 0.0) for s in (0, 15)] == pytest.approx([1, 0.5])
    assert trainer.lr_multiplier(cfg, 18, 0.0) == pytest.approx(0.5 * (1 - math.cos(0.2 * math.pi)))


def test_momentum_qat_and_snapshot_switches():
    cfg = train_config()
    assert [trainer.muon_momentum(cfg, s) for s in (0, 1, 4, 9)] == pytest.approx([0.92, 0.9375, 0.99, 0.99])
    assert trainer.muon_momentum(train_config(muon_momentum_warmup_steps=0), 0) == 0.99
    assert not trainer.qat_active(cfg, 19, 0.0)
    late = train_config(qat_start_frac=0.85)
    assert [trainer.qat_active(late, s, 1e9) for s in (16, 17)] == [False, True]
    late.max_wallclock_seconds = 100.0
    assert [trainer.qat_active(late, 19, t) for t in (84.9, 85.0)] == [False, True]
    assert [trainer.snapshot_due(cfg, s, m) for s, m in ((3, 0.39), (3, 0.4), (4, 0.1))] == [True, False, False]
    assert not trainer.snapshot_due(train_config(swa_enabled=False), 3, 0.1)


def test_clipping_is_global():
    gradients = [torch.full((3,), 2.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)]
    scale, norm = trainer.clip_scale(gradients, 0.3)
    assert norm == pytest.approx(4) and scale == pytest.approx(0.3 / (4 + 1e-6), rel=1e-12)
    assert trainer.clip_scale(gradients, 0.0)[0] == 1 and trainer.clip_scale(gradients, 5.0)[0] == 1


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_newton_schulz_flattens_the_singular_values(shape):
    u = randn(*shape)
    values = torch.linalg.svdvals(trainer.newton_schulz(u))
    assert values.max() < 1.25 and values.median() > 0.65
    left, _, right = torch.linalg.svd(u, full_matrices=False)
    aligned = left.T @ trainer.newton_schulz(u) @ right.T  # same singular vectors: diagonal
    assert (aligned - aligned.diag().diag()).abs().max() < 1e-9


def test_newton_schulz_follows_the_scalar_polynomial():
    def iterate(x: float) -> float:
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        return x

    u = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    expected = [iterate(s / (5 + 1e-7)) for s in (3.0, 4.0)]
    assert trainer.newton_schulz(u).diagonal().tolist() == pytest.approx(expected)


def test_muon_by_hand():
    """A rank-1 gradient on a 4×1 matrix: u/‖u‖ is all that Newton–Schulz keeps, times the polynomial of 1."""
    p = torch.ones(4, 1, dtype=torch.float64)
    m = torch.full((4, 1), 1.0, dtype=torch.float64)
    g = torch.full((4, 1), 2.0, dtype=torch.float64)
    trainer.muon_update(p, g, m, lr=0.1, mu=0.5, decay=0.2, steps=1)
    assert m.flatten().tolist() == [2.5] * 4
    direction = (3.4445 - 4.7750 + 2.0315) * 0.5  # each of four equal entries of a unit vector
    assert p.flatten().tolist() == pytest.approx([1 * (1 - 0.02) - 0.1 * 2 * direction] * 4, rel=1e-6)


def test_adamw_agrees_with_pytorch():
    p, m, v = randn(3, 4), torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    theirs = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for t in range(1, 6):
        theirs.grad = randn(3, 4) * t
        trainer.adamw_update(p, theirs.grad, m, v, t, 0.01, (0.9, 0.95), 1e-8, 0.1)
        optimizer.step()
    assert torch.allclose(p, theirs.detach(), rtol=1e-12, atol=1e-14)


def test_groups():
    groups: dict[str, set[str]] = {}
    for name in parameter_shapes(tiny(num_layers=2, tie_embeddings=False)):
        groups.setdefault(trainer.parameter_group(name), set()).add(
            name.replace("blocks.0.", "").replace("blocks.1.", "")
        )
    assert groups == {
        "embed": {"tok_emb.weight", "bigram.embed.weight"},
        "head": {"lm_head.weight"},
        "scalar": {
            "bigram.scale",
            "smear.gate",
            "resid_mix",
            "attn_scale",
            "mlp_scale",
            "attn.q_gain",
            "skip_weights",
        },
        "matrix": {
            "bigram.proj.weight",
            "attn.c_q.weight",
            "attn.c_k.weight",
            "attn.c_v.weight",
            "attn.proj.weight",
            "mlp.fc.weight",
            "mlp.proj.weight",
        },
    }


@pytest.mark.parametrize("tied", [True, False])
def test_the_first_step_of_each_group(tied):
    """At t = 1 Adam moves an entry by lr·g/(|g| + eps); decay is lr·wd of each group, none for the head."""
    cfg = tiny(tie_embeddings=tied)
    state = perturbed(cfg)
    options = train_config(grad_clip_norm=0.0, warmdown_iters=40, weight_decay=0.1)
    run = trainer.ReferenceTrainer(cfg, options, state)
    ids, targets = batch(cfg)
    loss, gradients = ReferenceGPT(cfg, state).loss_and_grads(ids, targets)
    record = run.step([(ids, targets)])
    assert record.loss == pytest.approx(loss) and record.lr_scale == 0.5 and record.momentum == 0.92
    norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert record.grad_norm == pytest.approx(norm)
    after = run.state()
    rates = {"tok_emb.weight": (0.03 if tied else 0.6, 0.1), "smear.gate": (0.02, 0.1), "skip_weights": (0.02, 0.1)}
    if not tied:
        rates["lm_head.weight"] = (0.008, 0.0)
    for name, (lr, decay) in rates.items():
        g, p, lr = gradients[name], state[name].astype(np.float64), lr * 0.5
        assert np.allclose(after[name], p * (1 - lr * decay) - lr * g / (np.abs(g) + 1e-8), rtol=1e-10, atol=1e-14)
    g = torch.from_numpy(gradients["blocks.0.mlp.fc.weight"])
    u = trainer.newton_schulz(g * 1.92).numpy() * math.sqrt(3)
    p = state["blocks.0.mlp.fc.weight"].astype(np.float64)
    assert np.allclose(after["blocks.0.mlp.fc.weight"], p * (1 - 0.01 * 0.04) - 0.01 * u, rtol=1e-9, atol=1e-12)


def test_parts_of_a_step_only_partition_its_tokens():
    cfg = tiny()
    ids, targets = batch(cfg, sequences=5)
    whole, parts = (trainer.ReferenceTrainer(cfg, train_config(), perturbed(cfg)) for _ in range(2))
    for _ in range(2):
        a = whole.step([(ids, targets)])
        b = parts.step([(ids[:1], targets[:1]), (ids[1:], targets[1:])])
        assert a.loss == pytest.approx(b.loss, rel=1e-12)
    for name, value in whole.state().items():
        assert np.allclose(value, parts.state()[name], rtol=1e-9, atol=1e-12), name


def test_swa_averages_the_weights_after_its_steps():
    cfg = tiny(num_layers=1)
    run = trainer.ReferenceTrainer(cfg, train_config(iterations=10, warmdown_iters=10), perturbed(cfg))
    taken = []
    for s in range(10):
        if run.step([batch(cfg, seed=s)]).snapshot:
            taken.append((s, run.state()))
    assert [s for s, _ in taken] == [7, 9]  # multipliers 0.3 and 0.1; step 6 has 0.4
    final = run.final_state()
    for name, value in final.items():
        assert np.allclose(value, (taken[0][1][name] + taken[1][1][name]) / 2, rtol=1e-14, atol=0)
    assert not np.allclose(final["tok_emb.weight"], run.state()["tok_emb.weight"])


def test_one_snapshot_does_not_replace_the_weights():
    cfg = tiny(num_layers=1)
    run = trainer.ReferenceTrainer(cfg, train_config(iterations=3, warmdown_iters=8), perturbed(cfg))
    assert [run.step([batch(cfg, seed=s)]).snapshot for s in range(3)] == [False, True, False]
    assert all((value == run.state()[name]).all() for name, value in run.final_state().items())


def test_ema_starts_from_the_initial_weights_and_replaces_swa():
    cfg = tiny(num_layers=1)
    run = trainer.ReferenceTrainer(cfg, train_config(ema_decay=0.75), perturbed(cfg))
    states = [run.state()]
    for s in range(2):
        assert not run.step([batch(cfg, seed=s)]).snapshot
        states.append(run.state())
    for name, value in run.final_state().items():
        expected = 0.75**2 * states[0][name] + 0.75 * 0.25 * states[1][name] + 0.25 * states[2][name]
        assert np.allclose(value, expected, rtol=1e-12, atol=1e-15)


def test_fake_quantisation_by_hand():
    w = torch.tensor([[1.5, 0.25, -0.15, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    sigma = float(np.float32(1.5) / np.float32(15))
    out = model.fake_quantise(w, 15)
    assert out[0].tolist() == pytest.approx([15 * sigma, 2 * sigma, -2 * sigma, 0.0], rel=1e-7)  # 2.5 and 1.5 go to 2
    assert not out[1].any()


def test_late_qat_is_straight_through():
    """Loss and gradients are those of the model whose matrices are replaced; embeddings and bigram are not."""
    cfg = tiny()
    state = {name: value.astype(np.float64) for name, value in perturbed(cfg).items()}
    clips = model.qat_clips(cfg)
    assert {name.split(".", 2)[-1]: clip for name, clip in clips.items()} == {
        "attn.c_q.weight": 31,
        "attn.c_k.weight": 31,
        "attn.c_v.weight": 31,
        "attn.proj.weight": 31,
        "mlp.fc.weight": 15,
        "mlp.proj.weight": 15,
    }
    quantised = ReferenceGPT(cfg, state)
    quantised.clips = clips
    replaced = {
        name: model.fake_quantise(torch.from_numpy(w), clips[name]).numpy() if name in clips else w
        for name, w in state.items()
    }
    loss, gradients = quantised.loss_and_grads(*batch(cfg))
    expected_loss, expected = ReferenceGPT(cfg, replaced).loss_and_grads(*batch(cfg))
    assert loss == expected_loss != ReferenceGPT(cfg, state).loss(*batch(cfg)).item()
    assert all((gradients[name] == expected[name]).all() for name in expected)


def test_late_qat_switches_on_in_the_trainer():
    cfg = tiny(num_layers=1)
    run = trainer.ReferenceTrainer(cfg, train_config(iterations=4, qat_start_frac=0.5), perturbed(cfg))
    assert [run.step([batch(cfg, seed=s)]).qat for s in range(4)] == [False, False, True, True]
    before = ReferenceGPT(cfg, run.state())
    assert run.model.loss(*batch(cfg)).item() == before.loss(*batch(cfg)).item()  # off outside the step
    quantised = ReferenceGPT(cfg, run.state())
    quantised.clips = model.qat_clips(cfg)
    assert run.step([batch(cfg)]).loss == pytest.approx(quantised.loss(*batch(cfg)).item(), rel=1e-12)


def test_training_learns():
    cfg = tiny(num_layers=2)
    run = trainer.ReferenceTrainer(cfg, train_config(iterations=30), rng.init_state(cfg, 1))
    losses = [run.step([batch(cfg, sequences=2, seed=0)]).loss for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


# §4 -------------------------------------------------------------------------------------------------------------------


def test_int5_by_hand():
    w = np.array([[15.0, -15.0, 2.5, 3.5, -0.5], [0, 0, 0, 0, 0]], np.float32)
    q, sigma = quant.quantize_rows(w, 15)
    assert q.tolist() == [[15, -15, 2, 4, 0], [0, 0, 0, 0, 0]]
    assert sigma.tolist() == [1.0, 2.0**-14]
    assert quant.dequantize_rows(q, sigma)[0].tolist() == [15, -15, 2, 4, 0]


def test_scales_are_fp16_and_never_subnormal():
    w = np.array([[1.0, 0.1], [2.0**-13, 0.0]], np.float32)
    q, sigma = quant.quantize_rows(w, 31)
    assert sigma.tolist() == [np.float16(1 / 31), 2.0**-14]
    assert q.tolist() == [[31, 3], [2, 0]]


def test_int8_clips_at_the_quantile_and_floors_its_scale():
    w = np.array([np.linspace(0, 254, 255), np.full(255, 0.5)], np.float32)
    w[1, 0] = -0.5
    q, sigma = quant.quantize_rows_int8(w)
    clip = np.quantile(w[0].astype(np.float64), 0.9999984)
    assert sigma[0] == np.float16(np.float32(clip) / np.float32(127)) == 2.0
    assert q[0, 254] == 127 and q[0, 100] == 50
    assert sigma[1] == np.float16(1 / 127) and set(q[1].tolist()) == {-64, 64}  # 63.5 to even


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_quantile_agrees_with_numpy(n, q, seed):
    values = np.random.default_rng(seed).normal(size=n).astype(np.float32)
    assert quant.quantile(values, q) == pytest.approx(np.float32(np.quantile(values.astype(np.float64), q)), rel=2e-7)


def test_pruning_is_strict_and_only_of_large_matrices():
    w = np.array([[1.0, -2.0, 3.0, -4.0, 5.0]], np.float32)
    assert quant.prune(w, 0.5).tolist() == [[0, 0, 3, -4, 5]]
    large = rng.normal(1, "large", (257, 256))
    small = rng.normal(1, "small", (256, 256))
    skips = rng.normal(1, "vector", (257 * 256,))
    out = quant.prune_state({"large": large, "small": small, "vector": skips}, 0.03)
    assert (out["large"] == 0).mean() == pytest.approx(0.03, abs=1e-4)
    assert out["small"] is small and out["vector"] is skips
    assert quant.prune_state({"large": large}, None)["large"] is large


BASE_POLICY = [
    ("tok_emb.*", "fp16"),
    ("blocks.8.attn.c_k.*", "fp16"),
    ("*.mlp.*", "int5"),
    ("*.attn.*", "int6"),
    ("bigram.*", "int6"),
    ("lm_head.*", "fp16"),
    ("*", "int8"),
]


def test_the_base_policy():
    def encodings(small_numel: int, policy: list[tuple[str, str]]) -> dict[str, str]:
        shapes = parameter_shapes(ModelShape())
        return {n: quant.resolve(n, math.prod(s), policy, small_numel) for n, s in shapes.items()}

    base = encodings(8192, BASE_POLICY)
    assert base["tok_emb.weight"] == base["blocks.8.attn.c_k.weight"] == "fp16"
    assert base["blocks.7.attn.c_k.weight"] == base["blocks.8.attn.c_v.weight"] == "int6"
    assert base["blocks.8.mlp.fc.weight"] == "int5"
    assert base["bigram.embed.weight"] == base["bigram.proj.weight"] == "int6"
    assert base["skip_weights"] == base["blocks.0.resid_mix"] == base["bigram.scale"] == "fp16"
    assert encodings(65_536, BASE_POLICY)["bigram.proj.weight"] == "fp16"
    large_controls = encodings(0, BASE_POLICY)
    assert large_controls["skip_weights"] == large_controls["bigram.scale"] == "fp32"
    with pytest.raises(ValueError, match=r"No pattern of the policy matches tok_emb\.weight"):
        encodings(0, [("bigram.*", "int6")])


def test_quantize_state_errors_stay_within_half_a_step():
    cfg = tiny(model_dim=64, vocab_size=200)
    state = perturbed(cfg)
    out, encodings = quant.quantize_state(state, BASE_POLICY, 100)
    assert set(encodings.values()) == {"fp16", "fp32", "int5", "int6"}
    for name, w in state.items():
        error = np.abs(out[name] - w)
        assert out[name].dtype == np.float32 and out[name].shape == w.shape
        if encodings[name] == "fp32":
            assert not error.any()
        elif encodings[name] == "fp16":
            assert (error <= np.abs(w) * 2.0**-11 + 2.0**-25).all()
        else:
            steps = np.maximum(np.abs(w).max(-1, keepdims=True) / quant.CLIPS[encodings[name]], 2.0**-14)
            assert (error <= 0.51 * steps).all()
    pruned, _ = quant.quantize_state({"w": rng.normal(1, "w", (300, 300))}, [("*", "fp32")], 0, prune=0.1)
    assert (pruned["w"] == 0).mean() == pytest.approx(0.1, abs=1e-3)


# §5 -------------------------------------------------------------------------------------------------------------------


def test_books_have_17216_reference_windows():
    windows = evaluate.sliding_windows(1_103_511 - 1, 2048, 64, "reference")
    assert len(windows) == 17_216
    assert windows[0] == (0, 2048, 0) and windows[1] == (64, 2048, 1984)
    assert windows[-1] == (538 * 2048 - 64, 64, 0)


@given(st.integers(1, 400), st.integers(1, 60), st.integers(1, 60))
@settings(deadline=None, max_examples=200)
def test_exact_windows_score_every_target_once(targets, length, stride):
    stride = min(stride, length)
    windows = evaluate.sliding_windows(targets, length, stride, "exact")
    scored = [start + i for start, size, first in windows for i in range(first, size)]
    assert scored == list(range(targets))
    assert all(first < size <= length and start + size <= targets for start, size, first in windows)


@given(st.integers(0, 400), st.integers(1, 60), st.integers(1, 60))
@settings(deadline=None, max_examples=200)
def test_reference_windows_cover_the_cut_targets(targets, length, stride):
    stride = min(stride, length)
    windows = evaluate.sliding_windows(targets, length, stride, "reference")
    scored = {start + i for start, size, first in windows for i in range(first, size)}
    cut = targets // length * length
    last = (cut - stride) // stride * stride
    assert scored == set(range(min(cut, last + length) if cut else 0))
    assert all(size - first == stride for start, size, first in windows if start > 0)
    assert len(windows) == (0 if cut == 0 else (cut - stride) // stride + 1)


def test_standard_windows_drop_the_incomplete_one():
    assert evaluate.standard_windows(11, 4) == [(0, 4, 0), (4, 4, 0)]
    assert evaluate.standard_windows(12, 4)[-1] == (8, 4, 0)
    assert evaluate.standard_windows(3, 4) == []
    with pytest.raises(ValueError, match="tail is 'half'; expected 'exact' or 'reference'"):
        evaluate.sliding_windows(10, 4, 2, "half")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("tokenizer") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat with 12 hats, and the dog did not"] * 20),
        model_prefix=str(prefix),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="nmt_nfkc",
        add_dummy_prefix=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


def test_target_bytes_sum_to_the_text(tokenizer):
    texts = ["the cat sat", "a naïve café — 42 mats", "dog"]
    tokens = [token for text in texts for token in [1, *tokenizer.encode(text)]]
    counts = evaluate.target_bytes(tokenizer, tokens)
    assert counts.sum() == sum(len(text.encode()) for text in texts)
    assert all(counts[i - 1] == 0 for i, token in enumerate(tokens) if token == 1 and i)


def test_a_leading_space_counts_unless_the_previous_token_has_no_text(tokenizer):
    the = next(i for i in range(tokenizer.vocab_size()) if tokenizer.id_to_piece(i) == "▁the")
    assert evaluate.target_bytes(tokenizer, [the, the, 1, the, 2, 3, the]).tolist() == [4, 0, 3, 0, 0, 3]


def test_evaluate_sums_losses_over_windows(tokenizer):
    text = "the cat sat on the mat with the dog and the hat"
    tokens = np.array([1, *tokenizer.encode(text)], np.uint16)
    cfg = tiny(vocab_size=tokenizer.vocab_size())
    reference = ReferenceGPT(cfg, perturbed(cfg))
    targets = len(tokens) - 1
    whole = reference.token_losses(tokens[None, :-1], tokens[None, 1:]).detach().numpy()[0]
    score = evaluate.evaluate(reference, tokens, evaluate.sliding_windows(targets, targets, 3, "exact"), tokenizer)
    assert score.tokens == targets and score.bytes == len(text)
    assert score.loss == pytest.approx(whole.mean())
    assert score.bpb == pytest.approx(whole.sum() / math.log(2) / len(text))
    half = targets // 2
    short = evaluate.evaluate(reference, tokens, evaluate.standard_windows(targets, half))
    expected = [
        reference.loss(tokens[None, a : a + half], tokens[None, a + 1 : a + half + 1]).item() for a in (0, half)
    ]
    assert short.loss == pytest.approx(sum(expected) / 2) and short.tokens == 2 * half
    assert short.bpb is None and short.bytes is None
