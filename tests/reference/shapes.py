"""The configuration and the parameter table of docs/spec.md §1: names and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CONTROL = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear.gate", "bigram.scale")
"""What marks a control tensor: its name contains one of these."""


@dataclass
class ModelShape:
    """The `[model]` table; the defaults are the base recipe. Any object with these attributes serves as a `cfg`."""

    vocab_size: int = 1024
    num_layers: int = 10
    loop_start: int = 0
    loop_end: int = 0
    num_loops: int = 0
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: float = 3.0
    mlp_negative_slope: float = 0.0
    ln_scale: bool = False
    tie_embeddings: bool = True
    tied_embed_init_std: float = 0.005
    logit_softcap: float = 30.0
    rope_base: float = 10000.0
    rope_dims: int = 0
    qk_gain_init: float = 1.5
    bigram_vocab_size: int = 10240
    bigram_dim: int = 128
    smear_reset_at_bos: bool = False
    bos_id: int = 1
    rope_tables: str = "exact"


def is_control(name: str) -> bool:
    """Whether `name` is a scale, mix, gain, gate or skip tensor."""
    return any(word in name for word in CONTROL)


def layer_order(cfg: Any, looping: bool = True) -> list[int]:
    """§2.3: the layers in the order in which they run, with their loops or each once."""
    start, end = cfg.loop_start, cfg.loop_end + 1
    loops = cfg.num_loops if looping else 0
    return [*range(end), *list(range(start, end)) * loops, *range(end, cfg.num_layers)]


def parameter_shapes(cfg: Any) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by name, in the order of the table of §1."""
    vocab, layers, d = cfg.vocab_size, cfg.num_layers, cfg.model_dim
    kv_dim = cfg.num_kv_heads * (d // cfg.num_heads)
    hidden = int(cfg.mlp_mult * d)
    buckets, e = cfg.bigram_vocab_size, cfg.bigram_dim

    shapes: dict[str, tuple[int, ...]] = {"tok_emb.weight": (vocab, d)}
    if buckets > 0:
        shapes["bigram.embed.weight"] = (buckets, e)
        if e != d:
            shapes["bigram.proj.weight"] = (d, e)
        shapes["bigram.scale"] = ()
    shapes["smear.gate"] = (d,)
    for i in range(layers):
        shapes[f"blocks.{i}.resid_mix"] = (2, d)
        shapes[f"blocks.{i}.attn_scale"] = (d,)
        shapes[f"blocks.{i}.mlp_scale"] = (d,)
        shapes[f"blocks.{i}.attn.c_q.weight"] = (d, d)
        shapes[f"blocks.{i}.attn.c_k.weight"] = (kv_dim, d)
        shapes[f"blocks.{i}.attn.c_v.weight"] = (kv_dim, d)
        shapes[f"blocks.{i}.attn.proj.weight"] = (d, d)
        shapes[f"blocks.{i}.attn.q_gain"] = (cfg.num_heads,)
        shapes[f"blocks.{i}.mlp.fc.weight"] = (hidden, d)
        shapes[f"blocks.{i}.mlp.proj.weight"] = (d, hidden)
    places = len(layer_order(cfg))
    shapes["skip_weights"] = (min(places // 2, places - places // 2), d)
    if not cfg.tie_embeddings:
        shapes["lm_head.weight"] = (vocab, d)
    return shapes
