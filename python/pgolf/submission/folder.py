"""A folder as a whole: one run, or a submission with a run for each seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pgolf.common.types import Progress
from pgolf.submission.claims import PublicRun, claim_of, named_seeds, read_submission, seed_claims
from pgolf.submission.evidence import RUN_FILES, Claim, Evidence, Library, RunFolder, Settings
from pgolf.submission.logs import TextLog, telling_log
from pgolf.submission.verdict import Unchecked

SUBMISSION, README = "submission.json", "README.md"
_LOGS = ("*.log", "train*.txt", "*log*.txt", "logs/*.txt", "logs/*.log")


class Folder:
    """What is judged.

    path: as it was given. submission: submission.json's values, None for bare runs. runs: what is known of each seed.
    """

    def __init__(self, path: Path, submission: dict[str, Any] | None, runs: list[Evidence], progress: Progress) -> None:
        self.path, self.submission, self.runs, self.progress = path, submission, runs, progress

    @classmethod
    def open(cls, path: Path, settings: Settings) -> Folder:
        """A run folder, a submission that pgolf wrote, or another one.

        Raises FileNotFoundError where it is none of them, FormatError where submission.json is not a JSON object.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder; a run folder or a submission is expected.")
        if (path / "config.toml").is_file():
            return cls.of_runs([path], settings)
        if not (path / SUBMISSION).is_file():
            raise FileNotFoundError(f"{path}: this folder holds neither a run's config.toml nor a {SUBMISSION}.")
        submission, library = read_submission(path / SUBMISSION), Library()
        if settings.code is None:
            settings = replace(settings, code=_script(path))
        ours: list[Evidence] = [
            RunFolder(config.parent, settings, library, config.parent.name)
            for config in sorted(path.glob("*/config.toml"))
            # A config.toml alone may be another program's.
            if any((config.parent / name).is_file() for name in RUN_FILES if name != config.name)
        ]
        return cls(path, submission, ours or _public_runs(path, settings, library, submission), settings.progress)

    @classmethod
    def of_runs(cls, runs: list[Path], settings: Settings) -> Folder:
        """Run folders that are to become a submission; they share their validation data."""
        library = Library()
        path = runs[0] if len(runs) == 1 else Path(" ".join(map(str, runs)))
        evidence: list[Evidence] = [RunFolder(run, settings, library, str(run)) for run in runs]
        return cls(path, None, evidence, settings.progress)

    @property
    def script(self) -> Path:
        """The submission's script."""
        script = _script(self.path)
        if script is None:
            raise Unchecked(f"{self.path} holds no train_gpt.py and no other single script.")
        return script

    @property
    def logs(self) -> list[Path]:
        """The submission's training logs."""
        return _logs(self.path)


def _script(path: Path) -> Path | None:
    named = path / "train_gpt.py"
    if named.is_file():
        return named
    scripts = sorted(script for script in path.glob("*.py") if script.is_file())
    return scripts[0] if len(scripts) == 1 else None


def _logs(path: Path) -> list[Path]:
    return sorted({log for pattern in _LOGS for log in path.glob(pattern) if log.is_file()})


def _public_runs(path: Path, settings: Settings, library: Library, submission: dict[str, Any]) -> list[Evidence]:
    """One for every seed that submission.json or a log names; where they name none or one, one for the folder."""
    claimed = seed_claims(submission)
    logs: dict[str | None, list[TextLog]] = {}
    for log in map(TextLog.read, _logs(path)):
        logs.setdefault(log.seed, []).append(log)
    seeds = list(dict.fromkeys([*named_seeds(submission), *(seed for seed in logs if seed is not None)]))
    whole = claim_of(submission)
    if len(seeds) < 2:
        every = [log for each in logs.values() for log in each]
        return [PublicRun(path, settings, library, path.name, telling_log(every, whole), whole)]
    sizes = Claim(code_bytes=whole.code_bytes, total_bytes=whole.total_bytes)
    runs: list[Evidence] = []
    for seed in seeds:
        claim = claimed.get(seed, sizes)
        claim = replace(
            claim,
            code_bytes=sizes.code_bytes if claim.code_bytes is None else claim.code_bytes,
            total_bytes=sizes.total_bytes if claim.total_bytes is None else claim.total_bytes,
        )
        runs.append(PublicRun(path, settings, library, f"seed {seed}", telling_log(logs.get(seed, []), claim), claim))
    other = telling_log([log for log in logs.get(None, []) if log.scores], whole)
    if other is not None and not named_seeds(submission):
        runs.append(PublicRun(path, settings, library, other.path.name, other, sizes))
    return runs
