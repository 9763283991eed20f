"""Runs every kernel of a GPU on small shapes, for compute-sanitizer: two steps, QAT, averaging, validation,
generation, test-time training, quantising.

compute-sanitizer --tool memcheck python3 dev/gpu_small.py, or with dtypes as arguments: racecheck is slow.
"own" before the dtypes runs what needs no library, "steps" leaves test-time training out.
"""

from __future__ import annotations

import sys

import numpy as np

from pgolf import _C, ops
from pgolf.artifacts.quantize import qat_clips
from pgolf.config import NEWTON_SCHULZ, Config, ModelConfig
from pgolf.model import GPT, parameter_shapes
from pgolf.scoring.evaluation import evaluate
from pgolf.training.trainer import step_settings

SETTINGS = step_settings(Config.from_recipe("base"))
# d 96, a head width that fills no tile of 16; an untied head; sequences that fill no tile.
SMALL = {
    "bos_id": 1,
    "vocab_size": 97,
    "num_layers": 3,
    "model_dim": 96,
    "num_heads": 2,
    "num_kv_heads": 1,
    "bigram_vocab_size": 33,
    "bigram_dim": 20,
}
# April's: signs beside hidden values, part of a head turned, scaled norms, layers that run again.
APRIL = {"mlp_negative_slope": 0.5, "rope_dims": 16, "ln_scale": True, "loop_start": 1, "loop_end": 2, "num_loops": 1}
VARIANTS = [
    {},
    {"tie_embeddings": False, "bigram_dim": 96, "num_heads": 3, "num_kv_heads": 3},
    {"bigram_vocab_size": 0, **APRIL},
]
# What Hopper's own kernels take: numbers of 16 bits.
HOPPER = {"model_dim": 256, "num_heads": 4, "num_kv_heads": 2}


def train(dtype: str, changes: dict[str, object], adapts: bool) -> None:
    config = ModelConfig(**{**SMALL, **changes})
    model = GPT(config, seed=1, device="cuda", dtype=dtype)
    april = bool(config.num_loops)
    polynomials = NEWTON_SCHULZ["polar_express" if april else "keller_jordan"]
    model._native.set_qat_clips(qat_clips(parameter_shapes(config), Config().export.policy))
    optimizer = _C.Optimizer(model._native, 5, polynomials, april)
    rng = np.random.default_rng(0)
    for step in range(2):
        model.looping = step == 1
        model._native.begin_step(step == 1)
        for batch in (3, 1):
            ids = rng.integers(0, config.vocab_size, (batch, 71), dtype=np.int32)
            model._native.micro_step(ids, np.roll(ids, -1, axis=1), 1 / 284)
        model._native.end_step()
        loss, norm, finite, *_ = optimizer.wait(optimizer.step(SETTINGS))
        assert finite and np.isfinite([loss, norm]).all()
        optimizer.add_snapshot()
    optimizer.use_snapshot_mean()
    if adapts:
        tokens = rng.integers(2, config.vocab_size, 121)
        tokens[[0, 30]] = config.bos_id
        score = evaluate(model, tokens, method="ttt", ttt_chunk_size=24, ttt_eval_seq_len=64, ttt_batch_size=2)
        assert np.isfinite(score.loss)
    ids = rng.integers(0, config.vocab_size, (2, 65))
    assert np.isfinite(model.logits(ids)).all()
    assert np.isfinite(model.window_losses(ids, ids, 40)).all()
    assert model.generate(ids[0, :3], 40, temperature=0).shape == (40,)


def own_kernels(dtype: str) -> None:
    """What needs no product of cuBLASLt: under its Hopper kernels racecheck ends in a fault of its own."""
    rng = np.random.default_rng(2)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    with ops.on("cuda", dtype):
        for T, H, K, D in ((130, 4, 2, 64), (70, 2, 1, 40), (65, 2, 2, 128), (33, 3, 1, 96)):
            _, saved = ops.attention(draw(1, T, H, D), draw(1, T, K, D), draw(1, T, K, D), draw(H))
            ops.attention(draw(1, 1, H, D), draw(1, T, K, D), draw(1, T, K, D), draw(H))
            ops.attention_backward(saved, draw(1, T, H, D))
        # The blocks that stay, on a GPU that has them: several tiles for each.
        heads = 300
        ops.attention(draw(1, 65, heads, 64), draw(1, 65, heads, 64), draw(1, 65, heads, 64), draw(heads))
        ops.mlp_up(draw(1, 400, 64), draw(132 * 128, 64))
        ids = rng.integers(0, 50, (3, 130))
        _, saved = ops.embed(ids, draw(50, 96), draw(96), draw(33, 96), None, np.float32(0.1))
        ops.embed_backward(saved, draw(3, 130, 96))
        if dtype != "float32":  # whose products are cuBLASLt's
            # Attention as a step runs it, on past norm and RoPE; with several tiles for each block.
            for B, T, H, K in ((1, 300, 4, 2), (40, 130, 8, 4)):
                mixed = ops.MixedInput(draw(B, T, 64), draw(B, T, 64), draw(2, 64))
                weights = (draw(heads * 64, 64) for heads in (H, K, K))
                made, qkv = ops.qkv(mixed, *weights, draw(T, 32), draw(T, 32))
                _, saved = ops.attention(*made, draw(H), normed=True)
                ops.attention_backward(saved, draw(B, T, H, 64), qkv=qkv)
            shapes = ((136, 264), (264, 136), (392, 400), (24, 8), (1, 9))
            ops.muon(*([draw(*shape) for shape in shapes] for _ in range(3)), lr=0.02)
        w = [draw(130, 40), draw(7)]
        ops.grad_norm(w, 0.3)
        ops.adam(w, w, w, [a * a for a in w], step=1, lr=0.1)
        ops.working_copy(w[0], draw(130), clip=15)
        ops.finish_projection(w[0], draw(130), w[0])
        ops.axpby(0.5, w[0], 0.5, w[0])
        names = ["lm_head.lora_a"]
        ops.adapters_begin(w[0], w[0], w[0], np.arange(130) - 1, names=names, a_size=24, bound=0.1, seed=0)
        ops.adapters_step(w[0], w[0], w[0], w[0] * w[0], np.arange(130), lr=0.1)
        ops.sum(w[0])


def main() -> None:
    if sys.argv[1:2] == ["own"]:
        for dtype in sys.argv[2:]:
            own_kernels(dtype)
        print("every kernel of our own ran")
        return
    steps = sys.argv[1:2] == ["steps"]
    for dtype in sys.argv[1 + steps :] or ("float32", "bfloat16", "float16"):
        for changes in (*VARIANTS, *([] if dtype == "float32" else [HOPPER, {**HOPPER, **APRIL}])):
            train(dtype, changes, adapts=not steps)
    with ops.on("cuda"):
        q, scale = ops.quantize_rows(np.random.default_rng(1).standard_normal((70, 33)).astype(np.float32), 15)
        ops.dequantize_rows(q, scale)
    print("every kernel ran")


if __name__ == "__main__":
    main()
