"""Downloading the published export, from a stand-in for the hub on this machine (docs/spec.md §6)."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgolf.common.errors import FormatError
from pgolf.data.downloading import DEFAULT_TRAIN_SHARDS, DownloadReport, download
from pgolf.data.folder import find_data
from pgolf.data.inspection import inspect_data
from pgolf.data.manifest import Manifest
from pgolf.data.preparation import prepare
from pgolf.data.published import MANIFEST, Export
from pgolf.data.shard_file import shard_header
from pgolf.data.shards import read_shard
from pgolf.data.tokenizer import Tokenizer
from pgolf.data.train_tokenizer import train_tokenizer
from tests.hub import COMMIT, REPO, HubStandIn, serve

VOCAB = 300
SHARD_TOKENS = 1000
MODEL = "datasets/tokenizers/fineweb_300_bpe.model"
TEXTS = [f"Document {n} says: the quick brown fox, {n * n} lazy dogs and a café.\n" * (1 + n % 3) for n in range(60)]


def shard(tokens: list[int]) -> bytes:
    return shard_header(len(tokens)) + np.array(tokens, "<u2").tobytes()


def path_of(split: str, index: int) -> str:
    return f"datasets/datasets/fineweb10B_sp300/fineweb_{split}_{index:06d}.bin"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an export with the variants sp300 and byte260, of which only the first is there."""
    model = tmp_path_factory.mktemp("tokenizer") / "fineweb_300_bpe.model"
    train_tokenizer(TEXTS, model, VOCAB, "nmt_nfkc")
    tokenizer = Tokenizer(model)
    files = {MODEL: model.read_bytes()}
    stats = {}
    for split, texts in (("val", TEXTS[:10]), ("train", TEXTS[10:])):
        tokens = [token for text in texts for token in (tokenizer.bos_id, *tokenizer.encode(text))]
        parts = [tokens[start : start + SHARD_TOKENS] for start in range(0, len(tokens), SHARD_TOKENS)]
        files |= {path_of(split, index): shard(part) for index, part in enumerate(parts)}
        stats |= {f"files_{split}": len(parts), f"tokens_{split}": len(tokens), f"docs_{split}": len(texts)}
    manifest = {
        "version": "10B",
        "shard_size": SHARD_TOKENS,
        "tokenizers": [
            {"name": "sp_bpe_300", "vocab_size": VOCAB, "model_path": "tokenizers/fineweb_300_bpe.model"},
            {"name": "pure_byte_260", "vocab_size": 260, "path": "tokenizers/fineweb_pure_byte_260.json"},
        ],
        "datasets": [
            {"name": "fineweb10B_byte260", "tokenizer_name": "pure_byte_260", "vocab_size": 260, "stats": stats},
            {"name": "fineweb10B_sp300", "tokenizer_name": "sp_bpe_300", "vocab_size": VOCAB, "stats": stats},
        ],
    }
    return {**files, MANIFEST: json.dumps(manifest).encode()}


TRAIN, VAL = 3, 2
"""Shards to download; the export has 7 of training."""


@pytest.fixture
def hub(export: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serve(export) as hub:
        yield hub


def fetch(hub: HubStandIn, out: Path, variant: str = "sp300", **options: Any) -> DownloadReport:
    return download(variant, out, **{"train_shards": TRAIN, "repo": REPO, "endpoint": hub.endpoint, **options})


def edit_manifest(hub: HubStandIn, **changes: Any) -> None:
    """Change fields of the manifest, or of the data set sp300 where they are its."""
    manifest = json.loads(hub.files[MANIFEST])
    for name, value in changes.items():
        entry = manifest if name in manifest else manifest["datasets"][1]
        entry[name] = {**entry[name], **value} if isinstance(value, dict) else value
    hub.files[MANIFEST] = json.dumps(manifest).encode()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


SHARDS = [path_of("train", index) for index in range(TRAIN)] + [path_of("val", index) for index in range(VAL)]


def test_a_download_is_a_data_folder(hub: HubStandIn, tmp_path: Path) -> None:
    shown: list[tuple[str, int, int]] = []
    report = fetch(hub, tmp_path / "data", progress=lambda *args: shown.append(args))
    out = tmp_path / "data"
    assert names(out) == sorted([*(Path(path).name for path in (MODEL, *SHARDS)), "manifest.json"])
    for path in (MODEL, *SHARDS):
        assert (out / Path(path).name).read_bytes() == hub.files[path]

    found = find_data(out)
    assert (len(found.train), len(found.val)) == (TRAIN, VAL)
    assert found.tokenizer == out / "fineweb_300_bpe.model" and found.manifest == report.manifest
    made = report.manifest
    assert made.hub is not None and (made.hub.repo, made.hub.revision, made.hub.variant) == (REPO, COMMIT, "sp300")
    assert made.tokenizer.vocab_size == VOCAB
    for name, entry in made.shards().items():
        assert entry.sha256 == hashlib.sha256((out / name).read_bytes()).hexdigest()

    size = sum(len(hub.files[path]) for path in (MODEL, *SHARDS))
    assert (report.path, report.fetched_files, report.fetched_bytes) == (out, 1 + len(SHARDS), size)
    assert shown[-1] == ("downloading", size, size)
    assert [done for _, done, _ in shown] == sorted(done for _, done, _ in shown)


def test_the_counts_of_a_download_are_those_of_its_streams(hub: HubStandIn, tmp_path: Path) -> None:
    made = fetch(hub, tmp_path).manifest
    tokenizer = Tokenizer(tmp_path / "fineweb_300_bpe.model")
    for split, paths in ((made.train, find_data(tmp_path).train), (made.val, find_data(tmp_path).val)):
        tokens = np.concatenate([read_shard(path) for path in paths])
        assert split.tokens == tokens.size
        assert split.documents == np.count_nonzero(tokens == tokenizer.bos_id)
        assert split.text_bytes == tokenizer.target_bytes(tokens[:-1], tokens[1:]).sum()
        assert (split.source_bytes, split.changed_documents) == (None, None)
    assert made.val.documents == 10
    assert inspect_data(tmp_path, verify=True).problems == ()


def test_a_complete_download_needs_no_network(hub: HubStandIn, tmp_path: Path) -> None:
    made = fetch(hub, tmp_path).manifest
    asked = hub.requests
    for revision in (None, COMMIT):
        report = fetch(hub, tmp_path, revision=revision)
        assert (report.manifest, report.fetched_files, report.fetched_bytes) == (made, 0, 0)
    assert hub.requests == asked


def test_more_training_shards_join_those_that_are_there(hub: HubStandIn, tmp_path: Path) -> None:
    first = fetch(hub, tmp_path / "a", train_shards=1)
    assert len(first.manifest.train.shards) == 1
    second = fetch(hub, tmp_path / "a", train_shards=TRAIN)
    assert second.fetched_files == TRAIN - 1
    assert hub.served[path_of("train", 0)] == len(hub.files[path_of("train", 0)])
    assert second.manifest == fetch(hub, tmp_path / "b").manifest
    assert fetch(hub, tmp_path / "a", train_shards=0).manifest == second.manifest


def test_validation_alone(hub: HubStandIn, tmp_path: Path) -> None:
    fetch(hub, tmp_path, train_shards=0)
    assert len(find_data(tmp_path, splits=("val",)).val) == VAL


@pytest.fixture
def large_hub(export: dict[str, bytes]) -> Iterator[HubStandIn]:
    """One whose first training shard has 26 MB, more than the library passes on at a time (10 MB)."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, VOCAB, 13_000_000, dtype=np.uint16)
    tokens[::1000] = 1
    content = shard_header(tokens.size) + tokens.astype("<u2").tobytes()
    with serve({**export, path_of("train", 0): content}) as hub:
        stats = {"files_train": 1, "tokens_train": tokens.size}
        edit_manifest(hub, shard_size=tokens.size, stats={**stats, "tokens_val": None})
        yield hub


class Stop(BaseException):
    pass


def test_a_stopped_download_goes_on_within_the_file(large_hub: HubStandIn, tmp_path: Path) -> None:
    path = path_of("train", 0)
    size = len(large_hub.files[path])
    seen: list[int] = []

    def stop_after_ten_megabytes(what: str, done: int, total: int) -> None:
        seen.append(done)
        if done > 10_000_000:
            raise Stop

    with pytest.raises(Stop):
        fetch(large_hub, tmp_path, train_shards=1, progress=stop_after_ten_megabytes)
    with pytest.raises(FileNotFoundError, match=r"holds no \*_train_\*\.bin"):
        find_data(tmp_path)
    (part,) = (tmp_path / ".download").glob("*.bin.*")
    kept = part.stat().st_size
    assert 10_000_000 <= kept < size

    large_hub.served.clear()
    shown: list[int] = []
    report = fetch(large_hub, tmp_path, train_shards=1, progress=lambda what, done, total: shown.append(done))
    assert large_hub.served[path] == size - kept
    assert report.fetched_bytes == size - kept + sum(len(large_hub.files[path_of("val", i)]) for i in range(VAL))
    assert kept < shown[1] and shown[-1] == sum(len(large_hub.files[p]) for p in (MODEL, path, *SHARDS[TRAIN:]))
    assert (tmp_path / "fineweb_train_000000.bin").read_bytes() == large_hub.files[path]
    assert not (tmp_path / ".download").exists()


def test_a_broken_connection_goes_on_where_it_broke(large_hub: HubStandIn, tmp_path: Path) -> None:
    path = path_of("train", 0)
    large_hub.cuts[path] = [22_000_000]
    fetch(large_hub, tmp_path, train_shards=1)
    size = len(large_hub.files[path])
    assert (tmp_path / "fineweb_train_000000.bin").read_bytes() == large_hub.files[path]
    assert 22_000_000 < large_hub.served[path] < size + 10_500_000  # not from the beginning


@pytest.mark.parametrize("path", [path_of("train", 1), path_of("val", 1), MODEL, MANIFEST])
def test_a_damaged_file_is_refused_and_fetched_anew(hub: HubStandIn, tmp_path: Path, path: str) -> None:
    hub.damaged = {path}
    with pytest.raises(FormatError, match=rf"{Path(path).name} of {REPO} arrived damaged and was removed: .*expected"):
        fetch(hub, tmp_path)
    assert not (tmp_path / Path(path).name).exists() or path == MANIFEST
    with pytest.raises(FileNotFoundError):
        find_data(tmp_path)
    hub.damaged = set()
    fetch(hub, tmp_path)
    assert inspect_data(tmp_path, verify=True).problems == ()


def test_an_unfinished_download_is_no_data_folder(hub: HubStandIn, tmp_path: Path) -> None:
    hub.damaged = {path_of("val", 1)}
    with pytest.raises(FormatError):
        fetch(hub, tmp_path)
    assert (tmp_path / "fineweb_val_000000.bin").exists()
    with pytest.raises(FileNotFoundError, match="was stopped before its end; the same `pgolf data download` goes on"):
        find_data(tmp_path)


def test_a_listed_shard_that_was_lost_or_cut_is_fetched_again(hub: HubStandIn, tmp_path: Path) -> None:
    made = fetch(hub, tmp_path).manifest
    (tmp_path / "fineweb_train_000001.bin").unlink()
    with (tmp_path / "fineweb_train_000002.bin").open("r+b") as file:
        file.truncate(1500)
    report = fetch(hub, tmp_path)
    assert (report.manifest, report.fetched_files) == (made, 2)
    assert inspect_data(tmp_path, verify=True).problems == ()


def test_files_of_the_export_that_are_there_are_kept(hub: HubStandIn, tmp_path: Path) -> None:
    for path in (MODEL, path_of("train", 0), path_of("val", 0)):
        (tmp_path / Path(path).name).write_bytes(hub.files[path])
    report = fetch(hub, tmp_path)
    assert report.fetched_files == 3 and len(report.manifest.shards()) == TRAIN + VAL
    assert not hub.served[path_of("train", 0)] and not hub.served[path_of("val", 0)]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"fineweb_train_000001.bin": shard([1, 2])},
            r"fineweb_train_000001\.bin: this is another file than datasets/",
        ),
        ({"fineweb_300_bpe.model": b"?"}, r"fineweb_300_bpe\.model: this is another file than datasets/tokenizers/"),
        ({"books_train_000000.bin": shard([1, 2])}, r"books_train_000000\.bin: this shard does not belong"),
        ({"fineweb_train_000003.bin": shard([1, 2])}, r"fineweb_train_000003\.bin: this shard does not belong"),
        ({"manifest.json": b"{}"}, "holds data that was not downloaded"),
    ],
)
def test_other_data_in_the_folder_is_left_alone(
    hub: HubStandIn, tmp_path: Path, files: dict[str, bytes], words: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FileExistsError, match=words):
        fetch(hub, tmp_path)
    for name, content in files.items():
        assert (tmp_path / name).read_bytes() == content


def test_prepared_and_downloaded_data_do_not_replace_each_other(hub: HubStandIn, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXTS * 30))
    prepare(text, tmp_path / "prepared", vocab_size=VOCAB, workers=1)
    with pytest.raises(FileExistsError, match="prepared: the folder holds data that was not downloaded"):
        fetch(hub, tmp_path / "prepared")
    fetch(hub, tmp_path / "fetched")
    with pytest.raises(FileExistsError, match=r"fetched: the folder holds \S+ and \d more files that no finished"):
        prepare(text, tmp_path / "fetched", vocab_size=VOCAB, workers=1)
    with pytest.raises(FileExistsError, match=f"holds sp300 of {REPO}"):
        fetch(hub, tmp_path / "fetched", variant="sp512")
    with pytest.raises(NotADirectoryError, match=r"text\.txt: this is a file"):
        fetch(hub, text)


def test_a_folder_stays_with_its_commit(hub: HubStandIn, tmp_path: Path) -> None:
    fetch(hub, tmp_path, train_shards=1)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace(COMMIT, "f" * 40))
    with pytest.raises(FileExistsError, match=f"holds the commit ffffffffffff of {REPO}; main is {COMMIT[:12]}"):
        fetch(hub, tmp_path, revision="main")
    with pytest.raises(FileNotFoundError, match="has no revision 'ffff"):
        fetch(hub, tmp_path)


def test_unknown_variants_are_answered_with_the_known_ones(hub: HubStandIn, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"the variant 'sp999' is not there; there are: sp300\."):
        fetch(hub, out, variant="sp999")
    with pytest.raises(ValueError, match=r"'byte260' has no SentencePiece tokenizer; there are: sp300\."):
        fetch(hub, out, variant="byte260")
    with pytest.raises(ValueError, match=rf"train_shards is {DEFAULT_TRAIN_SHARDS}; sp300 has 7 training shards"):
        fetch(hub, out, train_shards=DEFAULT_TRAIN_SHARDS)
    with pytest.raises(ValueError, match="at least 0"):
        fetch(hub, out, train_shards=-1)
    assert not out.exists()


def test_what_the_hub_does_not_have_is_named(hub: HubStandIn, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="has no dataset nobody/nothing, or it is private"):
        fetch(hub, out, repo="nobody/nothing")
    with pytest.raises(ValueError, match="'a/b/c' is not the name of a dataset"):
        fetch(hub, out, repo="a/b/c")
    with pytest.raises(FileNotFoundError, match=f"{REPO} has no revision 'next'"):
        fetch(hub, out, revision="next")
    content = hub.files.pop(path_of("train", 2))
    with pytest.raises(
        FileNotFoundError, match=rf"{REPO} \(commit {COMMIT[:12]}\) has no file {path_of('train', 2)}\."
    ):
        fetch(hub, out)
    assert not out.exists()
    hub.files[path_of("train", 2)] = content
    hub.unlisted = {path_of("train", 2)}
    with pytest.raises(FileNotFoundError, match="lists a file of someone/export that it does not have"):
        fetch(hub, out)


def test_no_network(hub: HubStandIn, tmp_path: Path) -> None:
    with serve({}) as gone:
        pass
    with pytest.raises(ConnectionError, match=rf"hub {gone.endpoint} cannot be reached.*goes on from there\."):
        fetch(gone, tmp_path)
    hub.status = 503
    with pytest.raises(ConnectionError, match="answered with status 503"):
        fetch(hub, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_package_is_named_where_it_is_missing(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'pgolf\[data\]'"):
        fetch(hub, tmp_path)


def test_too_little_space_is_told_before_the_transfer(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 5))
    with pytest.raises(OSError, match=r"out: the download needs 0\.0 GB more; the disk has 0\.0 GB free"):
        fetch(hub, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up(hub: HubStandIn, tmp_path: Path) -> None:
    path = path_of("train", 1)
    part = tmp_path / ".download" / f"{Path(path).name}.{hub.info(path)['lfs']['oid'][:16]}"
    part.parent.mkdir()
    part.symlink_to("/dev/full")
    with pytest.raises(OSError, match="the disk is full; what has arrived is kept"):
        fetch(hub, tmp_path)
    part.unlink()
    fetch(hub, tmp_path)
    assert inspect_data(tmp_path, verify=True).problems == ()
    assert hub.served[path_of("train", 0)] == len(hub.files[path_of("train", 0)])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no shard", "is of no use: .*has 8 bytes; a shard starts with a header"),
        (shard([1, 2, 3]), "has 3 tokens; the export's manifest says 1,000"),
        (shard([1, VOCAB] * 500), "has the token 300; its tokenizer has 300, up to 299"),
    ],
)
def test_shards_that_the_manifest_contradicts(hub: HubStandIn, tmp_path: Path, content: bytes, words: str) -> None:
    hub.files[path_of("train", 1)] = content
    with pytest.raises(FormatError, match=rf"{path_of('train', 1)} of {REPO} {words}"):
        fetch(hub, tmp_path)
    assert names(tmp_path)[-3:] == ["fineweb_300_bpe.model", "fineweb_train_000000.bin", "manifest.json"]


def test_tokenizers_that_the_manifest_contradicts(hub: HubStandIn, tmp_path: Path) -> None:
    edit_manifest(hub, vocab_size=301)
    with pytest.raises(FormatError, match="has 300 tokens; the export's manifest says 301"):
        fetch(hub, tmp_path)
    hub.files[MODEL] = b"no model"
    with pytest.raises(FormatError, match=rf"{MODEL} of {REPO} is of no use: .*not a SentencePiece model"):
        fetch(hub, tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"<html>", b"[]", b"{}", b'{"datasets": [], "tokenizers": [{}]}', b'{"datasets": [3], "tokenizers": []}'],
)
def test_broken_export_manifests_are_refused(content: bytes) -> None:
    with pytest.raises(FormatError, match=r"here: this is not the manifest of such an export"):
        Export.parse(content, "sp300", "here")


@pytest.mark.parametrize(
    ("changes", "model_path"),
    [
        ({"stats": {}}, "a.model"),
        ({"stats": {"files_train": "many", "files_val": 1}}, "a.model"),
        ({"vocab_size": "large"}, "a.model"),
        ({"name": "../../x_sp300"}, "a.model"),
        ({}, "../a.model"),
        ({}, "/a.model"),
        ({}, "..\\a.model"),
        ({}, 3),
    ],
)
def test_export_manifests_with_broken_entries_are_refused(changes: dict[str, Any], model_path: object) -> None:
    dataset = {"name": "x_sp300", "tokenizer_name": "t", "stats": {"files_train": 2, "files_val": 1}, **changes}
    manifest = {"datasets": [dataset], "tokenizers": [{"name": "t", "model_path": model_path}]}
    with pytest.raises(FormatError, match="here: this is not the manifest"):
        Export.parse(json.dumps(manifest).encode(), "sp300", "here")


def test_export_manifests_say_how_many_tokens_a_shard_has() -> None:
    def split(**stats: int) -> list[int | None]:
        dataset = {"name": "x_sp8", "tokenizer_name": "t", "stats": {"files_train": 3, "files_val": 0, **stats}}
        manifest = {"shard_size": 100, "datasets": [dataset], "tokenizers": [{"name": "t", "model_path": "a.model"}]}
        train = Export.parse(json.dumps(manifest).encode(), "sp8", "here").train
        return [train.expected_tokens(index) for index in range(3)]

    assert split(tokens_train=201) == [100, 100, 1]
    assert split(tokens_train=300) == [100, 100, 100]
    assert split() == split(tokens_train=200) == split(tokens_train=301) == [None, None, None]


def test_manifests_of_downloads_are_read_back(hub: HubStandIn, tmp_path: Path) -> None:
    made = fetch(hub, tmp_path).manifest
    assert Manifest.find(tmp_path) == made
    raw = json.loads((tmp_path / "manifest.json").read_text())
    raw["hub"] = {"repo": "only"}
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(FormatError, match=r"manifest\.json: the manifest's fields"):
        Manifest.find(tmp_path)
