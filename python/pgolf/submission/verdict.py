"""What a check comes to: findings, and the two ways in which a rule does not pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

PASSED, FAILED, UNCHECKED = "passed", "failed", "unchecked"


class Broken(Exception):
    """A rule is broken; the message is the whole sentence that says how."""


class Unchecked(Exception):
    """The files at hand do not show whether a rule holds; the message is the sentence that says what is missing."""


@dataclass(frozen=True)
class Finding:
    """What one rule says of one run, or of the folder as a whole.

    rule: its name. where: the run's name, or "" for the folder. outcome: "passed", "failed" or "unchecked".
    sentence: what was seen, what is wrong, or what is missing.
    """

    rule: str
    where: str
    outcome: str
    sentence: str


@dataclass(frozen=True)
class CheckReport:
    """The findings of a check, in the order of the rules.

    path: the folder, or the runs that were looked at, as text.
    """

    path: str
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[Finding, ...]:
        """Findings of broken rules."""
        return self._having(FAILED)

    @property
    def unchecked(self) -> tuple[Finding, ...]:
        """Findings of rules that could not be checked."""
        return self._having(UNCHECKED)

    @property
    def ok(self) -> bool:
        """Whether every rule was checked, and holds."""
        return not self.failed and not self.unchecked

    def _having(self, outcome: str) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.outcome == outcome)

    def to_dict(self) -> dict[str, Any]:
        """Every field and the outcome, with JSON's types."""
        counts = {"failed": len(self.failed), "unchecked": len(self.unchecked)}
        return {"path": self.path, "ok": self.ok, **counts, "findings": [asdict(finding) for finding in self.findings]}


def grouped(findings: Iterable[Finding]) -> list[tuple[Finding, list[str]]]:
    """Findings that say the same of several runs as one, with the places of all."""
    groups: dict[tuple[str, str, str], tuple[Finding, list[str]]] = {}
    for finding in findings:
        key = finding.rule, finding.outcome, finding.sentence
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
