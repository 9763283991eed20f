"""Writing a submission: judged before a file is made, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pgolf import __version__
from pgolf.common.files import atomic_write, naming, sync_folder
from pgolf.common.text import has_utf8
from pgolf.common.types import StrPath
from pgolf.runs.records import Report, read_report
from pgolf.submission.checking import judge, judge_folder
from pgolf.submission.evidence import RUN_FILES, Evidence, Settings
from pgolf.submission.folder import README, SUBMISSION, Folder
from pgolf.submission.rules import FOLDER_RULES, RUN_RULES
from pgolf.submission.ttest import TTest, below
from pgolf.submission.verdict import CheckReport, Finding, Refused, grouped

MARGIN_NATS = 0.005
"""By how much a record must beat the one before it, in nats per token (the competition's rule, at p < 0.01)."""
_TRACK = (16_000_000, 600.0)  # bytes, seconds: of the competition's own track
_CODE_PLACES = ("train_gpt.py", "examples/train_gpt.py")


@dataclass(frozen=True)
class About:
    """What only the author knows: the submission's name, who made it, one sentence, and Markdown for the README."""

    name: str
    author: str
    github_id: str = ""
    blurb: str = ""
    readme: str = ""
    day: str = field(default_factory=lambda: date.today().isoformat())


@dataclass(frozen=True)
class Written:
    """A submission that was written: its folder, the findings, submission.json's values, the test if there is one."""

    path: Path
    report: CheckReport
    submission: dict[str, Any]
    test: TTest | None


def submit(
    runs: Sequence[StrPath],
    out: StrPath,
    about: About,
    *,
    against: float | None = None,
    baseline: Sequence[StrPath] = (),
    margin_nats: float = MARGIN_NATS,
    settings: Settings | None = None,
    force: bool = False,
) -> Written:
    """Judge runs, and write them as a submission folder if every rule was checked and holds.

    Args:
        runs: run folders of one configuration and different seeds.
        out: the folder to write; it appears whole or not at all.
        about: what the author says.
        against: bits per byte that the runs are to beat, for a one-sided t-test of their mean.
        baseline: run folders in its place; with the same seeds the test is paired, else Welch's.
        margin_nats: by how much they are to be beaten, in nats per token.
        settings: as for `check`; its code is the submission's script; None: train_gpt.py or examples/train_gpt.py.
        force: replace an earlier submission.

    Raises:
        Refused: a rule is broken or could not be checked; every reason is named, and nothing is written.
        FileExistsError: ``out`` holds files, and either ``force`` was not given or they are no submission of pgolf's.
        ValueError: no run; the current folder as ``out``; both against and baseline; either with one run on a side; a
            baseline without bits per byte or with a seed twice.
        FileNotFoundError: a run or the script is missing.
    """
    settings = _with_code(settings or Settings())
    target = Path(out)
    _check_target(target, force)
    for what, text in {**asdict(about), "script": str(settings.code)}.items():
        if not has_utf8(text):
            raise ValueError(f"The submission's {what} is {text!a}, which is not UTF-8, as its README must be.")
    if not runs:
        raise ValueError("A submission needs at least one run folder.")
    if against is not None and baseline:
        raise ValueError("The score to beat is given twice, as against and as baseline.")
    if (against is not None or baseline) and (len(runs) < 2 or len(baseline) == 1):
        raise ValueError("A t-test needs at least two runs on a side; give more, or no score to beat.")
    folders = [Path(run) for run in runs]
    for run in (*folders, *map(Path, baseline)):
        if not (run / "config.toml").is_file():
            raise FileNotFoundError(f"{run}: this folder is not a run folder, as it holds no config.toml.")
    others = [_report_of(Path(run)) for run in baseline]
    if len({report.seed for report in others}) < len(others):
        raise ValueError(f"The baseline's runs have the seeds {[r.seed for r in others]}; each may stand there once.")

    folder = Folder.of_runs(folders, settings)
    report = CheckReport(str(folder.path), tuple(judge(folder, submission=False)))
    if not report.ok:
        raise Refused(report)
    names = {run.name: f"seed{run.report.seed}" for run in folder.runs}
    findings = [replace(finding, where=names.get(finding.where, "")) for finding in report.findings]
    test = _test(folder, against, others, margin_nats)
    submission = _submission(folder, about, settings, test)
    place = Path(os.path.realpath(target))  # of a link, what it leads to
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    missing = [parent for parent in place.parents if not parent.exists()]
    try:
        with naming(partial):
            partial.mkdir(parents=True)
            _write(partial, folder, about, submission, test, findings)
            written = Folder.open(partial, replace(settings, code=None))
            of_folder = tuple(judge_folder(written, FOLDER_RULES))
            report = CheckReport(str(target), (*(f for f in findings if f.where), *of_folder))
            if not report.ok:
                raise Refused(report)
            _put(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):  # not empty: the submission lies there
                parent.rmdir()
    return Written(target, report, submission, test)


def _with_code(settings: Settings) -> Settings:
    if settings.code is not None:
        if not Path(settings.code).is_file():
            raise FileNotFoundError(f"{settings.code}: no such script, whose bytes count.")
        return settings
    for place in map(Path, _CODE_PLACES):
        if place.is_file():
            return replace(settings, code=place)
    raise FileNotFoundError(
        f"There is no {' and no '.join(_CODE_PLACES)} here; name the script whose bytes count (code)."
    )


def _check_target(target: Path, force: bool) -> None:
    if target.exists() and target.samefile(Path.cwd()):
        raise ValueError(f"{target}: this is the current folder, which cannot be replaced; name another one.")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise FileExistsError(f"{target}: this is a file; a submission is a folder.")
    if not force:
        raise FileExistsError(f"{target}: the folder holds files; choose another, or replace it (force=True, --force).")
    try:
        ours = "pgolf" in json.loads((target / SUBMISSION).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise FileExistsError(f"{target}: the folder holds files that are no submission of pgolf's; choose another.")


def _report_of(run: Path) -> Report:
    report = read_report(run / "report.json")
    if report is None:
        raise FileNotFoundError(f"{run} holds no report.json; a finished run's folder does.")
    if report.score_bpb is None:
        raise ValueError(f"{run} has no bits per byte to compare with.")
    return report


# ---- What the folder says


def _test(folder: Folder, against: float | None, others: list[Report], margin_nats: float) -> TTest | None:
    """The t-test on bits per byte; the margin is turned from nats per token by the runs' own bytes per token."""
    reports = _reports(folder)
    bpb, loss = _bpb(reports), [report.score_loss for report in reports]
    margin = margin_nats * fmean(bpb) / fmean(loss)
    bases = {report.byte_basis for report in (*reports, *others) if report.byte_basis is not None}
    if len(bases) > 1:
        warnings.warn(
            "Bits per byte of the runs and of the baseline are over the bytes of different texts "
            f"({', '.join(sorted(bases))}); their difference says little.",
            stacklevel=3,
        )
    if others:
        mine = {report.seed: value for report, value in zip(reports, bpb, strict=True)}
        theirs = {report.seed: value for report, value in zip(others, _bpb(others), strict=True)}
        if mine.keys() == theirs.keys():
            return below([mine[seed] for seed in sorted(mine)], [theirs[seed] for seed in sorted(mine)], margin, True)
        return below(bpb, _bpb(others), margin)
    return None if against is None else below(bpb, against, margin)


def _submission(folder: Folder, about: About, settings: Settings, test: TTest | None) -> dict[str, Any]:
    reports = _reports(folder)
    code = Path(settings.code or "").stat().st_size
    bpb, loss = _bpb(reports), [report.score_loss for report in reports]
    several = len(reports) > 1
    in_track = settings.limit_bytes <= _TRACK[0] and 0 < settings.limit_seconds <= _TRACK[1]
    return {
        "author": about.author,
        "github_id": about.github_id,
        "name": about.name,
        "blurb": about.blurb,
        "date": about.day,
        "track": "10min_16mb" if in_track else "non_record_16mb",
        "val_loss": fmean(loss),
        "val_bpb": fmean(bpb),
        "val_loss_std": stdev(loss) if several else None,
        "val_bpb_std": stdev(bpb) if several else None,
        "seeds": [report.seed for report in reports],
        "seed_results": {
            str(report.seed): {
                "val_loss": report.score_loss,
                "val_bpb": report.score_bpb,
                "artifact_bytes": report.artifact_bytes,
                "bytes_total": report.artifact_bytes + code,
                "steps": report.steps,
                "ms_per_step": 1000 * report.seconds / max(report.steps, 1),
                "train_seconds": report.seconds,
                "eval_seconds": report.score_seconds,
            }
            for report in reports
        },
        "bytes_total": max(report.artifact_bytes for report in reports) + code,
        "bytes_code": code,
        "byte_basis": reports[0].byte_basis,
        "hardware": reports[0].device,
        "p_value": None if test is None else test.p_value,
        "t_test": None if test is None else {**asdict(test), "statistic": repr(test.statistic)},
        "pgolf": __version__,
    }


def _reports(folder: Folder) -> list[Report]:
    return [run.report for run in folder.runs]


def _bpb(reports: Sequence[Report]) -> list[float]:
    return [report.score_bpb for report in reports if report.score_bpb is not None]


def _write(
    out: Path, folder: Folder, about: About, submission: dict[str, Any], test: TTest | None, findings: Sequence[Finding]
) -> None:
    for run in folder.runs:
        name = f"seed{run.report.seed}"
        kept = out / name
        kept.mkdir()
        for file in RUN_FILES:
            _copy(run.path / file, kept / file)
        _copy(_train_log(run), out / f"train_{name}.log")
        sync_folder(kept)
    script = folder.runs[0].code
    _copy(script, out / script.name)
    with atomic_write(out / SUBMISSION) as target:
        target.write(json.dumps(submission, indent=2, allow_nan=False).encode() + b"\n")
    with atomic_write(out / README) as target:
        target.write(readme(submission, about, test, findings, script.name).encode())


def _train_log(run: Evidence) -> Path:
    """The lines of the script that ran (examples/train_gpt.py writes them beside runs/), else the run's own log."""
    lines = run.path.resolve().parent.parent / "logs" / f"{run.path.resolve().name}.txt"
    return lines if lines.is_file() else run.path / "log.jsonl"


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as content, atomic_write(target) as file:
        shutil.copyfileobj(content, file)


def _put(partial: Path, target: Path) -> None:
    """Give the finished folder its name; what had it before goes only when that has been done."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    replaced = target.exists()
    if replaced:
        os.replace(target, old)
    try:
        os.replace(partial, target)
    except BaseException:
        if replaced:
            os.replace(old, target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


# ---- README


def readme(
    submission: dict[str, Any], about: About, test: TTest | None, findings: Sequence[Finding], script: str
) -> str:
    """README.md: score, the author's words, seeds with mean and deviation, the test, the rules, what is here."""
    results = submission["seed_results"]
    rows = [
        f"| {seed} | {r['val_loss']:.6f} | {r['val_bpb']:.6f} | {r['artifact_bytes']:,} | {r['bytes_total']:,} | "
        f"{r['steps']:,} | {r['ms_per_step']:.1f} | {r['train_seconds']:.1f} | {r['eval_seconds']:.1f} |"
        for seed, r in results.items()
    ]
    rows.append(f"| **mean** | **{submission['val_loss']:.6f}** | **{submission['val_bpb']:.6f}** | | | | | | |")
    if submission["val_bpb_std"] is not None:
        rows.append(
            f"| **standard deviation** | {submission['val_loss_std']:.6f} | {submission['val_bpb_std']:.6f} "
            "| | | | | | |"
        )
    reasons = {rule.name: rule.reason for rule in (*RUN_RULES, *FOLDER_RULES)}
    seen: dict[str, str] = {}
    for finding, places in grouped(findings):
        where = f"{', '.join(places)}: " if any(places) and len(places) < len(results) else ""
        seen[finding.rule] = (f"{seen[finding.rule]}<br>" if finding.rule in seen else "") + where + finding.sentence
    first = next(iter(results))
    parts = [
        f"# {about.name}",
        f"**val_bpb {submission['val_bpb']:.5f}**, mean of {_count(len(results), 'seed')}; at most "
        f"{submission['bytes_total']:,} bytes of code and artifact. {about.blurb}".rstrip(),
        about.readme.strip(),
        "## Seeds",
        "| seed | val_loss | val_bpb | artifact, bytes | with code | steps | ms/step | training, s | scoring, s |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n" + "\n".join(rows),
        "" if test is None else describe_test(test),
        f"Device: {submission['hardware']}; pgolf {submission['pgolf']}.",
        "## Again",
        f"```sh\npgolf train --config seed{first}/config.toml --data DATA --run-dir runs/seed{first} --code {script}\n"
        "pgolf check . --data DATA\n```",
        f"`{script}` is the script whose bytes count. `seed*/` are the runs: configuration, log, artifact, report; "
        "`train_seed*.log` their logs.",
        "## Rules",
        "Checked by `pgolf submit` before this folder was written:",
        "| rule | seen |\n| --- | --- |\n"
        + "\n".join(f"| {reason} | {seen[name]} |" for name, reason in reasons.items() if name in seen),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def describe_test(test: TTest) -> str:
    """The test in a sentence."""
    kinds = {
        "one-sample": "against the stated score of",
        "paired": "paired by seed with the baseline's runs, whose mean is",
        "welch": "(Welch's, as the seeds are others) against the baseline's runs, whose mean is",
    }
    lower = test.margin - test.difference
    return (
        f"One-sided t-test {kinds[test.kind]} {test.reference:.6f}: the mean is {abs(lower):.6f} bits per byte "
        f"{'lower' if lower >= 0 else 'higher'}; that it is lower by more than {test.margin:.6f} has t = "
        f"{test.statistic:.3f} with {test.df:.4g} degrees of freedom, p = {test.p_value:.3g}."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
