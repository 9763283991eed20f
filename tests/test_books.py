"""Real text: 76 MB of English books, prepared with their own tokenizer, give exactly the published token counts.

The text is not part of the repository. It is looked for in $PGOLF_BOOKS, in data/books and beside the repository; where
there is none, and only then, these tests are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pgolf.data.folder import find_data, load_tokens
from pgolf.data.preparation import PrepareReport, prepare
from pgolf.data.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
FILES = ("books.jsonl.zst", "books_1024_bpe.model")
VAL_DOCS = 512
VAL_TOKENS = 1_103_511
TRAIN_TOKENS = 26_429_292


def books_folder() -> Path | None:
    folders = [ROOT / "data" / "books", ROOT.parent / "shared" / "data"]
    if "PGOLF_BOOKS" in os.environ:
        folders.insert(0, Path(os.environ["PGOLF_BOOKS"]))
    return next((folder for folder in folders if all((folder / name).is_file() for name in FILES)), None)


@pytest.fixture(scope="module")
def books() -> Path:
    folder = books_folder()
    if folder is None:
        pytest.skip(f"the books ({' and '.join(FILES)}) are neither in $PGOLF_BOOKS nor in {ROOT / 'data' / 'books'}")
    return folder


@pytest.fixture(scope="module")
def prepared(books: Path, tmp_path_factory: pytest.TempPathFactory) -> PrepareReport:
    out = tmp_path_factory.mktemp("books") / "prepared"
    return prepare(books / FILES[0], out, tokenizer=books / FILES[1], val_docs=VAL_DOCS, workers=2)


def test_the_token_counts_are_the_published_ones(prepared: PrepareReport) -> None:
    assert (prepared.manifest.val.tokens, prepared.manifest.train.tokens) == (VAL_TOKENS, TRAIN_TOKENS)
    assert (prepared.manifest.val.documents, prepared.manifest.train.documents) == (VAL_DOCS, 12_464)


def test_the_byte_table_agrees_with_the_decoded_text(prepared: PrepareReport) -> None:
    tokenizer = Tokenizer(prepared.path / FILES[1])
    tokens = load_tokens(prepared.path, vocab_size=tokenizer.vocab_size)
    assert int((tokens == tokenizer.bos_id).sum()) == VAL_DOCS
    assert tokenizer.target_bytes(tokens[:-1], tokens[1:]).sum() == prepared.manifest.val.text_bytes


def test_the_folder_is_a_data_folder(prepared: PrepareReport) -> None:
    found = find_data(prepared.path)
    assert found.manifest == prepared.manifest
    assert found.tokenizer is not None and Tokenizer(found.tokenizer).sha256 == prepared.manifest.tokenizer.sha256
