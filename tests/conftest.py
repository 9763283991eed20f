"""Fixtures that several files share: real text, prepared once a session."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

import pgolf
from pgolf.data.preparation import prepare
from tests.places import GPU

CORPUS_VOCAB = 512

pytest.register_assert_rewrite("tests.cases", "tests.runs")  # so that their assertions tell what they compared

collect_ignore = [] if GPU else ["test_cuda.py"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine takes longer than Hypothesis's 200 ms for an example that is right.
settings.register_profile("unhurried", settings(), deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What pgolf measures of this machine stays out of the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGOLF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


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


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run of 16 steps on `small_corpus`."""
    from tests.runs import INTERRUPTIBLE  # which needs this file's CORPUS_VOCAB

    path = tmp_path_factory.mktemp("config") / "small.toml"
    path.write_text(INTERRUPTIBLE)
    return path


@pytest.fixture(scope="session")
def plain(config_file: Path, small_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run, which nothing ever stopped and under which nothing failed."""
    from tests.runs import pgolf_

    folder = tmp_path_factory.mktemp("runs") / "plain"
    result = pgolf_("train", "--config", config_file, "--data", small_corpus, "--run-dir", folder)
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread, the fastest for tiny models; a test may set another number. Puts the old one back."""
    count = pgolf.get_num_threads()
    pgolf.set_num_threads(1)
    yield
    pgolf.set_num_threads(count)
