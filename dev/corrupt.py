"""Damages small files of every kind that pgolf reads, and demands a value or a refusal in words of every reader.

    python dev/corrupt.py                          100,000 cases of seed 0
    python dev/corrupt.py --seed 7 --cases 5000
    python dev/corrupt.py --seed 7 --case 4711     that case alone; its file is kept and its exception shown

A case cuts, flips, overwrites, removes, repeats, inserts and splices bytes, or puts an odd value in a value's place.
"sealed" kinds are damaged inside and then given right checksums, so that what lies behind the checks is reached too.
A reader may return a value or raise exactly FormatError, ValueError or FileNotFoundError with words that name the file.
Anything else is a violation: another exception, a warning, a crash, a sanitizer's report, more than 5 seconds, or
512 MiB more memory than at the start. Cases run in a process of their own, which writes each one down before it begins.

Linux only: files lie in memory (/dev/shm), and limits are its signals and its measure of memory.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import mmap
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SECONDS = 5
MEMORY_BYTES = 512 << 20
MOST_VIOLATIONS = 20
LOADED, VIOLATION = "loaded", "violation"
REFUSALS = ("FormatError", "ValueError", "FileNotFoundError")

# What replaces a value in text: other types, limits of number types, paths that lead away, depth, broken text.
ODD = [
    *(b"null", b"true", b"0", b"1", b"-1", b"1.5", b"1e999", b"NaN", b"-Infinity", b"{}", b"[]", b'""', b"9" * 400),
    *(b"2147483648", b"9223372036854775808", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"a." * 300, b'"../x"'),
    *(rb'"\u0000"', rb'"\ud800"', b"\xff\xfe", b'"' + b"x" * 3000 + b'"', b"\x00", b"'''", b"1979-05-27", b"0x7f"),
]
_VALUE = re.compile(rb'"[^"\n]*"|-?\d[\d.eE+-]*|\w+')


@dataclass(frozen=True)
class Kind:
    """One kind of file: the name it is read under, a whole sample, the readers, and how damaged content is sealed."""

    file: str
    sample: bytes
    read: Callable[[Path], Any]
    seal: Callable[[bytes], bytes] = lambda content: content
    share: int = 1


# ---- Damage


def _cut(data: bytearray, dice: random.Random, other: bytes) -> None:
    del data[dice.randrange(len(data)) :]


def _flip(data: bytearray, dice: random.Random, other: bytes) -> None:
    for _ in range(dice.choice((1, 1, 1, 2, 8))):
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _overwrite(data: bytearray, dice: random.Random, other: bytes) -> None:
    start = dice.randrange(len(data))
    size = min(dice.choice((1, 2, 4, 8, 64)), len(data) - start)
    data[start : start + size] = dice.choice((b"\x00", b"\xff", b"\x7f", b"\x80")) * size


def _remove(data: bytearray, dice: random.Random, other: bytes) -> None:
    start = dice.randrange(len(data))
    del data[start : start + dice.choice((1, 2, 4, 64, 1024))]


def _repeat(data: bytearray, dice: random.Random, other: bytes) -> None:
    start, to = dice.randrange(len(data)), dice.randrange(len(data))
    data[to:to] = data[start : start + dice.choice((1, 2, 4, 64, 1024))]


def _insert(data: bytearray, dice: random.Random, other: bytes) -> None:
    to = dice.randrange(len(data) + 1)
    data[to:to] = dice.randbytes(dice.choice((1, 2, 4, 64)))


def _splice(data: bytearray, dice: random.Random, other: bytes) -> None:
    """Goes on with another sample, from anywhere in it."""
    data[dice.randrange(len(data)) :] = other[dice.randrange(len(other)) :]


def _odd_value(data: bytearray, dice: random.Random, other: bytes) -> None:
    values = list(_VALUE.finditer(data))
    if values:
        value = dice.choice(values)
        data[value.start() : value.end()] = dice.choice(ODD)


# Twice: it is what gets furthest in text and in sealed headers.
DAMAGES = (_cut, _flip, _overwrite, _remove, _repeat, _insert, _splice, _odd_value, _odd_value)


def damage(data: bytes, dice: random.Random, others: list[bytes]) -> bytes:
    """`data` with one to three damages."""
    damaged = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 3))):
        if damaged:
            dice.choice(DAMAGES)(damaged, dice, dice.choice(others))
    return bytes(damaged)


# ---- Samples and readers


def memory_folder() -> str | None:
    """Where files lie in memory; None where the system has no such place."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def seal_content(content: bytes) -> bytes:
    """The container of docs/spec.md §4, version 1, around any content."""
    return _preamble(1, len(content), zlib.crc32(content)) + _frame(content)


def seal_streams(parts: bytes) -> bytes:
    """The container of version 2 around what `_open_streams` took out of one."""
    size, checksum, head_size = struct.unpack("<QII", parts[:16].ljust(16, b"\0"))
    frame = _frame(parts[16 : 16 + head_size])
    body = struct.pack("<I", len(frame)) + frame + parts[16 + head_size :]
    return _preamble(2, size, checksum) + body + struct.pack("<I", zlib.crc32(body))


def _open_streams(artifact: bytes) -> bytes:
    """Size and CRC-32 of the content, then the head with its size and the streams: whatever no checksum depends on."""
    import zstandard

    size, checksum = struct.unpack_from("<QI", artifact, 16)
    (frame_size,) = struct.unpack_from("<I", artifact, 32)
    head = zstandard.ZstdDecompressor().decompress(artifact[36 : 36 + frame_size])
    return struct.pack("<QII", size, checksum, len(head)) + head + artifact[36 + frame_size : -4]


def _preamble(version: int, size: int, checksum: int) -> bytes:
    preamble = struct.pack("<8sIIQI", b"PGOLF\r\n\0", version, 0, size, checksum)
    return preamble + struct.pack("<I", zlib.crc32(preamble))


def _frame(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=1, write_checksum=False, write_content_size=True).compress(data)


def _seal_checkpoint(content: bytes) -> bytes:
    """A zip file with right checksums around entries that were damaged as one text: sizes are 8 bytes each."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        start = 0
        for name in ("header", "weight.a", "moment.a"):
            size = int.from_bytes(content[start : start + 4], "little")
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content[start + 4 : start + 4 + size])
            start += 4 + size
    return file.getvalue()


def _open_checkpoint(checkpoint: bytes) -> bytes:
    parts = []
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        for name in archive.namelist():
            entry = archive.read(name)
            parts.append(len(entry).to_bytes(4, "little") + entry)
    return b"".join(parts)


def make_kinds(folder: Path) -> dict[str, Kind]:
    """Writes a sample of every kind with pgolf's own writers, and brings each together with its readers."""
    import numpy as np

    import pgolf
    from pgolf.artifacts import artifact, container
    from pgolf.config import Config, ModelConfig, TrainConfig
    from pgolf.data.folder import find_data, load_tokens
    from pgolf.data.manifest import HubEntry, Manifest, ShardEntry, SplitEntry, TokenizerEntry
    from pgolf.data.shards import ShardSet
    from pgolf.runs import checkpoint
    from pgolf.runs.records import Curves, StepRecord
    from pgolf.training.replay import Replay

    pgolf.set_num_threads(1)
    dice = np.random.default_rng(0)
    model = ModelConfig(
        vocab_size=16, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=1, bigram_vocab_size=8, bigram_dim=4
    )
    mixed = [("tok_emb.*", "fp16"), ("*.mlp.*", "int5"), ("*.attn.*", "int6"), ("bigram.*", "fp32"), ("*", "int8")]
    artifact.export(pgolf.GPT(model, seed=0), folder / "sample.pgolf", policy=mixed, small_numel=0)

    config = Config(model=model)
    (folder / "sample.toml").write_text(config.to_toml(), encoding="utf-8")
    (folder / "short.toml").write_text('extends = "base"\n[train]\niterations = 5\n', encoding="utf-8")

    arrays = {name: dice.normal(size=(4, 8)).astype(dtype) for name, dtype in (("weight.a", "f4"), ("moment.a", "f8"))}
    values = {"step": 3, "seconds": 1.5, "position": 96, "adam_steps": 3, "snapshots": 0, "validated": 0}
    values |= {"warned": False, "micro_batch_seqs": 1, "dtype": "float32", "config": {"model": model.to_dict()}}
    values |= {"data": {"shards": 1, "tokens": 256, "sha256": "0" * 64}}
    saved = checkpoint.save(folder / "checkpoint", arrays, values).read_bytes()

    pgolf.write_shard(folder / "good_train_000001.bin", dice.integers(0, 16, 256))
    pgolf.write_shard(folder / "sample.bin", dice.integers(0, 16, 256))
    counts = [
        SplitEntry(4, 256, source, 1000, source and 0, (ShardEntry(f"good_{split}_000001.bin", 256, "0" * 64),))
        for split, source in (("train", 1000), ("val", None))
    ]
    Manifest(
        "0.1.0",
        ("a", "b"),
        TokenizerEntry("t.model", "0" * 64, 16, "nmt_nfkc"),
        *counts,
        HubEntry("a/b", "c", "d", 2, 1),
    ).write(folder / "sample.json")
    records = [
        StepRecord(step, 32 * step, 3.0 - step / 9, 1.0, 0.9, False, step == 3, 0.5, step / 7, 99.5, 2.5, None)
        for step in range(1, 5)
    ]
    log = "".join(json.dumps(asdict(record)) + "\n" for record in records).encode()

    def read_shard(path: Path) -> Any:
        return [int(pgolf.read_shard(path).sum()), load_tokens(path, vocab_size=16)]

    def read_shards(path: Path) -> Any:
        shards = ShardSet([path, folder / "good_train_000001.bin"], vocab_size=16)
        return shards.read(len(shards) - 5, 300)

    def read_data(path: Path) -> Any:
        found = find_data(path.parent, splits=("train",))
        assert found.manifest is None or found.manifest.shards() is not None
        return found

    def read_checkpoint(path: Path) -> Any:
        return checkpoint.load(path)

    def read_log(path: Path) -> Any:
        return Replay(TrainConfig(replay=str(path)))

    shutil.copy(folder / "good_train_000001.bin", folder / "good_val_000001.bin")
    whole = (folder / "sample.pgolf").read_bytes()
    content = container.pack_content(*container.unpack(whole))
    shard = (folder / "sample.bin").read_bytes()
    return {
        "artifact": Kind("damaged.pgolf", whole, pgolf.load),
        "artifact, sealed": Kind("sealed.pgolf", _open_streams(whole), pgolf.load, seal_streams, 2),
        "artifact 1": Kind("damaged_1.pgolf", seal_content(content), pgolf.load),
        "artifact 1, sealed": Kind("sealed_1.pgolf", content, pgolf.load, seal_content, 2),
        "checkpoint": Kind("step-00000003.npz", saved, read_checkpoint),
        "checkpoint, sealed": Kind("step-00000004.npz", _open_checkpoint(saved), read_checkpoint, _seal_checkpoint),
        "shard": Kind("damaged.bin", shard, read_shard),
        "shards": Kind("damaged_too.bin", shard, read_shards),
        "manifest": Kind("manifest.json", (folder / "sample.json").read_bytes(), read_data, share=2),
        "TOML": Kind("damaged.toml", (folder / "sample.toml").read_bytes(), Config.from_toml),
        "TOML, short": Kind("short.toml", (folder / "short.toml").read_bytes(), Config.from_toml),
        "log, replayed": Kind("damaged.jsonl", log, read_log),
        "log, plotted": Kind("plotted.jsonl", log, Curves.of),
    }


# ---- Cases


class Cases:
    """The cases of one seed; each depends on its seed and number alone."""

    def __init__(self, seed: int, folder: Path) -> None:
        self._folder = folder
        self._seed = seed
        self._kinds = make_kinds(folder)
        self._draw = [name for name, kind in self._kinds.items() for _ in range(kind.share)]
        self._samples = [kind.sample for kind in self._kinds.values()]

    def run(self, case: int) -> tuple[str, str, str]:
        """A case's kind, its outcome, and for a violation what it was."""
        dice = random.Random((self._seed << 40) + case)
        name = dice.choice(self._draw)
        kind = self._kinds[name]
        others = [kind.sample] if dice.random() < 0.5 else self._samples
        path = self.file_of(name)
        path.unlink(missing_ok=True)  # never written in place: a map of the old one may still be open
        path.write_bytes(kind.seal(damage(kind.sample, dice, others)))
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                kind.read(path)
        except Exception as error:
            outcome = type(error).__name__
            problem = _problem(error, path)
            return (name, VIOLATION, problem) if problem else (name, outcome, "")
        if warned:
            return name, VIOLATION, f"{warned[0].category.__name__}: {str(warned[0].message)[:200]}"
        return name, LOADED, ""

    def file_of(self, kind: str) -> Path:
        """Where the last case of a kind left its file."""
        return self._folder / self._kinds[kind].file

    def read(self, kind: str) -> Any:
        """What the reader makes of the file that the last case of a kind left."""
        return self._kinds[kind].read(self.file_of(kind))


def _problem(error: Exception, path: Path) -> str:
    """Why an exception is no refusal in words; empty where it is one."""
    name, text = type(error).__name__, str(error)
    if name not in REFUSALS:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{name}: {text[:200]} ({Path(at.filename).name}, line {at.lineno})"
    if path.name not in text and str(path.parent) not in text:
        return f"{name} does not name the file: {text[:200]!r}"
    if len(text.split()) < 4:
        return f"{name} says too little: {text[:200]!r}"
    return ""


def work(seed: int, folder: str, first: int, end: int, running: mmap.mmap, results: Connection) -> None:
    """Runs cases first..end-1; `running` holds the number of the one that runs, for when this process dies of it."""
    cases = Cases(seed, Path(folder))
    # Its handler prints the stack, then the signal ends the process, wherever it is: in Python or in native code.
    faulthandler.enable()
    faulthandler.register(signal.SIGALRM, chain=True)
    start = _peak_bytes()
    limit = start + MEMORY_BYTES
    counts: Counter[tuple[str, str]] = Counter()
    sent = time.monotonic()
    for case in range(first, end):
        running[:8] = case.to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        kind, outcome, problem = cases.run(case)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if outcome != VIOLATION and _peak_bytes() > limit:
            outcome, problem = VIOLATION, f"memory rose to {_peak_bytes() >> 20:,} MiB, {start >> 20:,} at the start"
            limit = _peak_bytes() + MEMORY_BYTES
        counts[kind, outcome] += 1
        if problem:
            results.send((case, kind, problem))
        if time.monotonic() - sent > 1 or problem:
            results.send(counts)
            counts, sent = Counter(), time.monotonic()
    results.send(counts)
    results.send(_peak_bytes())


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def run_all(seed: int, cases: int, folder: Path) -> tuple[Counter[tuple[str, str]], list[tuple[int, str, str]], int]:
    """Counts by kind and outcome, violations, and peak memory of the process that ran the cases, in bytes."""
    counts: Counter[tuple[str, str]] = Counter()
    violations: list[tuple[int, str, str]] = []
    context = multiprocessing.get_context("fork")  # nothing was imported yet that a fork would break
    running = mmap.mmap(-1, 8)
    first = peak = 0
    while first < cases and len(violations) < MOST_VIOLATIONS:
        running[:8] = first.to_bytes(8, "little")
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(seed, str(folder), first, cases, running, send))
        process.start()
        send.close()
        try:
            while len(violations) < MOST_VIOLATIONS:
                message = receive.recv()
                if isinstance(message, Counter):
                    counts += message
                elif isinstance(message, int):
                    peak = max(peak, message)
                else:
                    violations.append(message)
        except EOFError:
            process.join()
        else:
            process.kill()
            process.join()
            break
        if process.exitcode == 0:
            break
        case = int.from_bytes(running[:8], "little")
        died = "a hang" if process.exitcode == -signal.SIGALRM else f"the process ended with {process.exitcode}"
        violations.append((case, "unknown", died))
        first = case + 1
    return counts, violations, peak


def print_table(counts: Counter[tuple[str, str]]) -> None:
    columns = (LOADED, *REFUSALS, VIOLATION)
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    rows = [(kind, *(counts[kind, column] for column in columns)) for kind in sorted(kinds)]
    rows.append(("all", *(sum(row[index] for row in rows) for index in range(1, len(columns) + 1))))
    print(f"{'file':<20}{'cases':>9}" + "".join(f"{column:>19}" for column in columns))
    for name, *numbers in rows:
        print(f"{name:<20}{sum(numbers):>9,}" + "".join(f"{number:>19,}" for number in numbers))


def repeat(seed: int, case: int) -> int:
    """One case in this process, with its exception; its files are kept."""
    folder = Path(tempfile.mkdtemp(prefix="pgolf-corrupt-"))
    cases = Cases(seed, folder)
    kind, outcome, problem = cases.run(case)
    print(f"seed {seed}, case {case}: {kind}, {outcome} {problem}\nThe file is {cases.file_of(kind)}.")
    try:
        print(f"loaded: {str(cases.read(kind))[:500]}")
    except Exception:
        traceback.print_exc()
    return 1 if problem else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--case", type=int, help="run only this one, and keep its file")
    arguments = parser.parse_args()
    if arguments.case is not None:
        return repeat(arguments.seed, arguments.case)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pgolf-corrupt-", dir=memory_folder()) as folder:
        counts, violations, peak = run_all(arguments.seed, arguments.cases, Path(folder))
    seconds = time.monotonic() - began
    print_table(counts)
    done = sum(counts.values())
    print(f"{done:,} cases of seed {arguments.seed} in {seconds:.0f} s, {done / seconds:,.0f} a second; ", end="")
    print(f"peak memory {peak >> 20:,} MiB; {len(violations)} violations")
    for case, kind, problem in violations:
        print(f"  {kind}: {problem}\n    repeat: python dev/corrupt.py --seed {arguments.seed} --case {case}")
    return 1 if violations or done != arguments.cases else 0


if __name__ == "__main__":
    sys.exit(main())
