"""What a rule comes to: what it looked at, or one of the two ways in which it does not pass; and a check as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

PASSED, FAILED, UNCHECKED = "passed", "failed", "unchecked"
INCOMPLETE = "incomplete"
"""Of a whole check: no rule is broken, and not every rule could be checked."""


class Broken(Exception):
    """A rule is broken; the message is the whole sentence that says how."""


class Unchecked(Exception):
    """The files at hand do not show whether a rule holds; the message is the sentence that says what is missing."""


@dataclass(frozen=True)
class Looked:
    """What a rule looked at and found to hold.

    count: how many things it looked at; at 0 the rule does not pass, as there was nothing that could have broken it.
    what: their kind, in the plural ("training steps"). sentence: what was seen.
    """

    count: int
    what: str
    sentence: str


@dataclass(frozen=True)
class Finding:
    """What one rule says of one run, or of the folder as a whole.

    rule: its name. where: the run's name, or "" for the folder. outcome: "passed", "failed" or "unchecked".
    sentence: what was seen, what is wrong, or what is missing. count, what: how many things the rule looked at, and
    their kind; 0 and "" where it came to nothing that it could count. A rule that passed has looked at one at least.
    """

    rule: str
    where: str
    outcome: str
    sentence: str
    count: int = 0
    what: str = ""


@dataclass(frozen=True)
class CheckReport:
    """The findings of a check, in the order of the rules.

    path: the folder, or the runs that were looked at, as text.
    """

    path: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> tuple[Finding, ...]:
        """Findings of rules that were checked, and hold."""
        return self._having(PASSED)

    @property
    def failed(self) -> tuple[Finding, ...]:
        """Findings of broken rules."""
        return self._having(FAILED)

    @property
    def unchecked(self) -> tuple[Finding, ...]:
        """Findings of rules that could not be checked."""
        return self._having(UNCHECKED)

    @property
    def verdict(self) -> str:
        """failed: a rule is broken; incomplete: none is, but one, or all, could not be checked; passed: all hold."""
        if self.failed:
            return FAILED
        return INCOMPLETE if self.unchecked or not self.passed else PASSED

    @property
    def ok(self) -> bool:
        """Whether every rule was checked, and holds: the verdict is "passed"."""
        return self.verdict == PASSED

    def _having(self, outcome: str) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.outcome == outcome)

    def to_dict(self) -> dict[str, Any]:
        """Every field, the verdict and how many findings came to what, with JSON's types."""
        return {
            "path": self.path,
            "verdict": self.verdict,
            "ok": self.ok,
            "passed": len(self.passed),
            "failed": len(self.failed),
            "unchecked": len(self.unchecked),
            "findings": [asdict(finding) for finding in self.findings],
        }


def grouped(findings: Iterable[Finding]) -> list[tuple[Finding, list[str]]]:
    """Findings that say the same of several runs as one, with the places of all."""
    groups: dict[Finding, tuple[Finding, list[str]]] = {}
    for finding in findings:
        key = replace(finding, where="")
        groups.setdefault(key, (finding, []))[1].append(finding.where)
    return list(groups.values())


class Refused(ValueError):
    """A submission that was not written, as a rule is broken or could not be checked; ``report`` says which."""

    def __init__(self, report: CheckReport) -> None:
        reasons = (_reason(*group) for group in grouped((*report.failed, *report.unchecked)))
        super().__init__(f"The submission is refused: {' '.join(reasons)}")
        self.report = report


def _reason(finding: Finding, places: list[str]) -> str:
    where = f"{', '.join(places)}: " if any(places) else ""
    return f"[{where}{finding.rule}{', not checked' * (finding.outcome == UNCHECKED)}] {finding.sentence}"
