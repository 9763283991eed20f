"""Test-time training: against the reference, its invariants bit for bit, and its edges (docs/spec.md §5)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pgolf
from pgolf import _C
from pgolf.common.errors import NonFiniteError
from pgolf.config import Config, ModelConfig
from pgolf.model import GPT
from pgolf.scoring.audit import document_starts
from pgolf.scoring.ttt import Documents, Settings, Window, plan, score
from tests.places import GPU_PLACES, ROUNDING_PLACES, Place
from tests.reference import ttt as reference
from tests.reference.model import perturb
from tests.reference.rng import init_state

torch.set_num_threads(2)

BOS = 1
MODEL = {
    "vocab_size": 97,
    "bos_id": BOS,
    "num_layers": 3,
    "model_dim": 64,
    "num_heads": 2,
    "num_kv_heads": 1,
    "bigram_vocab_size": 53,
    "bigram_dim": 16,
    "tied_embed_init_std": 0.1,
}
LOOPS = {"loop_start": 1, "loop_end": 2, "num_loops": 1}
SMALL = {"chunk": 24, "context": 100, "rank": 4, "lr": 0.02}

PLACES = [Place("cpu", "float32"), *ROUNDING_PLACES, *GPU_PLACES]
# Of a document's mean loss and of every loss. Where activations are rounded, so are gradients, and Adam's first steps
# have the gradients' signs.
TOLERANCE = {"float32": (1e-5, 5e-5), "bfloat16": (4e-3, 0.08), "float16": (5e-4, 8e-3)}


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**MODEL, **changes})


def state_of(model_config: ModelConfig) -> dict[str, np.ndarray]:
    return perturb(init_state(model_config, 3), 7)


def model_of(model_config: ModelConfig, place: Place = PLACES[0]) -> GPT:
    model = GPT(model_config, None, device=place.device, dtype=place.dtype)
    model.load_state_dict(state_of(model_config))
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return model_of(config())


def stream(*targets: int, vocab: int = 97, seed: int = 0) -> np.ndarray:
    """Documents of so many targets: BOS, then other tokens with a pattern that adapters can learn."""
    rng = np.random.default_rng(seed)
    parts = [np.concatenate([[BOS], rng.integers(2, 2 + (vocab - 2) // 4, n - 1) * 2]) for n in targets[:-1]]
    parts.append(np.concatenate([[BOS], rng.integers(2, vocab, targets[-1])]))
    return np.concatenate(parts)


def documents_of(tokens: np.ndarray) -> Documents:
    return Documents.of(document_starts(tokens, BOS), tokens.size - 1)


def scores(model: GPT, tokens: np.ndarray, **ways: Any) -> np.ndarray:
    losses, times = score(model, tokens, documents_of(tokens), Settings(**ways))
    assert (times == 1).all()
    return losses


# Parity ---------------------------------------------------------------------------------------------------------------


@functools.cache
def expected_losses(
    changes: tuple[tuple[str, Any], ...], targets: tuple[int, ...], ways: tuple[Any, ...]
) -> np.ndarray:
    model_config = config(**dict(changes))
    model = reference.AdaptedGPT(model_config, state_of(model_config))
    return reference.losses(model, stream(*targets), BOS, **dict(ways))


def assert_parity(found: np.ndarray, expected: np.ndarray, tokens: np.ndarray, place: Place) -> None:
    of_mean, of_each = TOLERANCE[place.dtype]
    error = np.abs(found - expected)
    assert error.max() <= of_each, f"token {error.argmax() + 1}: {error.max():.2e}"
    documents = documents_of(tokens)
    for start, count in zip(documents.start, documents.targets, strict=True):
        part = slice(start, start + count)
        assert abs(found[part].mean() - expected[part].mean()) <= of_mean


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_embeddings": False, "num_layers": 2}, {"num_layers": 1, "bigram_vocab_size": 0}, LOOPS],
    ids=["three layers", "untied", "one layer", "loops"],
)
def test_losses_are_the_reference_s(changes: dict[str, Any], place: Place) -> None:
    model_config = config(**changes)
    targets = (1, 24, 25, 130, 7, 48, 101)
    tokens = stream(*targets)
    expected = expected_losses(tuple(changes.items()), targets, tuple(SMALL.items()))
    found = scores(model_of(model_config, place), tokens, **SMALL)
    assert_parity(found, expected, tokens, place)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_the_recipe_s_chunks_and_windows(place: Place) -> None:
    """256 targets, windows of 256, 512, 768 and 1024; documents of 2 tokens, on both sides of a chunk, beyond 1024."""
    targets = (1, 256, 257, 1100)
    tokens = stream(*targets)
    expected = expected_losses((), targets, ())
    assert_parity(scores(model_of(config(), place), tokens), expected, tokens, place)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_every_rank(model: GPT, rank: int) -> None:
    tokens = stream(60, 30)
    ways = {**SMALL, "rank": rank, "seed": 2**63 + 5}
    expected = expected_losses((), (60, 30), tuple(ways.items()))
    assert_parity(scores(model, tokens, **ways), expected, tokens, PLACES[0])


def test_training_changes_scores_and_a_rate_of_zero_does_not(model: GPT) -> None:
    tokens = stream(200)
    still = scores(model, tokens, **{**SMALL, "lr": 0.0})
    moved = scores(model, tokens, **SMALL)
    assert np.array_equal(still[:24], moved[:24])
    assert (np.abs(still[24:] - moved[24:]) > 1e-4).mean() > 0.9
    plain = model.token_losses(tokens[None, :96], tokens[None, 1:97])[0]  # the next window does not begin at 0
    np.testing.assert_allclose(still[:96], plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float64", *(["float32"] if GPU_PLACES else [])])
def test_adapter_gradients_are_autograd_s(dtype: str) -> None:
    """After two steps, when no adapter is zero; every tensor by itself."""
    place = Place("cpu", dtype) if dtype == "float64" else Place("cuda", dtype)
    model_config = config()
    model = model_of(model_config, place)
    tokens = stream(100)
    rank, seed, chunk = 3, 11, 24
    native = _C.DocumentAdapters(model._native, 8, rank, [(64, 0), (128, 64)], seed, 0.01, 0.9, 0.95, 1e-10)
    native.begin(np.array([-1, -1, 5, *[-1] * 5], np.int32))
    expected = reference.AdaptedGPT(model_config, state_of(model_config))
    expected.begin(5, rank, seed)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected.numbers()]
    for step in range(3):
        end = (step + 1) * chunk
        length, first = (64, 0) if end <= 64 else (128, 64)
        begin = max(end - chunk, first)
        ids, targets, scored = (np.zeros((8, n), np.int32) for n in (length, length, 2))
        ids[2, :end], targets[2, :end], scored[2] = tokens[:end], tokens[1 : end + 1], (begin, end)
        steps = np.array([0, 0, step + 1, *[0] * 5], np.int32)
        model._native.wait_losses(native.window(ids, targets, scored, steps, first), 8, length - first)
        loss = expected.token_losses(tokens[None, :end], tokens[None, 1 : end + 1])[0, begin:].mean()
        gradients = torch.autograd.grad(loss, expected.numbers(), retain_graph=True)
        assert_gradients(
            native, model_config, rank, [g.numpy() for g in gradients], 1e-9 if dtype == "float64" else 1e-3
        )
        reference.adam_step(expected.numbers(), moments, loss, step + 1, 0.01)
    for index in range(model_config.num_layers + 1):
        others = np.delete(native.read(index, True), 2, axis=0)
        assert not others.any()


def assert_gradients(
    native: Any, model_config: ModelConfig, rank: int, expected: list[np.ndarray], tolerance: float
) -> None:
    layers = model_config.num_layers
    for index in range(layers + 1):
        pairs = expected[4 * index : 4 * index + 4] if index < layers else expected[4 * index :]
        wanted = [*pairs[::2], *pairs[1::2]]  # a's before b's
        found = native.read(index, True)[2]
        assert found.size == sum(g.size for g in wanted)
        at = 0
        for g in wanted:
            part = found[at : at + g.size].reshape(g.shape)
            at += g.size
            assert np.linalg.norm(part - g) <= tolerance * max(np.linalg.norm(g), 1e-6), (index, g.shape)


# Invariants -----------------------------------------------------------------------------------------------------------


def alone(model: GPT, tokens: np.ndarray, document: int, ways: dict[str, Any]) -> np.ndarray:
    every = documents_of(tokens)
    one = slice(document, document + 1)
    losses, times = score(
        model, tokens, Documents(every.index[one], every.start[one], every.targets[one]), Settings(**ways)
    )
    part = slice(every.start[document], every.start[document] + every.targets[document])
    assert times.sum() == times[part].sum() == every.targets[document]
    return losses[part]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_a_document_alone_scores_as_in_any_batch(place: Place) -> None:
    model = model_of(config(), place)
    tokens = stream(130, 7, 101, 24, 25, 48, 1, 99)
    together = scores(model, tokens, **SMALL)
    for document, start in enumerate(documents_of(tokens).start):
        found = alone(model, tokens, document, SMALL)
        assert found.tobytes() == together[start : start + found.size].tobytes(), document
    assert scores(model, tokens, **SMALL).tobytes() == together.tobytes()


@pytest.mark.parametrize("batch", [1, 3, 8, 17])
def test_on_the_cpu_batches_and_threads_leave_no_trace(model: GPT, batch: int) -> None:
    tokens = stream(130, 7, 101, 24, 25, 48, 1, 99, 130, 60)
    expected = scores(model, tokens, **SMALL)
    before = pgolf.get_num_threads()
    try:
        for threads in (1, 2, 3):
            pgolf.set_num_threads(threads)
            assert scores(model, tokens, **SMALL, batch=batch).tobytes() == expected.tobytes()
    finally:
        pgolf.set_num_threads(before)


@pytest.mark.parametrize("place", [PLACES[0], *GPU_PLACES], ids=str)
@settings(max_examples=8)
@given(position=st.integers(1, 172))
def test_a_token_changes_no_earlier_score(position: int, place: Place) -> None:
    model = SCORED.setdefault(str(place), model_of(config(), place))
    tokens = stream(20, 172)
    changed = tokens.copy()
    changed[20 + position] = 2 + (changed[20 + position] + 40) % 95
    before, after = (scores(model, t, **SMALL) for t in (tokens, changed))
    at = 20 + position - 1
    assert before[:at].tobytes() == after[:at].tobytes()
    assert before[at] != after[at]


SCORED: dict[str, GPT] = {}


def test_nothing_is_allocated_for_a_window_of_a_known_shape(model: GPT) -> None:
    native = _C.DocumentAdapters(model._native, 8, 4, [(64, 0), (128, 64)], 0, 0.01, 0.9, 0.95, 1e-10)
    native.begin(np.arange(8, dtype=np.int32))
    counts = []
    for step in range(4):
        for length, first in ((64, 0), (128, 64)):
            ids = np.full((8, length), step, np.int32)
            scored = np.tile(np.array([[first, length]], np.int32), (8, 1))
            ticket = native.window(ids, ids, scored, np.full(8, step + 1, np.int32), first)
            model._native.wait_losses(ticket, 8, length - first)
            counts.append(native.allocations)
    assert counts[2:] == [0] * 6


# Planning -------------------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(
    targets=st.lists(st.integers(1, 200), min_size=1, max_size=30),
    chunk=st.integers(1, 70),
    more=st.integers(0, 100),
    batch=st.integers(1, 9),
)
def test_a_plan_scores_every_target_once_and_trains_on_nothing_else(
    targets: list[int], chunk: int, more: int, batch: int
) -> None:
    tokens = stream(*targets)
    documents = documents_of(tokens)
    ways = Settings(chunk=chunk, context=chunk + more)
    seen = np.zeros(tokens.size - 1, int)
    chunks_done = np.zeros(len(targets), int)
    batches: list[set[int]] = []
    for part in plan(documents, ways, batch):
        window = part.window
        assert window.length % 64 == 0 and window == Window.of(part.chunk, ways)
        assert len(set(part.rows)) == part.rows.size <= batch and part.rows.max() < batch
        if part.chunk == 0:
            batches.append(set(part.documents))
        assert set(part.documents) <= batches[-1]
        for document, start, (begin, end), trains in zip(
            part.documents, part.start, part.scored, part.trains, strict=True
        ):
            first, count = documents.start[document], documents.targets[document]
            assert window.first <= begin < end <= window.length
            assert start + begin == first + chunk * part.chunk
            assert start + end == first + min(chunk * (part.chunk + 1), count)
            assert start == max(first, start + end - ways.context)
            assert trains == (start + end < first + count)
            assert chunks_done[document] == part.chunk
            chunks_done[document] += 1
            seen[start + begin : start + end] += 1
    assert (seen == 1).all()
    counts = documents.chunks(chunk)
    assert np.array_equal(chunks_done, counts)
    in_order = [document for members in batches for document in sorted(members, key=lambda d: (counts[d], d))]
    assert in_order == sorted(range(len(targets)), key=lambda d: (counts[d], d))


def test_documents_end_with_the_next_one_s_bos() -> None:
    tokens = np.array([7, 8, BOS, 9, BOS, BOS, 3, BOS])
    documents = documents_of(tokens)
    spans = [(s, s + n + 1) for s, n in zip(documents.start, documents.targets, strict=True)]
    assert spans == reference.split(tokens, BOS) == [(0, 3), (2, 5), (4, 6), (5, 8)]
    assert documents.index.tolist() == [0, 1, 2, 3]


# evaluate and the command line's keys ---------------------------------------------------------------------------------


def test_evaluate_sums_documents_and_audits(model: GPT) -> None:
    tokens = stream(130, 7, 101)
    ways = {
        f"ttt_{name}": value
        for name, value in (
            ("lora_rank", 4),
            ("lora_lr", 0.02),
            ("chunk_size", 24),
            ("eval_seq_len", 100),
            ("batch_size", 2),
        )
    }
    calls: list[tuple[int, int, int]] = []
    found = pgolf.evaluate(model, tokens, method="ttt", **ways, progress=lambda *call: calls.append(call))
    losses = scores(model, tokens, **SMALL).astype(np.float64)
    assert found.loss == pytest.approx(losses.mean(), rel=1e-12)
    assert (found.tokens, found.method, found.seq_len, found.stride, found.tail) == (238, "ttt", 100, None, None)
    assert found.windows == 6 + 1 + 5
    assert calls[-1] == (12, 12, 238) and calls[0] == (2, 12, 7 + 24)
    assert found.audit.scored_tokens == found.audit.expected_tokens == 238
    # A BOS token is the first target of the document that it begins.
    np.testing.assert_allclose(
        found.documents.nll, [losses[:129].sum(), losses[129:136].sum(), losses[136:].sum()], rtol=1e-12
    )
    assert pgolf.evaluate(model, tokens, method="ttt", **{**ways, "ttt_seed": 1}).loss != found.loss


def test_the_model_stays_as_it_is(model: GPT) -> None:
    before = model.state_dict()
    scores(model, stream(60, 40), **SMALL)
    assert all(np.array_equal(before[name], value) for name, value in model.state_dict().items())


def test_it_learns_what_repeats(model: GPT) -> None:
    """A document that repeats itself: scores fall as the adapters see it, beyond what context alone gives."""
    rng = np.random.default_rng(5)
    tokens = np.concatenate([[BOS], np.tile(rng.integers(2, 97, 24), 12)])
    ways = {**SMALL, "context": 24}
    still, moved = (scores(model, tokens, **{**ways, "lr": lr}) for lr in (0.0, 0.02))
    assert moved[-48:].mean() < still[-48:].mean() - 0.5


@pytest.mark.parametrize(
    ("ways", "error", "message"),
    [
        ({"ttt_lora_rank": 0}, ValueError, "ttt_lora_rank is 0"),
        ({"ttt_chunk_size": 2.5}, TypeError, r"ttt_chunk_size is 2\.5"),
        ({"ttt_chunk_size": 2000}, ValueError, "ttt_chunk_size is 2000; expected at most ttt_eval_seq_len = 1024"),
        ({"ttt_batch_size": 0}, ValueError, "ttt_batch_size is 0"),
        ({"ttt_lora_lr": -1.0}, ValueError, r"ttt_lora_lr is -1\.0"),
        ({"ttt_lora_lr": float("nan")}, ValueError, "ttt_lora_lr is nan"),
        ({"ttt_seed": -1}, ValueError, "ttt_seed is -1"),
        ({"ttt_seed": 0.5}, TypeError, r"ttt_seed is 0\.5; expected an integer"),
        (
            {"ttt_chunk_size": 2**17, "ttt_eval_seq_len": 2**17},
            ValueError,
            "take fewer documents or shorter chunks",
        ),
    ],
)
def test_bad_settings_are_named(model: GPT, ways: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pgolf.evaluate(model, stream(30), method="ttt", **ways)


def test_only_a_gpt_can_be_adapted(model: GPT) -> None:
    class Other:
        config, train_seq_len = model.config, 8

        def window_losses(self, ids: Any, targets: Any, first: int) -> Any: ...

    with pytest.raises(TypeError, match=r"the model a Other; test-time training takes a pgolf\.GPT"):
        pgolf.evaluate(Other(), stream(30), method="ttt")


def test_native_calls_refuse_what_does_not_fit(model: GPT) -> None:
    native = _C.DocumentAdapters(model._native, 8, 4, [(64, 0)], 0, 0.01, 0.9, 0.95, 1e-10)
    ids, scored, steps = np.zeros((8, 64), np.int32), np.zeros((8, 2), np.int32), np.ones(8, np.int32)
    with pytest.raises(ValueError, match="Row 0 trains on positions 0 to -1"):
        native.window(ids, ids, scored, steps, 0)
    with pytest.raises(ValueError, match="No window of 64 tokens that scores from position 8 on"):
        native.window(ids, ids, scored, steps, 8)
    with pytest.raises(ValueError, match=r"targets\[0, 0\] is 97"):
        native.window(ids, ids + 97, scored, steps, 0)
    with pytest.raises(ValueError, match="ids and targets"):
        native.window(ids[:4], ids[:4], scored, steps, 0)
    with pytest.raises(ValueError, match="for every row"):
        native.begin(np.zeros(3, np.int32))
    for windows, message in (([], "at least one window"), ([(64, 64)], "first scored position is 64")):
        with pytest.raises(ValueError, match=message):
            _C.DocumentAdapters(model._native, 8, 4, windows, 0, 0.01, 0.9, 0.95, 1e-10)
    with pytest.raises(ValueError, match="rank 0"):
        _C.DocumentAdapters(model._native, 8, 0, [(64, 0)], 0, 0.01, 0.9, 0.95, 1e-10)


def test_a_loss_that_is_no_number_is_an_error_that_names_the_token(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> tuple[np.ndarray, np.ndarray]:
        losses, times = score(*args)
        losses[7] = np.nan
        return losses, times

    monkeypatch.setattr("pgolf.scoring.ttt.score", broken)
    with pytest.raises(NonFiniteError, match="The loss of token 8 is nan"):
        pgolf.evaluate(model, stream(30), method="ttt", ttt_chunk_size=24, ttt_eval_seq_len=64)


def test_the_eval_table_s_keys_are_evaluate_s() -> None:
    table = Config.from_recipe("pr289", {"eval.ttt_lora_rank": 4}).eval
    assert table.ttt() == {
        "ttt_lora_rank": 4,
        "ttt_lora_lr": 0.01,
        "ttt_chunk_size": 256,
        "ttt_eval_seq_len": 1024,
        "ttt_batch_size": 64,
    }
