"""A score is of the declared data, the bound tokenizer and the text's bytes, or it is refused (docs/spec.md §5, §6)."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pgolf
from pgolf import _C
from pgolf.artifacts.artifact import read_artifact
from pgolf.artifacts.container import pack, unpack
from pgolf.cli.generate import continue_text
from pgolf.common.errors import FormatError
from pgolf.data.declared import Record
from pgolf.data.folder import find_data
from pgolf.data.manifest import Manifest
from pgolf.data.preparation import prepare
from pgolf.data.shards import read_shard, sidecar_of, write_shard
from pgolf.data.tokenizer import Tokenizer, _fields
from pgolf.model import GPT
from pgolf.runs.run_folder import RunRecord
from pgolf.scoring.evaluation import Score, ValidationData
from pgolf.submission import Settings, check
from pgolf.training.trainer import Trainer
from tests.runs import last_json, pgolf_, tiny
from tests.test_tokenizer import train

VOCAB = 330
TEXTS = [f"The {n}th quick brown fox jumps over {n * n} lazy dogs, and a café sleeps on 東 {n}." for n in range(60)]


# Tokenizers, made and forged -----------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def saved_again(source: Path, target: Path, piece: Callable[[str], str] = str, reverse: bool = False) -> Path:
    """A SentencePiece model whose pieces are renamed, as another protobuf library might write it."""
    out = []
    for number, value in _fields(source.read_bytes()):
        if number == 1:
            assert isinstance(value, bytes)
            inner = []
            for inner_number, part in _fields(value):
                if inner_number == 1:
                    inner.append(field(1, piece(part.decode()).encode()))
                elif inner_number == 2:  # a score, whose four bytes the walk gives back
                    inner.append(varint(2 << 3 | 5) + part)
                else:
                    inner.append(field(inner_number, part))
            value = b"".join(reversed(inner) if reverse else inner)
        out.append(field(number, value))
    target.write_bytes(b"".join(out))
    return target


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([source], folder / "data", vocab_size=VOCAB, val_docs=10, workers=1)
    return folder / "data"


@pytest.fixture
def data(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "data"))


def small(**changes: Any) -> Any:
    return tiny(**{"model__vocab_size": VOCAB, "iterations": 2, "warmdown_iters": 1, "swa_enabled": False, **changes})


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("run") / "run"
    trainer = Trainer(small(), prepared, run_dir=folder)
    list(trainer)
    trainer.finish()
    return folder


@pytest.fixture(scope="module")
def model(run: Path) -> GPT:
    return pgolf.load(run / "model.pgolf", device="cpu")


def score(model: GPT, data: Any, tokenizer: Any = None, **ways: Any) -> Score:
    return pgolf.evaluate(model, data, tokenizer, method="standard", seq_len=16, **ways)


def shard(data: Path, split: str = "val") -> Path:
    return data / f"pgolf_{split}_000000.bin"


# The tokenizer -------------------------------------------------------------------------------------------------------


def test_identity_is_of_pieces_types_and_normaliser(tmp_path: Path) -> None:
    one = train(tmp_path / "one.model")
    identity = Tokenizer(one).identity
    again = Tokenizer(saved_again(one, tmp_path / "again.model", reverse=True))
    assert again.identity == identity and again.sha256 != Tokenizer(one).sha256
    others = [
        saved_again(one, tmp_path / "piece.model", lambda piece: "▁thee" if piece == "▁the" else piece),
        train(tmp_path / "normalizer.model", normalization_rule_name="identity"),
        train(tmp_path / "prefix.model", add_dummy_prefix=True),
        train(tmp_path / "type.model", control_symbols=["<x>"]),
    ]
    assert len({identity, *(Tokenizer(other).identity for other in others)}) == 5


def test_another_tokenizer_is_refused_by_name_and_scored_only_when_asked(
    model: GPT, data: Path, tmp_path: Path
) -> None:
    (own,) = data.glob("*.model")
    forged = saved_again(
        own, tmp_path / "forged.model", lambda piece: f"{piece}xyz" if piece.startswith("▁") else piece
    )
    expected = score(model, data)
    assert expected.audit.tokenizer_bound is True and expected.audit.tokenizer == Tokenizer(own).identity
    with pytest.raises(ValueError, match=rf"{forged} is not the one of .*manifest\.json, which names {own.name}"):
        score(model, data, forged)
    with pytest.warns(UserWarning, match="counts the bytes all the same"):
        other = score(model, data, forged, any_tokenizer=True)
    assert other.audit.tokenizer_bound is False and other.bpb is not None and other.bpb < expected.bpb  # type: ignore[operator]
    again = saved_again(own, tmp_path / "again.model", reverse=True)
    assert score(model, data, again).bpb == expected.bpb


def test_the_artifact_names_its_tokenizer_where_the_data_does_not(
    run: Path, model: GPT, data: Path, tmp_path: Path
) -> None:
    (own,) = data.glob("*.model")
    other = saved_again(own, tmp_path / "other.model", lambda piece: "é!" if piece == "é" else piece)
    tokens = read_shard(shard(data))
    for there in (tokens, shard(data)):
        assert score(model, there, own).audit.tokenizer_bound is True
        with pytest.raises(ValueError, match=rf"{other} is not the one of .*model\.pgolf"):
            score(model, there, other)
    plain = GPT(model.config, seed=0)
    assert score(plain, tokens, other).audit.tokenizer_bound is None
    result = pgolf_("eval", run / "model.pgolf", "--data", shard(data), "--tokenizer", other, "--device", "cpu")
    assert result.exit_code == 2 and "is not the one of" in result.stderr


def test_data_that_was_read_before_is_bound_to_the_model_too(model: GPT, data: Path, tmp_path: Path) -> None:
    (own,) = data.glob("*.model")
    other = saved_again(own, tmp_path / "other.model", lambda piece: "é!" if piece == "é" else piece)
    tokens = read_shard(shard(data))
    read = {path: ValidationData.load(tokens, path, vocab_size=VOCAB) for path in (own, other)}
    assert read[own].tokenizer_bound is None
    assert score(model, read[own]).audit.tokenizer_bound is True
    with pytest.raises(ValueError, match=r"was read with a tokenizer of the identity .*model\.pgolf names"):
        score(model, read[other])
    assert score(model, read[other], any_tokenizer=True).bpb is not None


def test_a_run_is_trained_with_the_datas_tokenizer_alone(data: Path, tmp_path: Path) -> None:
    (own,) = data.glob("*.model")
    other = saved_again(own, tmp_path / "other.model", lambda piece: "é!" if piece == "é" else piece)
    with pytest.raises(ValueError, match=rf"{other} is not the one of .*manifest\.json"):
        Trainer(small(), data, tokenizer=other)


def test_a_manifest_without_identities_binds_by_the_file(model: GPT, data: Path, tmp_path: Path) -> None:
    manifest = json.loads((data / "manifest.json").read_text())
    assert manifest["tokenizer"].pop("identity") == Tokenizer(data / manifest["tokenizer"]["file"]).identity
    (data / "manifest.json").write_text(json.dumps(manifest))
    (own,) = data.glob("*.model")
    model = GPT(model.config, seed=0)  # which has no record of its own
    assert score(model, data).audit.tokenizer_bound is True
    again = saved_again(own, tmp_path / "again.model", reverse=True)
    assert score(model, data, again).audit.tokenizer_bound is True
    shutil.copy(saved_again(own, tmp_path / "forged.model", lambda piece: "é!" if piece == "é" else piece), own)
    with pytest.raises(ValueError, match="SHA-256"):
        score(model, data)


# The data ------------------------------------------------------------------------------------------------------------


def cut(path: Path, tokens: int) -> None:
    write_shard(path, read_shard(path)[:tokens].copy())


def community(data: Path, root: Path, **changes: Any) -> Path:
    """The same data as the public scripts lay it out: a manifest two above the shards, the tokenizer beside them."""
    folder = root / "datasets" / "fineweb10B_sp330"
    folder.mkdir(parents=True)
    (root / "tokenizers").mkdir()
    shutil.copy(shard(data), folder / "fineweb_val_000000.bin")
    train_tokens = read_shard(shard(data, "train"))
    half = train_tokens.size // 2 + 1
    for index, part in enumerate((train_tokens[:half], train_tokens[half:])):
        write_shard(folder / f"fineweb_train_{index:06d}.bin", part.copy())
    (own,) = data.glob("*.model")
    shutil.copy(own, root / "tokenizers" / "fineweb_330_bpe.model")
    made = Manifest.find(data)
    assert made is not None
    stats = {
        "docs_val": made.val.documents,
        "docs_train": made.train.documents,
        "files_val": 1,
        "files_train": 2,
        "tokens_val": made.val.tokens,
        "tokens_train": made.train.tokens,
    }
    values = {
        "version": "10B",
        "num_val_docs": made.val.documents,
        "shard_size": half,
        "tokenizers": [{"name": "sp_bpe_330", "model_path": "tokenizers/fineweb_330_bpe.model"}],
        "datasets": [
            {
                "name": "fineweb10B_sp330",
                "tokenizer_name": "sp_bpe_330",
                "path": "datasets/fineweb10B_sp330",
                "vocab_size": VOCAB,
                "bos_id": 1,
                "stats": {**stats, **changes},
            }
        ],
    }
    (root / "manifest.json").write_text(json.dumps(values))
    return folder


def test_declared_by_pgolf(model: GPT, data: Path) -> None:
    assert score(model, data).audit.declared_by == "pgolf"
    shard(data, "train").unlink()
    assert score(model, data).audit.declared_by == "pgolf"  # the validation split alone is enforced
    with pytest.raises(FileNotFoundError, match=r"lists the shard pgolf_train_000000\.bin, which is missing"):
        Trainer(small(), data)


def test_declared_by_the_community(model: GPT, data: Path, tmp_path: Path) -> None:
    folder = community(data, tmp_path / "export")
    expected = score(model, data)
    found = score(model, folder)
    assert found.audit.declared_by == "community" and found.audit.tokenizer_bound is True
    assert (found.loss, found.bpb) == (expected.loss, expected.bpb)
    (folder / "fineweb_train_000001.bin").unlink()
    Trainer(small(), folder)  # the first training shards alone are what most people download
    cut(folder / "fineweb_train_000000.bin", 50)
    with pytest.raises(FormatError, match=r"fineweb_train_000000\.bin: the shard has 50 tokens"):
        Trainer(small(), folder)
    assert score(model, folder).bpb == expected.bpb


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens_val": 10_000}, r"val shards hold .* tokens in all; .*manifest\.json says 10,000"),
        ({"files_val": 2}, r"there are 1 val shards; .*manifest\.json says 2"),
        ({"docs_val": 50}, r"10 documents begin in the validation shards; .*manifest\.json says 50"),
    ],
)
def test_what_the_community_declares_is_enforced(
    model: GPT, data: Path, tmp_path: Path, changes: dict[str, int], sentence: str
) -> None:
    with pytest.raises(FormatError, match=sentence):
        score(model, community(data, tmp_path / "export", **changes))


def test_the_communitys_manifest_may_lie_in_the_folder_or_three_above_and_no_higher(data: Path, tmp_path: Path) -> None:
    folder = community(data, tmp_path / "export")
    manifest = tmp_path / "export" / "manifest.json"
    deep = tmp_path / "a" / "b" / "c" / "fineweb10B_sp330"
    shutil.copytree(folder, deep)
    for place, by in (("a/b/c/fineweb10B_sp330", True), ("a/b/c", True), ("a/b", True), ("a", True), (".", False)):
        target = tmp_path / place / "manifest.json"
        shutil.copy(manifest, target)
        declaration = find_data(deep, splits=("val",)).declaration
        assert (declaration is not None) == by, place
        target.unlink()


def test_another_programs_manifest_declares_nothing(model: GPT, data: Path) -> None:
    for content in ('{"datasets": [{"name": "other", "stats": {}}, {"name": "more", "stats": {}}]}', "[1]", '{"a": 1}'):
        (data / "manifest.json").write_text(content)
        assert score(GPT(model.config, seed=0), data).audit.declared_by is None


def test_declared_by_run_and_artifact_alone(run: Path, model: GPT, data: Path) -> None:
    (data / "manifest.json").unlink()
    assert score(model, data).audit.declared_by == "artifact"
    record = RunRecord.find(run)
    assert record is not None and record.record.byte_basis == "decoded"
    assert score(model, data, record=record.record).audit.declared_by == "run"
    whole = read_shard(shard(data)).copy()
    write_shard(data / "pgolf_val_000001.bin", whole)
    with pytest.raises(FormatError, match=r"pgolf_val_000001\.bin: .*model\.pgolf does not list this val shard"):
        score(model, data)
    (data / "pgolf_val_000001.bin").unlink()
    write_shard(shard(data), np.roll(whole, 1))
    with pytest.raises(FormatError, match="but other content"):
        score(model, data)
    cut(shard(data), 300)
    with pytest.raises(FormatError, match=r"the shard has 300 tokens; .*model\.pgolf says"):
        score(model, data)
    # Shards of other names are other data, of which the record says nothing.
    shard(data).rename(data / "other_val_000000.bin")
    assert score(model, data).audit.declared_by is None


def test_an_array_and_a_single_shard_are_declared_by_nobody(model: GPT, data: Path) -> None:
    (own,) = data.glob("*.model")
    for there in (read_shard(shard(data)), shard(data)):
        found = score(model, there, own)
        assert found.audit.declared_by is None and found.bpb is not None


def test_nothing_declares_a_folder_of_shards(model: GPT, data: Path) -> None:
    (data / "manifest.json").unlink()
    found = score(GPT(model.config, seed=0), data)
    assert found.audit.declared_by is None and found.bpb is not None and found.source_bytes is None


@pytest.mark.parametrize("split", ["val", "train"])
def test_a_cut_a_copied_and_a_missing_shard_are_refused(model: GPT, data: Path, split: str) -> None:
    def refused(error: type[Exception], sentence: str) -> None:
        with pytest.raises(error, match=sentence):
            Trainer(small(), data)
        if split == "val":
            with pytest.raises(error, match=sentence):
                score(model, data)
        else:
            assert score(model, data).bpb is not None

    copy = data / f"pgolf_{split}_000001.bin"
    shutil.copy(shard(data, split), copy)
    refused(FormatError, rf"{copy.name}: .*manifest\.json does not list this {split} shard; remove it")
    copy.unlink()
    cut(shard(data, split), 200)
    refused(FormatError, rf"pgolf_{split}_000000\.bin: the shard has 200 tokens; .*manifest\.json says")
    shard(data, split).unlink()
    refused(FileNotFoundError, "which is missing")


def test_shards_of_other_text_with_the_declared_counts_are_refused(model: GPT, data: Path) -> None:
    tokens = read_shard(shard(data)).copy()
    tokens[5] = 280 if tokens[5] != 280 else 281
    write_shard(shard(data), tokens)
    with pytest.raises(FormatError, match=r"decode to .* bytes of text; .*manifest\.json says"):
        score(model, data)


# Bytes ---------------------------------------------------------------------------------------------------------------


def test_the_split_is_counted_once_whatever_the_method_scores(model: GPT, data: Path) -> None:
    made = Manifest.find(data)
    assert made is not None
    for ways in ({"method": "standard"}, {"method": "sliding", "tail": "reference"}, {"method": "ttt"}):
        found = pgolf.evaluate(model, data, **ways)  # type: ignore[arg-type]
        assert found.audit.text is not None and found.byte_basis == "decoded"
        assert found.audit.text.text_bytes == made.val.text_bytes
        assert found.source_bytes == found.audit.source_bytes == made.val.source_bytes


@pytest.mark.parametrize("renamed", ["▁", "all"])
def test_a_vocabulary_without_spaces_counts_the_texts_bytes(tmp_path: Path, renamed: str) -> None:
    model = train(tmp_path / "own.model")
    other = Tokenizer(
        saved_again(
            model,
            tmp_path / "renamed.model",
            lambda piece: piece.replace("▁", "\u2420") if renamed == "all" or piece == renamed else piece,
        )
    )
    texts = ["the quick  fox", " jumps over the lazy  dog ", "12 €"]
    tokens = np.array([token for text in texts for token in (1, *other.encode(text))])
    counted = other.stream_bytes(tokens)
    text = "".join(Tokenizer(model).decode(Tokenizer(model).encode(each)) for each in texts)
    assert counted.sum() == len(text.encode())
    assert "".join(other.decode(other.encode(each)) for each in texts) == text
    data = ValidationData.load(tokens, other, vocab_size=other.vocab_size)
    assert data.text is not None and data.text.text_bytes == len(text.encode())
    # A stream that begins inside a space's bytes: bytes that spell no character count one each.
    space = np.flatnonzero(counted[:-2] == 0)
    if space.size:
        ValidationData.load(tokens[int(space[0]) + 2 :], other, vocab_size=other.vocab_size)


@pytest.mark.parametrize(
    "options",
    [
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["quick▁brown", "the lazy", "▁dog▁sleeps"]},
        {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
        {"add_dummy_prefix": True},
        {"byte_fallback": False, "vocab_size": 90},
        {"byte_fallback": False, "vocab_size": 90, "unk_surface": "▁UNKNOWN▁"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_decoder_says_what_a_piece_counts(tmp_path: Path, options: dict[str, Any]) -> None:
    other = Tokenizer(train(tmp_path / "other.model", **options))
    texts = ["The quick brown fox jumps over the lazy dog sleeps", "12 € a day  日本", " in 1984"]
    tokens = np.array([token for text in texts for token in (1, *other.encode(text))])
    data = ValidationData.load(tokens, other, vocab_size=other.vocab_size)
    assert data.text is not None and data.target_bytes is not None
    decoded = sum(len(other.decode(other.encode(text)).encode()) for text in texts)
    assert data.text.text_bytes == decoded
    if data.text.unknown_tokens:
        assert data.text.unknown_bytes > 0
    else:
        assert data.text.target_bytes + data.text.control_spaces >= decoded


def test_losses_of_the_tokenizer_are_counted(tmp_path: Path) -> None:
    other = Tokenizer(train(tmp_path / "other.model", byte_fallback=False, vocab_size=90))
    tokens = np.array([1, *other.encode("日 the fox")])
    data = ValidationData.load(tokens, other, vocab_size=other.vocab_size)
    assert data.text is not None
    assert data.text.unknown_tokens == 1
    assert data.text.unknown_bytes == len(" ⁇ ".encode())
    assert data.text.control_spaces == 1  # behind the unknown token
    assert data.text.text_bytes == len(" ⁇  the fox".encode())


# Byte sidecars -------------------------------------------------------------------------------------------------------


def add_sidecar(data: Path) -> np.ndarray:
    """A sidecar that says twice the bytes that the tokens decode to."""
    (own,) = data.glob("*.model")
    counts = np.concatenate([[0], 2 * Tokenizer(own).stream_bytes(read_shard(shard(data)))])
    write_shard(sidecar_of(shard(data)), counts)
    return counts


def test_a_sidecar_is_the_byte_counts_and_never_tokens(model: GPT, data: Path) -> None:
    expected = score(model, data)
    counts = add_sidecar(data)
    assert sidecar_of(shard(data)).name == "pgolf_val_bytes_000000.bin"
    with pytest.warns(UserWarning, match=r"Bytes are counted over the original text.*cannot be compared"):
        found = score(model, data)
    assert (found.byte_basis, expected.byte_basis) == ("sidecar", "decoded")
    assert found.loss == expected.loss and found.audit.declared_by == "pgolf"
    assert found.bytes == 2 * (expected.bytes or 0) and found.bpb == pytest.approx((expected.bpb or 0) / 2)
    assert find_data(data).val == (shard(data),)
    with pytest.raises(ValueError, match=r"pgolf_val_bytes_000000\.bin: this is a byte sidecar"):
        score(model, sidecar_of(shard(data)))
    plain = GPT(model.config, seed=0)
    (own,) = data.glob("*.model")
    own.unlink()
    (data / "manifest.json").unlink()
    alone = score(plain, data)  # bytes without a tokenizer
    assert alone.bytes == counts[1 : 1 + alone.tokens].sum() and alone.audit.bytes_checked is False
    assert score(plain, shard(data)).byte_basis == "sidecar"


def test_sidecars_that_do_not_fit_are_refused(model: GPT, data: Path) -> None:
    counts = add_sidecar(data)
    write_shard(sidecar_of(shard(data)), counts[:-1])
    with pytest.raises(FormatError, match=r"the byte sidecar counts .* tokens; its shard has"):
        score(model, data)
    (data / "manifest.json").unlink()
    model = GPT(model.config, seed=0)
    write_shard(data / "pgolf_val_000001.bin", [1, 2, 3])
    with pytest.raises(FormatError, match=r"pgolf_val_bytes_000001\.bin: this byte sidecar is missing"):
        score(model, data)


# Documents -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data whose tokenizer has unk 0, eos 1, bos 2."""
    folder = tmp_path_factory.mktemp("other_bos")
    model = train(folder / "other.model", unk_id=0, eos_id=1, bos_id=2, pad_id=-1, vocab_size=340)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([folder / "text.jsonl"], folder / "data", tokenizer=model, val_docs=20, workers=1)
    return folder / "data"


def test_documents_begin_where_the_tokenizer_says(other_bos: Path, tmp_path: Path) -> None:
    trainer = Trainer(small(model__vocab_size=340, iterations=1), other_bos, run_dir=tmp_path / "run")
    assert trainer.config.model.bos_id == trainer.model.config.bos_id == 2
    assert trainer.validation.starts.size == 20
    list(trainer)
    report = trainer.finish()
    header, _ = read_artifact(tmp_path / "run" / "model.pgolf")
    assert header["model"]["bos_id"] == header["tokenizer"]["bos_id"] == 2
    assert report.tokenizer == header["tokenizer"]["identity"] == trainer.validation.tokenizer
    loaded = pgolf.load(tmp_path / "run" / "model.pgolf", device="cpu")
    assert pgolf.evaluate(loaded, other_bos, method="ttt").audit.documents == 20
    with pytest.raises(ValueError, match=r"model\.bos_id is 1; the tokenizer .* begins documents with the id 2"):
        Trainer(small(model__vocab_size=340, model__bos_id=1), other_bos)
    # A model that says nothing takes the tokenizer's too.
    assert (
        pgolf.evaluate(GPT(small(model__vocab_size=340).model), other_bos, stride=8, seq_len=16).audit.documents == 20
    )


def test_duplicates_are_found_whatever_the_bos_token_is(other_bos: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(other_bos, tmp_path / "data"))
    (data / "manifest.json").unlink()
    train_tokens, val_tokens = read_shard(shard(data, "train")), read_shard(shard(data))
    write_shard(shard(data, "train"), np.concatenate([train_tokens, val_tokens]))
    model = GPT(small(model__vocab_size=340).model)
    with pytest.warns(UserWarning, match="20 of 20 validation documents also stand"):
        found = pgolf.evaluate(model, data, stride=8, seq_len=16)
    assert found.audit.duplicates is not None and found.audit.duplicates.found == 20


def test_without_a_tokenizer_documents_are_unknown_and_say_so(data: Path, prepared: Path) -> None:
    tokens = read_shard(shard(data))
    model = GPT(small().model)
    found = pgolf.evaluate(model, tokens, stride=8, seq_len=16)
    assert found.documents is None and found.audit.documents is None and found.audit.duplicates is None
    with pytest.raises(ValueError, match="no BOS token is known: give the tokenizer, or set model.bos_id"):
        pgolf.evaluate(model, tokens, method="ttt")
    given = GPT(small(model__bos_id=1).model)
    assert pgolf.evaluate(given, tokens, stride=8, seq_len=16).audit.documents == 10


def test_a_tokenizer_without_bos_leaves_documents_unknown(tmp_path: Path) -> None:
    other = Tokenizer(train(tmp_path / "other.model", bos_id=-1))
    tokens = np.array(other.encode("the quick brown fox jumps over the lazy dog"))
    data = ValidationData.load(tokens, other, vocab_size=other.vocab_size, bos_id=1)
    assert data.bos_id == -1 and data.starts.tolist() == [0] and data.duplicates is None


def test_generation_begins_with_the_tokenizers_bos(other_bos: Path, tmp_path: Path) -> None:
    trainer = Trainer(small(model__vocab_size=340), other_bos, run_dir=tmp_path / "run")
    list(trainer)
    trainer.finish()
    with patched_generate() as calls:
        assert pgolf_("generate", tmp_path / "run", "--prompt", "The", "--max-new-tokens", "2").exit_code == 0
    assert calls[0]["ids"][0] == calls[0]["stop"] == 2
    nothing = Tokenizer(train(tmp_path / "other.model", bos_id=-1))
    model = GPT(small(model__vocab_size=nothing.vocab_size).model)
    with patched_generate() as calls:
        continue_text(model, nothing, "The", max_new_tokens=2)
        assert calls[0]["stop"] is None and calls[0]["ids"] == nothing.encode("The")
        with pytest.raises(ValueError, match="the prompt is empty, and the tokenizer .* has no BOS token"):
            continue_text(model, nothing, "", max_new_tokens=2)


def test_generation_takes_no_other_tokenizer(run: Path, data: Path, tmp_path: Path) -> None:
    (own,) = data.glob("*.model")
    other = saved_again(own, tmp_path / "other.model", lambda piece: "é!" if piece == "é" else piece)
    result = pgolf_("generate", run, "--tokenizer", other, "--max-new-tokens", "2")
    assert result.exit_code == 2 and f"{other} is not the one that" in result.stderr


@contextmanager
def patched_generate() -> Iterator[list[dict[str, Any]]]:
    calls: list[dict[str, Any]] = []
    generate = GPT.generate

    def recorded(self: GPT, ids: Any, **options: Any) -> Any:
        calls.append({"ids": list(ids), **options})
        return generate(self, ids, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "generate", recorded)
        yield calls


def test_a_gate_that_resets_at_bos_needs_to_know_it() -> None:
    with pytest.raises(ValueError, match=r"smear_reset_at_bos is true, but no BOS token is known"):
        GPT(small(model__smear_reset_at_bos=True).model)


# What travels with an artifact ---------------------------------------------------------------------------------------


def test_an_artifact_is_scored_as_its_run_was(prepared: Path, tmp_path: Path) -> None:
    for name, ways in {
        "reference": {"eval__tail": "reference", "eval__eval_stride": 4},
        "standard": {"eval__method": "standard", "eval__eval_seq_len": 24},
        "ttt": {
            "eval__method": "ttt",
            "eval__ttt_lora_rank": 3,
            "eval__ttt_chunk_size": 16,
            "eval__ttt_eval_seq_len": 32,
        },
    }.items():
        trainer = Trainer(small(iterations=1, **ways), prepared, run_dir=tmp_path / name)
        list(trainer)
        report = trainer.finish()
        shutil.move(tmp_path / name / "model.pgolf", tmp_path / f"{name}.pgolf")
        found = last_json(pgolf_("eval", tmp_path / f"{name}.pgolf", "--data", prepared, "--json", "--device", "cpu"))
        assert (found["method"], found["seq_len"]) == (report.score_method, report.score_seq_len)
        assert (found["stride"], found["tail"], found["tokens"]) == (
            report.score_stride,
            report.score_tail,
            report.score_tokens,
        )
        assert found["loss"] == pytest.approx(report.score_loss, rel=1e-6)
        loaded = pgolf.load(tmp_path / f"{name}.pgolf", device="cpu")
        assert pgolf.evaluate(loaded, prepared).loss == pytest.approx(report.score_loss, rel=1e-6)
        # Another method than the artifact's takes nothing of it.
        other = pgolf.evaluate(loaded, prepared, method="standard" if name != "standard" else "sliding", seq_len=99)
        assert (other.stride, other.tail) == ((64, "exact") if name == "standard" else (None, None))


def test_exports_carry_the_record_on(run: Path, model: GPT, tmp_path: Path) -> None:
    pgolf.export(model, tmp_path / "again.pgolf", policy="tiny")
    assert last_json(pgolf_("export", run, "--out", tmp_path / "cli.pgolf", "--json"))
    headers = [
        read_artifact(path)[0] for path in (run / "model.pgolf", tmp_path / "again.pgolf", tmp_path / "cli.pgolf")
    ]
    for key in ("scoring", "tokenizer", "validation", "byte_basis"):
        assert headers[0][key] is not None
        assert headers[0][key] == headers[1][key] == headers[2][key], key


def test_unknown_header_keys_are_ignored_unless_they_are_required(model: GPT, tmp_path: Path) -> None:
    pgolf.export(model, tmp_path / "a.pgolf", policy="tiny")
    header, tensors = unpack(tmp_path / "a.pgolf")
    (tmp_path / "b.pgolf").write_bytes(pack({**header, "novelty": {"a": [1]}}, tensors))
    assert "novelty" not in read_artifact(tmp_path / "b.pgolf")[0]
    pgolf.load(tmp_path / "b.pgolf", device="cpu")
    (tmp_path / "c.pgolf").write_bytes(pack({**header, "novelty": 1, "requires": ["novelty"]}, tensors))
    with pytest.raises(FormatError, match=r"c\.pgolf: the artifact can only be read by a version that knows novelty"):
        pgolf.load(tmp_path / "c.pgolf", device="cpu")
    kept = {key: header[key] for key in ("model", "train_seq_len", "steps", "tokens", "seed", "pgolf", "zstd")}
    (tmp_path / "d.pgolf").write_bytes(pack(kept, tensors))
    older = read_artifact(tmp_path / "d.pgolf")[0]
    assert older["scoring"] is older["tokenizer"] is older["requires"] is None


# A run knows its data ------------------------------------------------------------------------------------------------


def test_a_run_made_in_python_knows_its_data_from_any_folder(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared, tmp_path / "here" / "data")
    monkeypatch.chdir(tmp_path / "here")
    trainer = Trainer(small(iterations=1), data="data", run_dir="run")
    list(trainer)
    report = trainer.finish()
    for place in (tmp_path / "here", tmp_path):
        monkeypatch.chdir(place)
        found = last_json(pgolf_("eval", tmp_path / "here" / "run", "--json", "--device", "cpu"))
        assert found["loss"] == pytest.approx(report.score_loss, rel=1e-6)
        assert pgolf_("generate", tmp_path / "here" / "run", "--max-new-tokens", "3").exit_code == 0
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert pgolf_("eval", tmp_path / "there" / "run", "--device", "cpu").exit_code == 0
    shutil.rmtree(tmp_path / "there" / "data")
    result = pgolf_("eval", tmp_path / "there" / "run", "--device", "cpu")
    assert result.exit_code == 2 and "data" in result.stderr


def test_a_resumed_run_binds_what_it_was_started_with(data: Path, tmp_path: Path) -> None:
    config = small(iterations=4, checkpoint_every=2)
    for step in Trainer(config, data, run_dir=tmp_path / "run"):
        if step.step == 2:
            break
    (data / "manifest.json").unlink()
    cut(shard(data), 300)
    with pytest.raises(FormatError, match=r"the shard has 300 tokens; .*run\.json says"):
        Trainer(config, data, run_dir=tmp_path / "run", resume=True)


def test_a_run_that_goes_on_on_another_processor_says_so(data: Path, tmp_path: Path) -> None:
    config, folder = small(iterations=4, checkpoint_every=2), tmp_path / "run"
    for step in Trainer(config, data, run_dir=folder, device="cpu"):
        if step.step == 2:
            break
    record = RunRecord.find(folder)
    assert record is not None and record.device == f"cpu {_C.cpu_isa()}"
    Trainer(config, data, run_dir=folder, device="cpu", resume=True)  # on the same one, nothing is said
    replace(record, device="cpu other").write(folder)
    with pytest.warns(
        UserWarning, match=rf"was begun on cpu other and goes on on cpu {_C.cpu_isa()}: .* within rounding"
    ):
        Trainer(config, data, run_dir=folder, device="cpu", resume=True)


def test_records_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": "other"}')
    with pytest.raises(FormatError, match=r"run\.json: this is not a run's record"):
        RunRecord.find(tmp_path)
    with pytest.raises(FormatError, match=r"x\.json: its record of the data cannot be read \(tokens is 'many'\)"):
        Record.of("run", "x.json", {"validation": {"tokens": "many"}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Record.of("run", "x.json", {}).split() is None


# Checks --------------------------------------------------------------------------------------------------------------


def findings(run: Path, data: Path, **settings: Any) -> dict[str, tuple[str, str]]:
    report = check(run, Settings(data=data, **settings))
    return {finding.rule: (finding.outcome, finding.sentence) for finding in report.findings}


def test_a_check_fails_another_tokenizer(run: Path, data: Path, tmp_path: Path) -> None:
    (own,) = data.glob("*.model")
    other = saved_again(own, tmp_path / "other.model", lambda piece: "é!" if piece == "é" else piece)
    assert findings(run, data)["text-bytes"][0] == findings(run, data)["reload"][0] == "passed"
    found = findings(run, data, tokenizer=other)
    for rule in ("coverage", "text-bytes", "reload"):
        assert found[rule][0] == "failed" and f"{other} is not the one of" in found[rule][1]


def test_a_check_leaves_open_what_nobody_declares(run: Path, data: Path) -> None:
    old = Path(shutil.copytree(run, data.parent / "old"))
    (old / "run.json").unlink()
    report = json.loads((old / "report.json").read_text())
    del report["data"]
    (old / "report.json").write_text(json.dumps(report))
    header, tensors = unpack(old / "model.pgolf")
    for name in ("tokenizer", "validation", "byte_basis"):
        del header[name]
    (old / "model.pgolf").write_bytes(pack(header, tensors))
    assert findings(old, data)["coverage"][0] == findings(old, data)["text-bytes"][0] == "passed"
    (data / "manifest.json").unlink()
    for rule in ("coverage", "text-bytes"):
        outcome, sentence = findings(old, data)[rule]
        assert outcome == "unchecked" and "Nobody declares what" in sentence
    assert findings(run, data)["coverage"][0] == "passed"  # as the artifact declares


def test_a_check_does_not_compare_two_byte_bases(run: Path, data: Path) -> None:
    add_sidecar(data)
    found = findings(run, data)
    assert found["text-bytes"][0] == "failed" and "cannot be compared" in found["text-bytes"][1]
    assert found["reload"][0] == "unchecked" and "cannot be compared" in found["reload"][1]
