"""Tokenizers: the byte table of docs/spec.md §5 against decoded text, and what is refused."""

from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from pgolf.common import errors
from pgolf.data.tokenizer import Tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "In 1984 there were 365 days; naïve café owners paid 12 € a day.",
    "She said that she would say what she had said before.",
] * 20


def train(path: Path, **options: object) -> Path:
    """A small SentencePiece model with the settings of docs/spec.md §6, unless options say otherwise."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 340,
        "byte_fallback": True,
        "split_digits": True,
        "add_dummy_prefix": False,
        "normalization_rule_name": "nmt_nfkc",
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_writer=model, **{**settings, **options})
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(train(tmp_path_factory.mktemp("tokenizer") / "small.model"))


def test_attributes_are_the_models_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 340
    assert tokenizer.bos_id == 1
    assert tokenizer.normalizer == "nmt_nfkc"
    assert tokenizer.add_dummy_prefix is False
    assert tokenizer.sha256 == hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()


def test_normalizer_and_dummy_prefix_of_other_models(tmp_path: Path) -> None:
    path = train(tmp_path / "a.model", normalization_rule_name="identity", add_dummy_prefix=True, bos_id=-1)
    other = Tokenizer(path)
    assert (other.normalizer, other.add_dummy_prefix, other.bos_id) == ("identity", True, -1)


def test_encode_and_decode_are_sentencepieces(tokenizer: Tokenizer) -> None:
    plain = SentencePieceProcessor(model_file=str(tokenizer.path))
    ids = tokenizer.encode(TEXT[1])
    assert ids == plain.encode(TEXT[1])
    assert tokenizer.decode(ids) == TEXT[1]
    assert tokenizer.decode(np.array([1, *ids, 2], dtype=np.uint16)) == TEXT[1]
    assert tokenizer.decode([]) == ""


def test_byte_table_has_every_kind_of_token(tokenizer: Tokenizer) -> None:
    plain = SentencePieceProcessor(model_file=str(tokenizer.path))
    base, space, boundary = tokenizer.byte_table
    assert (base.dtype, space.dtype, boundary.dtype) == (np.int16, np.bool_, np.bool_)
    assert boundary[:4].all() and not boundary[4:].any()
    assert base[:4].tolist() == [0, 0, 0, 0]
    assert (base[4:260] == 1).all() and not space[:260].any()
    word = plain.piece_to_id("▁the")
    assert word > 3 and (base[word], space[word]) == (3, True)
    lone_space = plain.piece_to_id("▁")
    assert (base[lone_space], space[lone_space]) == (0, True)
    accented = plain.piece_to_id("é")
    assert accented > 3 and (base[accented], space[accented]) == (2, False)


def test_unused_pieces_count_nothing_and_are_boundaries(tokenizer: Tokenizer, tmp_path: Path) -> None:
    # A piece's type is its protobuf field 3; the first normal piece is made UNUSED (5) by hand.
    plain = SentencePieceProcessor(model_file=str(tokenizer.path))
    token = plain.piece_to_id("▁the")
    piece = "▁the".encode()
    model = tokenizer.path.read_bytes()
    start = model.index(b"\x0a" + bytes([len(piece)]) + piece)
    length = model[start - 1]
    (tmp_path / "unused.model").write_bytes(
        model[: start - 1] + bytes([length + 2]) + model[start : start + length] + b"\x18\x05" + model[start + length :]
    )
    base, space, boundary = Tokenizer(tmp_path / "unused.model").byte_table
    assert (base[token], space[token], boundary[token]) == (0, False, True)


@given(text=st.text(st.characters(codec="utf-8"), max_size=60))
def test_target_bytes_sum_to_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.bos_id, *tokenizer.encode("the end"), 2]
    counts = tokenizer.target_bytes(ids[:-1], ids[1:])
    # Byte tokens that spell no character come back as replacement characters; text that was encoded has none.
    assert counts.sum() == len(tokenizer.decode(ids[1:]).encode())


def test_space_after_a_boundary_counts_nothing(tokenizer: Tokenizer) -> None:
    the = tokenizer.encode("a the")[-1]
    assert tokenizer.byte_table.has_leading_space[the]
    assert tokenizer.target_bytes([1, the], [the, the]).tolist() == [3, 4]
    assert tokenizer.target_bytes([[3, 100]], [[the, 2]]).tolist() == [[3, 0]]
    assert tokenizer.target_bytes([1], [the]).dtype == np.int64


@pytest.mark.parametrize("bad", [[-1], [340], [5, 10**6]])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, bad: list[int]) -> None:
    with pytest.raises(IndexError, match=r"0 to 339"):
        tokenizer.decode(bad)
    with pytest.raises(IndexError, match=r"0 to 339"):
        tokenizer.target_bytes(bad, bad)


def test_wrong_arguments_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match="float64"):
        tokenizer.decode([0.5])
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        tokenizer.decode([[4, 5]])
    with pytest.raises(ValueError, match=r"\(1,\).*\(2,\)"):
        tokenizer.target_bytes([4], [4, 5])
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("\ud800")
    with pytest.raises(TypeError, match="bytes"):
        tokenizer.encode(b"text")  # type: ignore[arg-type]


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.model: no such tokenizer"):
        Tokenizer(tmp_path / "absent.model")


@pytest.mark.parametrize(
    "content", [b"", b"hello, I am text\n" * 50, b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x7f", b"\x00" * 64]
)
def test_files_that_are_no_models_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(errors.FormatError, match=r"bad\.model: this is not a SentencePiece model"):
        Tokenizer(path)


def test_damaged_models_are_refused_or_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = tokenizer.path.read_bytes()
    draw = random.Random(0)
    path = tmp_path / "damaged.model"
    refused = 0
    for _ in range(100):
        damaged = bytearray(model[: draw.choice([len(model), draw.randrange(len(model))])])
        for _ in range(3):
            damaged[draw.randrange(min(len(damaged), 6000))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            assert len(Tokenizer(path).byte_table.base_bytes) > 0
        except errors.FormatError:
            refused += 1
    assert refused > 50
