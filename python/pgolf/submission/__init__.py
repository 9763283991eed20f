"""Submissions: check a run or a submission folder against the competition's rules, and write one that keeps them.

>>> report = pgolf.submission.checking("runs/a")
>>> for finding in report.findings: print(finding.outcome, finding.rule, finding.count, finding.what, finding.sentence)
>>> pgolf.submission.submit(["runs/a", "runs/b"], "records/mine", code="train_gpt.py", name="Mine", author="me")

rules.py holds the rules, one small function each; docs/submission.md says what each of them reads.
"""

from __future__ import annotations

from pgolf import _moved
from pgolf.submission.checking import check as check
from pgolf.submission.evidence import Settings as Settings
from pgolf.submission.verdict import CheckReport as CheckReport
from pgolf.submission.verdict import Finding as Finding
from pgolf.submission.verdict import Refused as Refused
from pgolf.submission.writing import About as About
from pgolf.submission.writing import Written as Written
from pgolf.submission.writing import submit as submit

__all__ = ["About", "CheckReport", "Finding", "Refused", "Settings", "Written", "check", "submit"]

_moved.keep_names(__name__)
