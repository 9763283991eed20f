"""The score audit: what it accepts, and that every kind of wrong count is found and its document named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.data.shards import write_shard
from pgolf.data.tokenizer import Tokenizer
from pgolf.scoring import audit
from pgolf.scoring.audit import (
    Duplicates,
    check_bytes,
    check_scores,
    defined_scores,
    document_starts,
    find_duplicates,
    per_document,
)
from pgolf.scoring.windows import sliding_windows, standard_windows
from tests.test_tokenizer import train

BOS = 1
OPTIONS = {
    "recipes": {},
    "no byte fallback": {"byte_fallback": False, "vocab_size": 90},
    "dummy prefix": {"add_dummy_prefix": True},
    "spaces kept": {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    "own unknown": {"byte_fallback": False, "vocab_size": 90, "unk_surface": "unknown"},
}


@pytest.fixture(scope="module", params=OPTIONS)
def tokenizer(request, tmp_path_factory):
    return Tokenizer(train(tmp_path_factory.mktemp("tokenizer") / "any.model", **OPTIONS[request.param]))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return Tokenizer(train(tmp_path_factory.mktemp("tokenizer") / "small.model"))


def stream(tokenizer, texts):
    return np.array([token for text in texts for token in (BOS, *tokenizer.encode(text))], dtype=np.uint16)


def audit_bytes(tokenizer, tokens, target_bytes=None):
    if target_bytes is None:
        target_bytes = tokenizer.target_bytes(tokens[:-1], tokens[1:])
    check_bytes(tokens, target_bytes, document_starts(tokens, BOS), tokenizer)
    return target_bytes


def test_documents_begin_at_bos_tokens_and_at_the_beginning():
    assert document_starts(np.array([1, 5, 1, 1, 6]), BOS).tolist() == [0, 2, 3]
    assert document_starts(np.array([5, 1, 6]), BOS).tolist() == [0, 1]
    assert document_starts(np.array([5, 6]), BOS).tolist() == [0]


@given(st.lists(st.integers(1, 4), min_size=2, max_size=40))
def test_sums_per_document_are_those_of_a_loop(tokens):
    starts = document_starts(np.array(tokens), BOS)
    values = np.arange(1, len(tokens))
    expected = [0] * starts.size
    for target, value in enumerate(values.tolist()):
        expected[int((starts <= target + 1).sum()) - 1] += value
    assert per_document(values, starts).tolist() == expected


@settings(max_examples=40)
@given(
    texts=st.lists(
        st.text(max_size=30) | st.sampled_from(["  two  ", "the dog 12 €", "naïve 日本 🙂 ", ""]), min_size=1
    )
)
def test_encoded_text_passes(tokenizer, texts):
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    tokens = stream(tokenizer, [*texts, "end"])
    counted = audit_bytes(tokenizer, tokens)
    assert counted.sum() > 0


@settings(max_examples=60)
@given(data=st.data())
def test_any_tokens_pass_where_bytes_make_characters(tokenizer, data):
    whole = [i for i in range(tokenizer.vocab_size) if not tokenizer.decode([i]).count("\ufffd")]
    tokens = data.draw(st.lists(st.sampled_from(whole) | st.integers(0, 3), min_size=2, max_size=60))
    audit_bytes(tokenizer, np.array(tokens))


@settings(max_examples=60)
@given(data=st.data())
def test_one_wrong_count_is_found_and_its_document_named(tokenizer, data):
    tokens = stream(tokenizer, ["the quick brown dog", " sleeps on", "", "She said 1984"])
    counted = audit_bytes(tokenizer, tokens)
    target = data.draw(st.integers(0, counted.size - 1))
    counted[target] += data.draw(st.sampled_from([-1, 1, 2, 100]))
    document = int((tokens[: target + 2] == BOS).sum()) - 1
    with pytest.raises(ValueError, match=rf"validation document {document} \(from token .*\) count .* bytes"):
        audit_bytes(tokenizer, tokens, counted)


def test_a_table_that_forgets_the_spaces_is_found(small):
    tokens = stream(small, ["fox", "the quick brown fox"])
    with pytest.raises(ValueError, match=r"document 1 \(from token .*small\.model") as error:
        audit_bytes(small, tokens, small.byte_table.base_bytes[tokens[1:]])
    assert "count 16 bytes, but their text has 19 bytes of UTF-8, of which unknown and control tokens explain 0" in str(
        error.value
    )


def test_a_table_that_takes_all_tokens_for_control_tokens_is_found(small):
    tokens = stream(small, ["the quick brown fox"])
    with pytest.raises(ValueError, match="document 0"):
        audit_bytes(small, tokens, np.zeros(tokens.size - 1, dtype=np.int64))


def test_another_tokenizers_bytes_are_found(small, tmp_path):
    other = Tokenizer(train(tmp_path / "other.model", vocab_size=345))
    tokens = stream(small, ["the quick brown fox jumps over the lazy dog"])
    with pytest.raises(ValueError, match=r"The counts are not those of the tokenizer .*other\.model"):
        audit_bytes(other, tokens, small.target_bytes(tokens[:-1], tokens[1:]))


def test_bytes_that_spell_no_character_count_one_each_wherever_documents_are_cut(small):
    tokens = stream(small, ["", "🙂 fox 🙂"])
    assert len(small.encode("🙂")) >= 4
    fox = stream(small, ["fox"])
    for cut in (1, 2, 3):
        for parts in ([tokens[1 + cut :]], [tokens[:-cut]], [tokens[:-cut], fox], [fox, tokens[:1], tokens[1 + cut :]]):
            cut_tokens = np.concatenate(parts)
            counted = audit_bytes(small, cut_tokens)
            spelled = sum(small.byte_table.base_bytes[cut_tokens[1:]])
            assert spelled <= counted.sum() <= spelled + 2


@st.composite
def methods(draw):
    length = draw(st.integers(1, 30))
    return (
        draw(st.integers(length, 300)),
        draw(st.sampled_from(["standard", "sliding"])),
        length,
        draw(st.integers(1, length)),
        draw(st.sampled_from(["exact", "reference"])),
    )


@given(methods())
def test_the_definition_in_closed_form_agrees_with_the_window_plans(case):
    n, method, length, stride, tail = case
    plan = standard_windows(n, length) if method == "standard" else sliding_windows(n, length, stride, tail)
    times = np.zeros(n, dtype=np.int32)
    for start, size, first in zip(plan.start, plan.length, plan.first_scored, strict=True):
        times[start + first : start + size] += 1
    np.testing.assert_array_equal(times, defined_scores(n, method, length, stride, tail))


def test_the_books_have_as_many_scores_as_the_public_script_gives():
    # One window of 2,048 targets and 17,215 that score 64 each, of 538 · 2,048 = 1,101,824 targets.
    assert defined_scores(1_103_510, "sliding", 2048, 64, "reference").sum() == 2048 + 17_215 * 64
    assert defined_scores(1_103_510, "standard", 2048, 64, "exact").sum() == 1_101_824


@given(st.integers(0, 19), st.sampled_from([-1, 1]))
def test_a_wrong_number_of_scores_is_found_and_its_document_named(target, change):
    starts = np.array([0, 5, 12])
    times = defined_scores(20, "sliding", 4, 2, "exact")
    expected = times.copy()
    check_scores(times, expected, starts)
    times[target] += change
    document = int((starts <= target + 1).sum()) - 1
    with pytest.raises(
        ValueError, match=rf"{20 + change} were given and the method defines 20; .* document {document},"
    ):
        check_scores(times, expected, starts)


def as_stream(documents):
    return np.array([token for document in documents for token in (BOS, *document)], dtype=np.uint16)


documents = st.lists(st.lists(st.integers(2, 4), max_size=3), min_size=1, max_size=12)


@settings(max_examples=60)
@given(validation=documents, training=documents, cuts=st.lists(st.integers(1, 40), max_size=3))
def test_duplicates_are_those_of_a_loop_however_the_shards_are_cut(tmp_path_factory, validation, training, cuts):
    folder = tmp_path_factory.mktemp("shards")
    parts = [part for part in np.split(as_stream(training), sorted(set(cuts))) if part.size]
    paths = [folder / f"a_train_{index:06}.bin" for index in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        write_shard(path, part)
    tokens = as_stream(validation)
    texts = [document for document in validation if document]
    result = find_duplicates(tokens, document_starts(tokens, BOS), paths, BOS, full=True)
    found = sum(document in training for document in texts)
    assert result == Duplicates(found, len(texts), sum(1 for document in training if document), complete=True)


def test_a_sample_is_spread_over_the_documents_and_the_shards(tmp_path, monkeypatch):
    validation = [[2, index] for index in range(2, 22)]
    tokens = as_stream(validation)
    paths = [tmp_path / "a_train_0.bin", tmp_path / "a_train_1.bin"]
    # Each shard's first 9 tokens hold 2 documents and the beginning of one that may go on and must not count.
    write_shard(paths[0], as_stream([validation[0], [9, 9, 9], [2, 10, 30], validation[10]]))
    write_shard(paths[1], as_stream([validation[5], validation[1], validation[10], validation[15]]))
    monkeypatch.setattr(audit, "SAMPLED_DOCUMENTS", 4)
    monkeypatch.setattr(audit, "SAMPLED_TOKENS", 18)
    starts = document_starts(tokens, BOS)
    assert find_duplicates(tokens, starts, paths, BOS) == Duplicates(2, 4, 4, complete=False)
    monkeypatch.setattr(audit, "SAMPLED_DOCUMENTS", 20)
    assert find_duplicates(tokens, starts, paths, BOS) == Duplicates(3, 20, 4, complete=False)
    assert find_duplicates(tokens, starts, paths, BOS, full=True) == Duplicates(5, 20, 8, complete=True)


def test_what_stands_before_the_first_bos_token_is_no_document(tmp_path):
    path = tmp_path / "a_train_0.bin"
    write_shard(path, [7, 8, 1, 7, 8])
    assert find_duplicates(np.array([7, 8, 1, 5]), np.array([0, 2]), [path], BOS).looked_up == 1
    assert find_duplicates(np.array([1, 7, 8]), np.array([0]), [path], BOS) == Duplicates(1, 1, 1, complete=True)
