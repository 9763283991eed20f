"""`pgolf train`: a whole run, from the first step to the scored artifact."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import count
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated

import typer

from pgolf.cli.failures import Signalled, Stopped, requested_device
from pgolf.cli.interrupts import watched_interrupts
from pgolf.cli.models import DEFAULT_RECIPE, configuration, resume_command, run_config_path, there
from pgolf.cli.options import (
    ConfigOption,
    DeviceOption,
    JsonOption,
    SetOption,
    ThreadsOption,
    TokenizerOption,
    complete_recipe,
    use_threads,
)
from pgolf.cli.output import bits, console_for, key_value_table, print_json
from pgolf.common.errors import FormatError
from pgolf.config import Config, parse_override
from pgolf.runs.run_folder import data_path

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pgolf.runs.records import Report
    from pgolf.submission.ttest import TTest
    from pgolf.training.trainer import Trainer


def train_command(
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            metavar="NAME",
            autocompletion=complete_recipe,
            help="A built-in recipe; see `pgolf recipes`; default: base, and with --resume the run's configuration.",
        ),
    ] = None,
    config_file: ConfigOption = None,
    overrides: SetOption = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="DIR", help="Data folder with shards; see `pgolf data prepare`.")
    ] = None,
    tokenizer: TokenizerOption = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            metavar="DIR",
            help="Where configuration, log, checkpoint, artifact and report go; default: a new runs/RECIPE-TIME.",
        ),
    ] = None,
    no_run_dir: Annotated[
        bool, typer.Option("--no-run-dir", help="Keep nothing of the run but what is printed.")
    ] = False,
    device: DeviceOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the run folder's newest checkpoint, with its configuration.")
    ] = False,
    replay_schedule: Annotated[
        Path | None,
        typer.Option("--replay-schedule", metavar="LOG", help="Repeat the timed decisions of another run's log.jsonl."),
    ] = None,
    code: Annotated[
        Path | None,
        typer.Option("--code", metavar="FILE", help="The script whose bytes count beside the artifact's."),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            "--seeds",
            metavar="N,N,…",
            help="A run for each seed, one after the other, in the run folder's seed-N; --resume goes on with them.",
        ),
    ] = None,
    against: Annotated[
        float | None,
        typer.Option("--against", metavar="BPB", help="With --seeds: test whether the mean score is below this one."),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model by a recipe: train, average, export, reload, score.

    With --seeds several times, ending in mean, standard deviation and, --against a score, a one-sided t-test.

    Ctrl-C once writes a checkpoint and prints the command that goes on from it; twice ends at once. So do SIGTERM and
    a terminal that is closed.

    Example: pgolf train --recipe tiny --data data/demo --run-dir runs/demo --set train.max_wallclock_seconds=60
    """
    if resume and run_dir is None:
        raise ValueError("--resume needs the --run-dir of the run to go on with.")
    from pgolf.runs.records import read_report

    sweep = None if seeds is None else parse_seeds(seeds)
    if sweep is not None and run_dir is None:
        raise ValueError("--seeds needs the --run-dir in which each seed has its folder.")
    if against is not None and (sweep is None or len(sweep) < 2):
        raise ValueError("--against tests a mean: it needs --seeds with at least two of them.")
    if no_run_dir and run_dir is not None:
        raise ValueError(f"--run-dir {run_dir} and --no-run-dir are both given; give one of the two.")
    values = dict(parse_override(text) for text in overrides or [])
    given = {"data_path": data, "tokenizer_path": tokenizer, "replay": replay_schedule}
    values |= {f"train.{key}": str(path) for key, path in given.items() if path is not None}
    first = run_dir if sweep is None or run_dir is None else _begun_first(run_dir, sweep)
    config = _configuration(recipe, config_file, first if resume else None, values)
    if code is not None and not code.is_file():
        raise FileNotFoundError(f"{code}: no such script, whose bytes could be counted.")
    known = data_path(first, config) if resume and first is not None and "train.data_path" not in values else None
    if known is not None:
        there(known, "data folder", "--data")
    use_threads(threads)
    console = console_for(as_json)
    options = _options({"--device": device, "--threads": threads, "--code": code}) + ["--json"] * as_json
    if sweep is not None and run_dir is not None:
        assert seeds is not None
        options = _options({"--seeds": seeds, "--against": against}) + options
        runs = {}
        for seed in sweep:
            folder = run_dir / f"seed-{seed}"
            done = read_report(folder / "report.json") if resume else None  # a finished run is not begun again
            if done is None:
                console.print(f"Seed {seed}, in {folder}:", soft_wrap=True)
                mine, begun = config.override({"train.seed": seed}), resume and (folder / "config.toml").is_file()
                done = _train(mine, _Folder(folder), device, begun, code, console, run_dir, options)
                console.print(report_table(done))
            runs[seed] = done
        found = Sweep.of(runs, against)
        console.print(found.table())
        if as_json:
            print_json({"run_dir": str(run_dir), **found.to_dict()})
        return
    with _run_folder(run_dir, no_run_dir, recipe, config_file) as folder_made:
        report = _train(config, folder_made, device, resume, code, console, folder_made.path, options)
    run_dir = folder_made.path
    console.print(report_table(report))
    if run_dir is not None:
        console.print(_picture(run_dir), soft_wrap=True)
        console.print(f"The run is in {run_dir}.", soft_wrap=True)
    if as_json:
        print_json({"run_dir": None if run_dir is None else str(run_dir), **report.to_dict()})


def _train(
    config: Config,
    folder: _Folder,
    device: str | None,
    resume: bool,
    code: Path | None,
    console: Console,
    resumed: Path | None,
    options: list[str],
) -> Report:
    """One run. resumed, options: of the command that goes on after an interruption."""
    from pgolf.report.progress import run_with_progress
    from pgolf.training.trainer import Trainer

    with watched_interrupts(console) as watch:
        with requested_device():
            trainer = Trainer(config, run_dir=folder.path, device=device, resume=resume)
        try:
            console.print(f"{trainer.model!r}, data {trainer.data.path}")
            console.print(_memory_line(trainer))
            if folder.automatic:
                console.print(f"No --run-dir was given: the run is kept in {folder.path}.")
            if (warning := slow_run(trainer)) is not None:
                warnings.warn(warning, stacklevel=2)
            return run_with_progress(trainer, console, code)
        except (KeyboardInterrupt, Exception) as error:
            if isinstance(error, BrokenPipeError):
                raise
            cause = Signalled(signal.SIGHUP) if watch.hung_up(error) else error
            raise Stopped(cause, _keep(trainer, cause, resumed, options)) from error


def parse_seeds(text: str) -> list[int]:
    """The seeds in "1337,42,7"; raises ValueError where one is not a whole number from 0 on, or stands twice."""
    seeds = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise ValueError(f"--seeds {text}: {part!r} is not a seed; expected whole numbers and commas.")
        seeds.append(int(part))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text}: a seed stands twice; every run needs its own.")
    return seeds


def _begun_first(run_dir: Path, seeds: list[int]) -> Path:
    """The first seed's folder that has a configuration; else that of the first seed."""
    folders = [run_dir / f"seed-{seed}" for seed in seeds]
    return next((folder for folder in folders if (folder / "config.toml").is_file()), folders[0])


@dataclass(frozen=True)
class Sweep:
    """The runs of several seeds. unit: what scores are in, "bits per byte", or without a tokenizer "nats per token"."""

    runs: dict[int, Report]
    unit: str
    scores: list[float]
    test: TTest | None

    @classmethod
    def of(cls, runs: dict[int, Report], against: float | None) -> Sweep:
        """against: the score that the mean is tested to be below, in the scores' unit; None: no test."""
        from pgolf.submission.ttest import below

        scores = [report.score_bpb for report in runs.values() if report.score_bpb is not None]
        unit = "bits per byte"
        if len(scores) < len(runs):
            scores, unit = [report.score_loss for report in runs.values()], "nats per token"
        return cls(runs, unit, scores, None if against is None else below(scores, against))

    @property
    def mean(self) -> float:
        return fmean(self.scores)

    @property
    def deviation(self) -> float | None:
        """The standard deviation of a seed's score, with n − 1; None for one seed."""
        return stdev(self.scores) if len(self.scores) > 1 else None

    def table(self) -> Table:
        rows = [(f"seed {seed}", f"{score:.4f}") for seed, score in zip(self.runs, self.scores, strict=True)]
        rows.append((f"mean, {self.unit}", f"{self.mean:.5f}"))
        if self.deviation is not None:
            rows.append(("standard deviation", f"{self.deviation:.5f}"))
        if self.test is not None:
            rows.append((f"mean below {self.test.reference:g}: t, df", f"{self.test.statistic:.2f}, {self.test.df:g}"))
            rows.append(("  p (one-sided)", f"{self.test.p_value:.2g}"))
        return key_value_table("Seeds", rows)

    def to_dict(self) -> dict[str, object]:
        return {
            "runs": {str(seed): report.to_dict() for seed, report in self.runs.items()},
            "unit": self.unit,
            "mean": self.mean,
            "standard_deviation": self.deviation,
            "t_test": None if self.test is None else asdict(self.test),
        }


@dataclass(frozen=True)
class _Folder:
    """Where a run is kept; None: nowhere. automatic: in a folder that the command has made itself."""

    path: Path | None
    automatic: bool = False


@contextmanager
def _run_folder(given: Path | None, none: bool, recipe: str | None, config_file: Path | None) -> Iterator[_Folder]:
    """The run's folder; one that is made here vanishes again where a run ends before its first step and is not kept."""
    if given is not None or none:
        yield _Folder(given)
        return
    parent, name = Path("runs"), config_file.stem if config_file is not None else recipe or DEFAULT_RECIPE
    made_parent = not parent.exists()
    path = _new_folder(parent, f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        yield _Folder(path, automatic=True)
    except BaseException:
        if not _begun(path):
            for file in ("config.toml", "log.jsonl", "run.json"):
                (path / file).unlink(missing_ok=True)
            with suppress(OSError):  # something else is in there
                path.rmdir()
                if made_parent:
                    parent.rmdir()
        raise


def _new_folder(parent: Path, name: str) -> Path:
    """Makes parent/name, or where that is taken name-2, name-3 and so on."""
    for number in count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except OSError as error:
            if isinstance(error, FileExistsError) and path.exists():
                continue
            raise OSError(
                error.errno,
                f"The run folder {path} cannot be made ({error.strerror}); --run-dir names another, --no-run-dir none.",
            ) from error
        return path
    raise AssertionError("numbers do not end")


def _begun(path: Path) -> bool:
    """Whether a run folder holds a step or a checkpoint."""
    from pgolf.runs.records import read_records

    log = path / "log.jsonl"
    return (path / "checkpoint").exists() or (log.is_file() and any(record["step"] for record in read_records(log)))


def slow_run(trainer: Trainer) -> str | None:
    """The sentence that says what a run that is too large for this machine will take; None where it is not."""
    from pgolf.report.progress import duration

    expected = trainer.forecast()
    if expected is None or not expected.is_slow:
        return None
    times = f"a step takes at least {duration(expected.step)}, training {_long(expected.training)}"
    return (
        f"This run is large for this machine: {times}, validation and scoring {_long(expected.scoring)}. "
        "The recipe for two cores is tiny (--recipe tiny); fewer tokens a step are --set train.train_batch_tokens=N."
    )


def _long(seconds: float) -> str:
    from pgolf.report.progress import duration

    return f"{seconds / 86_400:,.1f} days" if seconds > 2 * 86_400 else duration(seconds)


def _memory_line(trainer: Trainer) -> str:
    """What the run keeps in memory, largest first; what shares an arena over time is not told apart."""
    rows = sorted((row for row in trainer.memory_table() if not row[0].startswith(" ")), key=lambda row: -row[1])
    parts = ", ".join(f"{what} {size:,.0f}" for what, size in rows)
    return f"memory: {sum(size for _, size in rows):,.0f} MiB ({parts}), micro-batches of {trainer.micro_batch_seqs}"


def _configuration(recipe: str | None, path: Path | None, resumed: Path | None, overrides: dict[str, object]) -> Config:
    """What the options say; without a recipe and a file a resumed run goes on with its own configuration."""
    if path is None and recipe is None and resumed is not None:
        path = run_config_path(resumed)
    return configuration(recipe, path, overrides)


def _options(values: dict[str, object]) -> list[str]:
    return [str(word) for name, value in values.items() if value is not None for word in (name, value)]


def _keep(trainer: Trainer, error: BaseException, resumed: Path | None, options: list[str]) -> str:
    """Writes the state where it is whole, and says how to go on from what is kept: with the folder `resumed`."""
    if trainer.run_dir is None or resumed is None:
        return "Nothing of the run is kept, since it has no run folder (--run-dir)."
    folder = trainer.run_dir / "checkpoint"
    trouble = ""
    # Both leave the trainer between two steps. Where a log or a checkpoint could not be written, the newest checkpoint
    # and the log up to it are what agrees; after a loss that is not finite, the weights may be no good.
    if isinstance(error, (KeyboardInterrupt, FormatError)) and _newest_step(folder) != trainer.step:
        try:
            trainer.save_checkpoint()
        except OSError as failure:
            trouble = f"{failure.strerror or failure} "
    step = _newest_step(folder)
    if step is None:
        return f"{trouble}There is no checkpoint to go on from."
    return f"{trouble}To go on after step {step:,}:\n    {resume_command(resumed, *options)}"


def _newest_step(folder: Path) -> int | None:
    from pgolf.report.inspection import checkpoint_step
    from pgolf.runs import checkpoint

    path = checkpoint.newest(folder)
    return None if path is None else checkpoint_step(path)


def _picture(run_dir: Path) -> str:
    """The sentence that says where the loss curve is, or what is missing for it."""
    picture = run_dir / "loss.png"
    if picture.is_file():
        return f"The loss curve is {picture}."
    return f"There is no {picture.name}: plots need matplotlib; install it with: pip install 'pgolf[plot]'"


def _training_time(report: Report) -> list[str]:
    from pgolf.report.progress import duration
    from pgolf.system.speed import rate_text

    parts = [duration(report.seconds), f"{report.tokens_per_second:,.0f} tokens/s"]
    if report.share_of_limit is not None and report.limit_tflops is not None:
        limit = rate_text(report.limit_tflops * 1e12)
        parts.append(f"{report.share_of_limit:.1%} of the limit of {limit}")
    return parts


def report_table(report: Report) -> Table:
    """A run's report as a table."""
    from pgolf.report.progress import duration

    rows = [("bits per byte, as trained", bits(report.val_bpb))]
    if report.val_loss_averaged is not None:
        rows.append(
            (
                f"  averaged over {report.snapshots} snapshots" if report.snapshots else "  averaged",
                bits(report.val_bpb_averaged),
            )
        )
    rows += [
        ("  quantised", bits(report.val_bpb_quantised)),
        (f"  quantised, {report.score_method}", bits(report.score_bpb)),
        ("validation loss, as trained", f"{report.val_loss:.4f}"),
        ("  quantised", f"{report.val_loss_quantised:.4f}"),
        (f"  quantised, {report.score_method}", f"{report.score_loss:.4f}"),
        ("artifact", f"{report.artifact_bytes:,} bytes"),
    ]
    if report.total_bytes is not None:
        rows.append(("artifact and code", f"{report.total_bytes:,} bytes"))
    if report.byte_basis is not None:
        from pgolf.scoring.evaluation import BASES

        rows.append(("bits per byte are of", BASES[report.byte_basis]))
    rows += [
        ("limit", f"{report.limit_bytes:,} bytes, {'it fits' if report.fits else 'exceeded'}"),
        ("parameters", f"{report.parameters:,}"),
        ("steps, tokens", f"{report.steps:,}, {report.tokens:,}"),
        ("training time", ", ".join(_training_time(report))),
        ("scoring time", duration(report.score_seconds)),
        ("device", report.device),
    ]
    if report.peak_memory_mib is not None:
        rows.append(("peak memory", f"{report.peak_memory_mib:,.0f} MiB"))
    return key_value_table("Report", rows)
