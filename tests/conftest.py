"""Fixtures that several files share: real text, prepared once a session."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import pgolf
from pgolf.data.prepare import prepare

CORPUS_VOCAB = 512


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of the built-in corpus with a tokenizer of CORPUS_VOCAB pieces: about a million tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    prepare([], folder, builtin=True, vocab_size=CORPUS_VOCAB, workers=1)
    return folder


@pytest.fixture(scope="session")
def small_corpus(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with 20,000 training tokens and 2,000 validation tokens."""
    folder = tmp_path_factory.mktemp("small_corpus")
    for split, tokens in (("train", 20_000), ("val", 2_000)):
        (shard,) = corpus.glob(f"*_{split}_*.bin")
        pgolf.write_shard(folder / shard.name, pgolf.read_shard(shard)[:tokens])
    (tokenizer,) = corpus.glob("*.model")
    shutil.copy(tokenizer, folder)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, the fastest for tiny models; a test may set another number. Puts the old one back."""
    count = pgolf.get_num_threads()
    pgolf.set_num_threads(1)
    yield
    pgolf.set_num_threads(count)
