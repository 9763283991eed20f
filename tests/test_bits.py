"""Bits of losses and logits depend on a row's own tokens: not on its batch, its place, what follows, or threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pgolf
from pgolf.config import ModelConfig
from pgolf.model import GPT
from pgolf.scoring.audit import document_starts
from pgolf.scoring.ttt import Documents, Settings, score
from tests.reference.model import perturb
from tests.reference.rng import init_state
from tests.test_products import HEIGHTS

BOS, VOCAB = 1, 97
SHAPES: dict[str, dict[str, Any]] = {
    "even": {"model_dim": 64, "num_heads": 2, "num_kv_heads": 1},
    "odd": {"model_dim": 42, "num_heads": 3, "num_kv_heads": 3, "mlp_mult": 2.5, "bigram_dim": 13},
    "wide": {"model_dim": 160, "num_heads": 5, "num_kv_heads": 1, "vocab_size": 301, "tie_embeddings": False},
}
MODELS: dict[tuple[str, str], GPT] = {}


def model_of(shape: str, dtype: str = "float32") -> GPT:
    if (shape, dtype) not in MODELS:
        values = {"vocab_size": VOCAB, "num_layers": 3, "bigram_vocab_size": 53, "bigram_dim": 16, "bos_id": BOS}
        config = ModelConfig(**{**values, **SHAPES[shape]})
        made = MODELS[shape, dtype] = GPT(config, None, device="cpu", dtype=dtype)
        made.load_state_dict(perturb(init_state(config, 3), 7))
    return MODELS[shape, dtype]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = pgolf.get_num_threads()
    try:
        pgolf.set_num_threads(count)
        yield
    finally:
        pgolf.set_num_threads(before)


shapes = st.sampled_from(sorted(SHAPES))
dtypes = st.sampled_from(["float32", "float64", "bfloat16", "float16"])
few = st.integers(1, 5)


@settings(max_examples=40)
@given(shape=shapes, dtype=dtypes, batch=st.sampled_from(HEIGHTS), length=st.integers(1, 33), at=few, data=st.data())
def test_a_sequence_alone_is_the_sequence_in_any_batch_at_any_place(
    shape: str, dtype: str, batch: int, length: int, at: int, data: st.DataObject
) -> None:
    model, rng = model_of(shape, dtype), np.random.default_rng(length)
    ids = rng.integers(0, model.config.vocab_size, (batch, length + 1))
    row = data.draw(st.integers(0, batch - 1))
    with threads(at):
        whole = model.token_losses(ids[:, :-1], ids[:, 1:])
    alone = model.token_losses(ids[row : row + 1, :-1], ids[row : row + 1, 1:])
    assert alone.tobytes() == whole[row : row + 1].tobytes()


@settings(max_examples=30)
@given(shape=shapes, dtype=dtypes, length=st.sampled_from(HEIGHTS), at=few, data=st.data())
def test_a_prefix_has_the_whole_texts_logits(shape: str, dtype: str, length: int, at: int, data: st.DataObject) -> None:
    model = model_of(shape, dtype)
    ids = np.random.default_rng(length).integers(0, model.config.vocab_size, (1, length))
    with threads(at):
        whole = model.logits(ids)
    cut = data.draw(st.integers(1, length))
    assert model.logits(ids[:, :cut]).tobytes() == whole[:, :cut].tobytes()


def stream(lengths: list[int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([[BOS, *rng.integers(2, VOCAB, length)] for length in lengths])


def losses(model: GPT, tokens: np.ndarray, batch: int) -> np.ndarray:
    documents = Documents.of(document_starts(tokens, BOS), tokens.size - 1)
    return score(model, tokens, documents, Settings(rank=3, lr=0.02, chunk=8, context=24, batch=batch))[0]


@settings(max_examples=20)
@given(
    shape=st.sampled_from(["even", "odd"]),
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=12),
    batch=st.integers(1, 13),
    at=few,
)
def test_a_documents_test_time_training_alone_is_that_in_any_batch(
    shape: str, lengths: list[int], batch: int, at: int
) -> None:
    model, tokens = model_of(shape), stream(lengths)
    with threads(at):
        together = losses(model, tokens, batch)
    starts = document_starts(tokens, BOS)
    # A later document changes nothing before it. (The last target of all but the last is the next one's BOS.)
    first = losses(model, tokens[: starts[1] + 1], 64)
    assert first.tobytes() == together[: first.size].tobytes()
    assert losses(model, tokens, 64).tobytes() == together.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_do_not_depend_on_threads(shape: str) -> None:
    model = model_of(shape)
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, (9, 66))
    found = []
    for count in (1, 2, 3, 5):
        with threads(count):
            found.append(model.loss_and_grads(ids[:, :-1], ids[:, 1:]))
    for loss, gradients in found[1:]:
        assert loss == found[0][0]
        assert all(np.array_equal(gradients[name], value) for name, value in found[0][1].items())
