"""The demo: from the machine's own Python documentation to a scored artifact, against general-purpose compressors.

`python -m pgolf.cli.demo [FOLDER]` prepares FOLDER/data/demo, trains the recipe `tiny` into FOLDER/runs/demo and ends
with a table of bits per byte: the model's beside those of zstd and xz for byte-identical text.
"""

from __future__ import annotations

import contextlib
import lzma
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
import zstandard

from pgolf import __version__
from pgolf.cli.demo_plot import plot_race
from pgolf.cli.failures import reported
from pgolf.cli.generate import continue_text
from pgolf.cli.options import JsonOption, ThreadsOption, use_threads
from pgolf.cli.output import bits, console_for, key_value_table, print_json
from pgolf.config import Config

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pgolf.data.tokenizer import Tokenizer
    from pgolf.report.progress import ShowStage
    from pgolf.runs.records import Report
    from pgolf.training.trainer import Trainer

_PROMPT = "Return the"
_XZ_BEST = 9 | lzma.PRESET_EXTREME
_XZ_DICTIONARY = 2**26
"""Bytes that preset 9 looks back; longer texts get a dictionary of their own length."""
_ZSTD_WINDOW_LOG = 27
"""The longest window that every zstd decoder takes with --long: 128 MiB."""
_RUN_FILES = ("config.toml", "log.jsonl", "model.pgolf", "loss.png", "race.png", "report.json")


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of general-purpose compressors for the validation text; text_bytes: its length in UTF-8."""

    text_bytes: int
    zstd: float
    xz: float
    xz_given_training_text: float


def measure_baselines(train: bytes, val: bytes) -> Baselines:
    """Compress the validation text by `zstd --ultra -22 --long`, by `xz -9`, and by xz given the training text.

    The last is len(xz(train + val)) − len(xz(train)), at xz's highest setting and with a dictionary that holds all of
    it: like the model, it has seen the training text.

    Raises ValueError for an empty validation text.
    """
    if not val:
        raise ValueError("The validation text is empty; there is nothing to compress.")
    parameters = zstandard.ZstdCompressionParameters.from_level(22, window_log=_ZSTD_WINDOW_LOG)
    with ThreadPoolExecutor(2) as pool:  # lzma releases the GIL
        both, alone = pool.map(_xz_size, (train + val, train))
    return Baselines(
        text_bytes=len(val),
        zstd=_bits_per_byte(len(zstandard.ZstdCompressor(compression_params=parameters).compress(val)), val),
        xz=_bits_per_byte(len(lzma.compress(val, preset=9)), val),
        xz_given_training_text=_bits_per_byte(both - alone, val),
    )


def _xz_size(text: bytes) -> int:
    dictionary = max(_XZ_DICTIONARY, len(text))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": _XZ_BEST, "dict_size": dictionary}]
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters))


def _bits_per_byte(compressed: int, text: bytes) -> float:
    return 8 * compressed / len(text)


def spelled_text(shards: tuple[Path, ...], tokenizer: Tokenizer, bos_id: int) -> bytes:
    """The UTF-8 text that the shards' tokens stand for: the normalised documents, one behind the other.

    Raises ValueError where the tokens' byte counts (docs/spec.md §5) do not sum to its length.
    """
    from pgolf.data.shards import ShardSet

    stream = ShardSet(shards, tokenizer.vocab_size)
    tokens = stream.read(0, len(stream))
    documents = np.split(tokens, np.flatnonzero(tokens == bos_id))
    text = "".join(tokenizer.decode(document) for document in documents).encode()
    counted = int(tokenizer.target_bytes(tokens[:-1], tokens[1:]).sum())
    if tokens[0] != bos_id or counted != len(text):
        raise ValueError(
            f"{shards[0].parent}: the tokens count {counted:,} bytes and spell {len(text):,}; the two must be equal, "
            "or bits per byte would not be those of the text that the compressors get."
        )
    return text


def prepare_data(folder: Path, show: ShowStage) -> bool:
    """Prepare the built-in corpus in a folder; returns False where that has been done before, by its manifest."""
    from pgolf.data.preparation import prepare

    if _is_prepared(folder):
        return False
    vocab_size = Config.from_recipe("tiny").model.vocab_size
    prepare([], folder, builtin=True, vocab_size=vocab_size, progress=lambda p: show(p.stage, p.done, p.total))
    return True


def _is_prepared(folder: Path) -> bool:
    """Whether the manifest names this Python's corpus and this pgolf, and every file is as it says."""
    from pgolf.common.files import file_sha256
    from pgolf.data.corpus import Corpus
    from pgolf.data.documents import CorpusReader
    from pgolf.data.manifest import Manifest

    manifest = Manifest.find(folder)
    corpus_name = CorpusReader(Corpus((), ())).names
    if manifest is None or (manifest.sources, manifest.pgolf) != (corpus_name, __version__):
        return False
    files = {entry.file: entry.sha256 for entry in (*manifest.train.shards, *manifest.val.shards)}
    files[manifest.tokenizer.file] = manifest.tokenizer.sha256
    return all((folder / name).is_file() and file_sha256(folder / name) == sha256 for name, sha256 in files.items())


def run_demo(folder: Path, seconds: float, console: Console) -> dict[str, object]:
    """The whole demo in ``folder``; ``seconds`` is the time limit of training. Returns the results for JSON."""
    from pgolf.artifacts.artifact import load
    from pgolf.report.progress import duration, run_with_progress, stages
    from pgolf.training.trainer import Trainer

    began = time.monotonic()
    data, run = folder / "data" / "demo", folder / "runs" / "demo"

    def step(text: str) -> None:
        console.print(text, style="bold", soft_wrap=True)

    step(f"1. Data: the prose of this Python's standard library, a tokenizer trained on it, token shards ({data})")
    with stages(console) as show:
        prepared = prepare_data(data, show)
    if not prepared:
        console.print("prepared before; used again")
    _clear_run(run)
    config = Config.from_recipe("tiny", {"train.data_path": str(data), "train.max_wallclock_seconds": seconds})
    trainer = Trainer(config, run_dir=run)
    assert trainer.tokenizer is not None
    console.print(f"{_count(trainer, 'train')} to train on, {_count(trainer, 'val')} to validate on")

    step("2. Opponents: zstd and xz on the validation text")
    train_text, val_text = (
        spelled_text(shards, trainer.tokenizer, trainer.config.model.bos_id)
        for shards in (trainer.data.train, trainer.data.val)
    )
    baselines = measure_baselines(train_text, val_text)

    step(f"3. Training for {duration(seconds)}: {trainer.model!r}")
    report = run_with_progress(trainer, console)

    step("4. A text by the reloaded artifact")
    model = load(run / "model.pgolf")
    sample, _ = continue_text(model, trainer.tokenizer, _PROMPT, max_new_tokens=150, temperature=0.7, top_k=50, seed=1)
    console.print(sample)

    console.print(_comparison(report, baselines))
    console.print(_summary(report))
    with contextlib.suppress(ModuleNotFoundError):  # matplotlib is optional
        plot_race(run / "log.jsonl", report, baselines, run / "race.png")
        console.print(f"The race against zstd and xz is drawn in {run / 'race.png'}.", soft_wrap=True)
    total = time.monotonic() - began
    console.print(f"The run is in {run}; the demo took {duration(total)}.", soft_wrap=True)
    return {
        "run_dir": str(run),
        "seconds": total,
        "report": report.to_dict(),
        "baselines": asdict(baselines),
        "sample": sample,
    }


def _clear_run(run: Path) -> None:
    """Remove what an earlier demo left: the demo always trains anew."""
    for name in _RUN_FILES:
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "checkpoint", ignore_errors=True)


def _count(trainer: Trainer, split: str) -> str:
    manifest = trainer.data.manifest
    assert manifest is not None
    entry = manifest.train if split == "train" else manifest.val
    return f"{entry.tokens:,} tokens ({entry.text_bytes / 1e6:.2f} MB)"


def _comparison(report: Report, baselines: Baselines) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"Bits per byte of the validation text ({baselines.text_bytes:,} bytes)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("")
    for heading in ("bits per byte", "of xz -9"):
        table.add_column(heading, justify="right")
    rows: list[tuple[str, float | None]] = [
        ("zstd -22", baselines.zstd),
        ("xz -9", baselines.xz),
        ("xz -9e, given the training text", baselines.xz_given_training_text),
        ("pgolf, as trained", report.val_bpb),
        (f"pgolf, mean of {report.snapshots} snapshots", report.val_bpb_averaged),
        ("pgolf, quantised artifact", report.val_bpb_quantised),
        (f"pgolf, quantised artifact, {report.score_method} windows", report.score_bpb),
    ]
    for name, bpb in rows:
        if bpb is not None:
            style = "bold" if bpb == report.score_bpb else None
            table.add_row(name, bits(bpb), f"{bpb / baselines.xz:.0%}", style=style)
    return table


def _summary(report: Report) -> Table:
    from pgolf.report.progress import duration

    return key_value_table(
        "The run",
        [
            ("artifact", f"{report.artifact_bytes:,} bytes for {report.parameters:,} parameters"),
            ("training", f"{report.steps:,} steps, {report.tokens:,} tokens in {duration(report.seconds)}"),
            ("speed", f"{report.tokens_per_second:,.0f} tokens/s"),
            ("device", report.device),
        ],
    )


def demo_command(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where data/demo and runs/demo go.", show_default=True)
    ] = Path(),
    seconds: Annotated[
        float, typer.Option("--seconds", min=1.0, metavar="S", help="Time limit of training.", show_default=True)
    ] = 150.0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a small model on this machine's Python documentation and compare it with zstd and xz, in four minutes."""
    use_threads(threads)
    results = run_demo(folder, seconds, console_for(as_json))
    if as_json:
        print_json(results)


def main() -> None:
    """`python -m pgolf.cli.demo`; always ends in SystemExit."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(reported(demo_command))
    app(prog_name="python -m pgolf.cli.demo")


if __name__ == "__main__":
    main()
