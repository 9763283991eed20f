"""Judging a folder: every rule is asked, and what it looked at or raises becomes a finding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pgolf.common.errors import DeviceError
from pgolf.common.types import StrPath
from pgolf.submission.evidence import Settings
from pgolf.submission.folder import Folder
from pgolf.submission.rules import FOLDER_RULES, RUN_RULES, Rule
from pgolf.submission.verdict import FAILED, PASSED, UNCHECKED, Broken, CheckReport, Finding, Unchecked


def check(path: StrPath, settings: Settings | None = None) -> CheckReport:
    """Judge a run folder or a submission folder, one's own or someone else's, as far as its files allow.

    Nothing in the folder is executed: scripts are parsed, logs and JSON are read, artifacts are loaded by pgolf.

    Args:
        path: a run folder, a folder that `submit` wrote, or a public submission (submission.json, logs, script).
        settings: where data and tokenizer lie, what to leave out, limits; None: as `Settings` has them.

    Returns:
        A finding for every rule and run: passed, failed, or unchecked with what was missing.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that could be judged.
        FormatError: submission.json is not a JSON object.
    """
    settings = settings or Settings()
    folder = Folder.open(Path(path), settings)
    return CheckReport(str(path), tuple(judge(folder, submission=folder.submission is not None)))


def judge(folder: Folder, submission: bool) -> Iterator[Finding]:
    """Findings in the order of the rules, then of the runs; without ``submission``, only what bare runs can show."""
    for index, rule in enumerate(RUN_RULES):
        for run in folder.runs:
            yield finding_of(rule, run, run.name)
        folder.progress("check", index + 1, len(RUN_RULES))
    yield from judge_folder(folder, [rule for rule in FOLDER_RULES if submission or rule.name == "seeds"])


def judge_folder(folder: Folder, rules: list[Rule]) -> Iterator[Finding]:
    """The findings of rules for the folder as a whole."""
    for rule in rules:
        yield finding_of(rule, folder, "")


def finding_of(rule: Rule, subject: Any, where: str) -> Finding:
    """A missing file or device leaves a rule unchecked; what is there and cannot be right breaks it.

    A rule that looked at nothing is unchecked, whatever it says.
    """
    try:
        looked = rule.judge(subject)
    except Broken as broken:
        return Finding(rule.name, where, FAILED, str(broken))
    except (Unchecked, DeviceError, OSError) as missing:
        return Finding(rule.name, where, UNCHECKED, str(missing))
    except (ValueError, ArithmeticError) as impossible:
        return Finding(rule.name, where, FAILED, str(impossible))
    if looked.count > 0:
        return Finding(rule.name, where, PASSED, looked.sentence, looked.count, looked.what)
    nothing = f"There was nothing to look at: {looked.count} {looked.what}."
    return Finding(rule.name, where, UNCHECKED, nothing, 0, looked.what)
