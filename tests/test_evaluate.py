"""evaluate(): against the reference evaluator, sums per document, batches, what it reads, and what it refuses."""

from __future__ import annotations

import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.common.errors import FormatError, NonFiniteError
from pgolf.data.shards import write_shard
from pgolf.data.tokenizer import Tokenizer
from pgolf.scoring.evaluation import ValidationData, evaluate
from tests.reference import evaluate as reference
from tests.test_tokenizer import train

# pgolf.evaluate, as an attribute of the package, is the function.
evaluation = sys.modules["pgolf.scoring.evaluation"]

VOCAB = 340
BOS = 1
SEQ_LEN = 24
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "",
    "In 1984 there were 365 days; naïve café owners paid 12 € a day.",
    " She said that she would say 日本 what she had said before.",
]


class TableModel:
    """Losses from a fixed bigram table that grow along the window, so that windows matter.

    They range so widely that float64 sums depend on their order, so that batches would leave their trace.
    """

    train_seq_len: int | None = SEQ_LEN

    def __init__(self, vocab_size=VOCAB):
        self.config = SimpleNamespace(vocab_size=vocab_size, bos_id=BOS)
        self.table = np.exp(np.random.default_rng(0).uniform(-40, 2, (vocab_size, vocab_size))).astype(np.float32)
        self.shapes = []

    def window_losses(self, ids, targets, first):
        self.shapes.append((*ids.shape, first))
        position = np.sqrt(np.arange(1, ids.shape[1] + 1, dtype=np.float32))
        return (self.table[ids, targets] * position)[:, first:]

    def token_losses(self, ids, targets):
        return torch.from_numpy(self.window_losses(ids, targets, 0))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(train(tmp_path_factory.mktemp("tokenizer") / "small.model"))


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return np.array([token for text in TEXTS for token in (BOS, *tokenizer.encode(text))])


@pytest.fixture
def folder(tokenizer, tokens, tmp_path):
    """A data folder: validation in two shards, training text of its own, the tokenizer."""
    write_shard(tmp_path / "text_val_000000.bin", tokens[:50])
    write_shard(tmp_path / "text_val_000001.bin", tokens[50:])
    write_shard(tmp_path / "text_train_000000.bin", [BOS, *tokenizer.encode("Other text.")])
    shutil.copy(tokenizer.path, tmp_path)
    return tmp_path


def reference_windows(n, method, seq_len, stride, tail):
    if method == "standard":
        return reference.standard_windows(n, seq_len)
    return reference.sliding_windows(n, seq_len, stride, tail)


@st.composite
def ways(draw):
    seq_len = draw(st.integers(1, 40))
    return {
        "method": draw(st.sampled_from(["standard", "sliding"])),
        "seq_len": seq_len,
        "stride": draw(st.integers(1, seq_len)),
        "tail": draw(st.sampled_from(["exact", "reference"])),
    }


@settings(max_examples=60, deadline=None)
@given(way=ways(), batch_seqs=st.none() | st.integers(1, 9))
def test_scores_are_the_reference_evaluators(tokenizer, tokens, way, batch_seqs):
    model = TableModel()
    score = evaluate(model, tokens, tokenizer, batch_seqs=batch_seqs, **way)
    expected = reference.evaluate(model, tokens, reference_windows(tokens.size - 1, **way), tokenizer._processor)
    assert (score.tokens, score.bytes) == (expected.tokens, expected.bytes)
    assert score.loss == pytest.approx(expected.loss, rel=1e-13)
    assert score.bpb == pytest.approx(expected.bpb, rel=1e-13)


@settings(max_examples=40, deadline=None)
@given(way=ways())
def test_documents_are_sums_over_their_own_targets(tokenizer, tokens, way):
    score = evaluate(TableModel(), tokens, tokenizer, **way)
    counted = reference.target_bytes(tokenizer._processor, tokens)
    nll, count, size = np.zeros(len(TEXTS)), [0] * len(TEXTS), [0] * len(TEXTS)
    for start, length, first in reference_windows(tokens.size - 1, **way):
        part = slice(start, start + length), slice(start + 1, start + length + 1)
        losses = TableModel().window_losses(tokens[None, part[0]], tokens[None, part[1]], first)[0]
        for target, loss in zip(range(start + first, start + length), losses, strict=True):
            document = int((tokens[: target + 2] == BOS).sum()) - 1
            nll[document] += float(loss)
            count[document] += 1
            size[document] += int(counted[target])
    np.testing.assert_allclose(score.documents.nll, nll, rtol=1e-12)
    assert score.documents.tokens.tolist() == count
    assert score.documents.bytes.tolist() == size
    assert (sum(count), sum(size)) == (score.tokens, score.bytes)
    assert score.documents.nll.sum() == pytest.approx(score.loss * score.tokens, rel=1e-12)


def test_a_bos_token_is_the_first_target_of_its_document_and_the_first_token_none():
    score = evaluate(TableModel(), [BOS, 10, 11, BOS, 12, BOS], method="sliding", seq_len=4, stride=2)
    assert score.documents.tokens.tolist() == [2, 2, 1]
    assert evaluate(TableModel(), [10, BOS, 12], seq_len=4, stride=2).documents.tokens.tolist() == [0, 2]


@pytest.mark.parametrize("tail", ["exact", "reference"])
def test_batches_leave_no_trace_in_any_bit(tail):
    tokens = np.random.default_rng(1).integers(0, VOCAB, 3000)
    scores = [evaluate(TableModel(), tokens, stride=5, tail=tail, batch_seqs=n) for n in (1, 2, 3, 7, 100, None)]
    for score in scores:
        assert score.loss == scores[0].loss
        np.testing.assert_array_equal(score.documents.nll, scores[0].documents.nll)


def test_a_batch_holds_only_windows_of_one_shape(tokens):
    model = TableModel()
    score = evaluate(model, tokens, stride=10, tail="reference", batch_seqs=4)
    assert sum(shape[0] for shape in model.shapes) == score.windows
    assert model.shapes[0] == (1, SEQ_LEN, 0)
    assert model.shapes[1] == (4, SEQ_LEN, SEQ_LEN - 10)
    assert {length - first for _, length, first in model.shapes[1:]} == {10}


class LaterModel(TableModel):
    """A model whose losses come later, as those of one on a GPU."""

    device = "cuda"

    def window_losses_later(self, ids, targets, first):
        losses = self.window_losses(ids, targets, first)
        return lambda: losses


def test_on_a_gpu_the_last_batch_is_filled_up_to_the_size_of_the_others(tokens):
    plain, later = TableModel(), LaterModel()
    expected, score = (evaluate(m, tokens, stride=7, batch_seqs=4) for m in (plain, later))
    assert (score.loss, score.tokens, score.windows) == (expected.loss, expected.tokens, expected.windows)
    assert np.array_equal(score.documents.nll, expected.documents.nll)
    for first in {first for *_, first in plain.shapes}:
        batches = [batch for batch, _, at in plain.shapes if at == first]
        assert [batch for batch, _, at in later.shapes if at == first] == [batches[0]] * len(batches)
    assert plain.shapes != later.shapes


def test_the_default_batch_holds_about_as_many_tokens_whatever_the_windows_length(tokens, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 3 * SEQ_LEN + 1)
    model = TableModel()
    evaluate(model, tokens, method="standard")
    assert model.shapes[0] == (3, SEQ_LEN, 0)
    evaluate(model, tokens, method="standard", seq_len=tokens.size - 1)
    assert model.shapes[-1] == (1, tokens.size - 1, 0)


def test_progress_counts_windows_and_tokens(tokens):
    calls = []
    score = evaluate(TableModel(), tokens, stride=5, batch_seqs=3, progress=lambda *call: calls.append(call))
    assert calls[-1] == (score.windows, score.windows, score.tokens)
    assert calls[0] == (1, score.windows, SEQ_LEN)
    assert calls[1] == (4, score.windows, SEQ_LEN + 15)


def test_long_sums_keep_float64_precision():
    model = TableModel(2)
    model.table[:] = np.float32(0.1)
    model.window_losses = lambda ids, targets, first: model.table[ids, targets][:, first:]
    score = evaluate(model, np.zeros(1_000_001, dtype=np.int64), method="standard", seq_len=1000)
    assert score.loss == pytest.approx(float(np.float32(0.1)), rel=1e-14)


def test_without_a_tokenizer_there_are_no_bytes(tokens):
    score = evaluate(TableModel(), tokens, stride=8)
    assert (score.bpb, score.bytes, score.documents.bytes, score.audit.bytes_checked) == (None, None, None, False)
    assert score.tokens == score.audit.scored_tokens == score.audit.expected_tokens == tokens.size - 1


def test_the_score_says_how_it_was_made(tokenizer, tokens):
    score = evaluate(TableModel(), tokens, tokenizer, stride=8)
    assert (score.method, score.seq_len, score.stride, score.tail) == ("sliding", SEQ_LEN, 8, "exact")
    assert score.bpb == pytest.approx(score.loss * score.tokens / math.log(2) / score.bytes, rel=1e-14)
    assert score.bytes == len("".join(TEXTS).encode()) - 1  # The space after the last BOS is not counted.
    assert score.audit.bytes_checked
    assert score.audit.documents == len(TEXTS)
    assert score.audit.duplicates is None
    assert score.seconds > 0
    score = evaluate(TableModel(), tokens, method="standard")
    assert (score.method, score.stride, score.tail) == ("standard", None, None)


def test_a_folder_brings_its_shards_its_tokenizer_and_its_training_text(folder, tokenizer, tokens):
    score = evaluate(TableModel(), folder, stride=8)
    alone = evaluate(TableModel(), tokens, tokenizer.path, stride=8)
    assert (score.loss, score.bpb, score.tokens) == (alone.loss, alone.bpb, alone.tokens)
    assert (score.audit.duplicates.found, score.audit.duplicates.looked_up) == (0, 3)
    shard = evaluate(TableModel(), folder / "text_val_000000.bin", stride=8)
    assert (shard.tokens, shard.bpb, shard.audit.duplicates) == (49, None, None)


def test_validation_documents_in_the_training_shards_are_a_warning(folder, tokenizer):
    write_shard(folder / "text_train_000001.bin", [BOS, *tokenizer.encode(TEXTS[2]), BOS, 9])
    with pytest.warns(UserWarning, match="1 of 3 validation documents also stand in the training shards") as warned:
        score = evaluate(TableModel(), folder, stride=8)
    assert warned[0].filename == __file__
    assert score.audit.duplicates.found == 1


def test_a_full_audit_looks_up_every_document(folder, monkeypatch):
    monkeypatch.setattr("pgolf.scoring.audit.SAMPLED_DOCUMENTS", 2)
    duplicates = {
        way: evaluate(TableModel(), folder, stride=8, audit=way).audit.duplicates for way in ("sample", "full")
    }
    assert (duplicates["sample"].looked_up, duplicates["sample"].complete) == (2, False)
    assert (duplicates["full"].looked_up, duplicates["full"].complete) == (3, True)


def test_loaded_data_is_scored_again_without_reading(folder):
    data = ValidationData.load(folder, vocab_size=VOCAB)
    expected = evaluate(TableModel(), folder, stride=8)
    for path in folder.iterdir():
        path.unlink()
    score = evaluate(TableModel(), data, stride=8)
    assert (score.loss, score.bpb, score.audit) == (expected.loss, expected.bpb, expected.audit)


def test_a_wrong_byte_table_is_found(tokenizer, tokens):
    class Forgetful(Tokenizer):
        def target_bytes(self, prev_ids, target_ids):
            return self.byte_table.base_bytes[target_ids]

    with pytest.raises(ValueError, match="wrong byte count: the tokens of validation document 0"):
        evaluate(TableModel(), tokens, Forgetful(tokenizer.path), stride=8)


def test_a_wrong_plan_is_found(tokens, monkeypatch):
    right = evaluation.sliding_windows
    monkeypatch.setattr(evaluation, "sliding_windows", lambda n, *rest: right(n - 3, *rest))
    with pytest.raises(ValueError, match=r"wrong number of scores: .* in validation document 3, scored 0 times"):
        evaluate(TableModel(), tokens, stride=8)


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (np.inf, "inf")])
def test_a_loss_that_is_no_number_is_an_error_that_names_the_token(value, shown):
    model = TableModel()
    model.table[7, 9] = value
    with pytest.raises(NonFiniteError, match=f"The loss of token 4 is {shown}"):
        evaluate(model, [1, 5, 6, 7, 9, 7], method="sliding", seq_len=3, stride=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "ttt"}, TypeError, "method is 'ttt' and the model a TableModel"),
        ({"method": "slide"}, ValueError, "method is 'slide'; expected one of 'standard', 'sliding', 'ttt'"),
        ({"stride": SEQ_LEN + 1}, ValueError, "stride is 25; expected at most"),
        ({"stride": 0}, ValueError, "stride is 0"),
        ({"tail": "none"}, ValueError, "tail is 'none'; expected one of 'exact', 'reference'"),
        ({"seq_len": 0}, ValueError, "seq_len is 0"),
        ({"seq_len": 2.5}, TypeError, "seq_len is 2.5"),
        ({"batch_seqs": 0}, ValueError, "batch_seqs is 0"),
        ({"batch_seqs": "8"}, TypeError, "batch_seqs is '8'; expected an integer"),
        ({"audit": "none"}, ValueError, "audit is 'none'; expected one of 'sample', 'full'"),
        ({"method": "standard", "seq_len": 1000}, ValueError, "standard windows of seq_len 1,000 need at least 1,000"),
        ({"tail": "reference", "seq_len": 1000}, ValueError, "reference tail of seq_len 1,000 need at least 1,000"),
    ],
)
def test_bad_arguments_are_named(tokens, arguments, error, message):
    with pytest.raises(error, match=message):
        evaluate(TableModel(), tokens, **{"stride": 8, **arguments})


def test_a_model_without_a_training_length_needs_seq_len(tokens):
    model = TableModel()
    model.train_seq_len = None
    with pytest.raises(ValueError, match="seq_len is None and the model has no training length"):
        evaluate(model, tokens)
    assert evaluate(model, tokens, seq_len=16, stride=4).seq_len == 16


def test_bad_data_is_named(tokenizer, tokens, folder):
    with pytest.raises(ValueError, match=f"{tokenizer.path} has 340 tokens; the model has 512"):
        evaluate(TableModel(512), tokens, tokenizer)
    with pytest.raises(ValueError, match="range from .* to 340"):
        evaluate(TableModel(), [1, 340], stride=8)
    with pytest.raises(FormatError, match="text_val_000000"):
        evaluate(TableModel(100), folder / "text_val_000000.bin", stride=8)
    with pytest.raises(ValueError, match="The data has 1 token; expected at least 2"):
        evaluate(TableModel(), [1], stride=8)
    with pytest.raises(FileNotFoundError, match="missing"):
        evaluate(TableModel(), folder / "missing", stride=8)
    with pytest.raises(FileNotFoundError, match=r"missing\.model"):
        evaluate(TableModel(), tokens, folder / "missing.model", stride=8)
    with pytest.raises(ValueError, match="stand for no text at all"):
        evaluate(TableModel(), [1, 1, 2], tokenizer, stride=8)


def test_loaded_data_fits_only_its_own_model(tokenizer, tokens):
    data = ValidationData.load(tokens, tokenizer, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="vocabulary of 340 with BOS 1; the model has 512 with BOS 1"):
        evaluate(TableModel(512), data, stride=8)
    with pytest.raises(ValueError, match="tokenizer is given twice"):
        evaluate(TableModel(), data, tokenizer, stride=8)


def test_a_model_that_returns_another_shape_is_an_error(tokens):
    model = TableModel()
    model.window_losses = lambda ids, targets, first: np.zeros(ids.shape)
    with pytest.raises(ValueError, match=r"window_losses returned shape \(\d+, 24\); expected \(\d+, 8\)"):
        evaluate(model, tokens, stride=8)
