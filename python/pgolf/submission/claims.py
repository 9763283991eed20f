"""Other people's words for things: submission.json and the training scripts' text logs.

The public folders of openai/parameter-golf have no schema. What is read here are the names that most of them use; a
name that is not found makes a rule unchecked, never passed.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from pgolf.errors import FormatError
from pgolf.submission.evidence import GPU_STEPS_IN_FLIGHT, Claim, Evidence, Library, Settings, Timeline, kept
from pgolf.submission.verdict import Unchecked

_LOSS, _BPB = ("val_loss", "mean_val_loss", "val_loss_mean"), ("val_bpb", "mean_val_bpb", "val_bpb_mean")
_CODE = ("bytes_code", "code_bytes")
_TOTAL = ("bytes_total", "total_bytes", "artifact_bytes_max", "artifact_bytes", "artifact_size_bytes")

_CLAIMED = ("val_loss", "val_bpb", "code_bytes", "total_bytes", "score_seconds")

# Some scripts give a step's time in tenths of minutes, and in milliseconds only where they stop. No run prints numbers
# of more digits than are looked for.
_STEP = re.compile(
    r"^(?:step:\s*(?P<step>\d{1,15})/\d+\b.*?|stopping_early:.*?)\btrain_time:\s*(?P<time>\d{1,15}(?:\.\d+)?)ms"
    r"(?: step:\s*(?P<last>\d{1,15})/)?",
    re.M,
)
_FINAL = re.compile(r"\bval_loss:\s*(\d+\.\d+)\s+val_bpb:\s*(\d+\.\d+)")
_SCORING = re.compile(r"\beval_time:\s*(\d{1,15})ms")
_TOTAL_LINE = re.compile(r"^Total submission size[^:\n]*:\s*(\d{1,15}) bytes", re.M)
_CODE_LINE = re.compile(r"^Code size[^:\n]*:\s*(\d{1,15}) bytes", re.M)
_SEED_LINE, _SEED_NAME = re.compile(r"^seed:\s*(\d+)", re.M), re.compile(r"seed[_-]?(\d+)")


def read_submission(path: Path) -> dict[str, Any]:
    """submission.json; raises FormatError where it is no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: this is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: this is a JSON {type(value).__name__}; an object is expected.")
    return value


def claim_of(values: Mapping[str, Any]) -> Claim:
    """What submission.json, or one of its seed_results, claims."""
    loss, bpb = _first(values, _LOSS), _first(values, _BPB)
    sizes = {name: _first(values, names) for name, names in (("total_bytes", _TOTAL), ("code_bytes", _CODE))}
    return Claim(
        val_loss=loss,
        val_bpb=bpb,
        loss_precision=_precision(loss),
        bpb_precision=_precision(bpb),
        **{name: None if value is None else int(value) for name, value in sizes.items()},
    )


def seed_claims(values: Mapping[str, Any]) -> dict[str, Claim]:
    """The claims in submission.json's seed_results, by seed."""
    seeds = values.get("seed_results")
    if not isinstance(seeds, dict):
        return {}
    return {str(seed): claim_of(result) for seed, result in seeds.items() if isinstance(result, dict)}


def _first(values: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """The first of these that is a finite number."""
    for name in names:
        value = values.get(name)
        # abs is exact for an integer of any size, which a float need not hold.
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
            return float(value)
    return None


def _precision(value: float | None) -> float:
    """Half a unit of a number's last printed decimal; 0 where there is none."""
    if value is None:
        return 0.0
    exponent = Decimal(repr(value)).as_tuple().exponent
    assert isinstance(exponent, int)  # no infinity and no NaN
    return 0.5 * 10.0**exponent


@dataclass(frozen=True)
class TextLog:
    """What a training script printed: the ends of steps as (step, seconds), the last claim, and every val_bpb."""

    path: Path
    seed: str | None
    ends: tuple[tuple[int, float], ...]
    claim: Claim
    scores: tuple[float, ...]

    @classmethod
    def read(cls, path: Path) -> TextLog:
        text = path.read_text(encoding="utf-8", errors="replace")
        ends = [(0, 0.0)]
        for line in _STEP.finditer(text):
            step, seconds = int(line["step"] or line["last"] or 0), float(line["time"]) / 1000
            if step < ends[-1][0]:  # another run goes on in the same file: the last one counts
                ends = [(0, 0.0)]
            if step > ends[-1][0]:  # a step that is validated has two lines
                ends.append((step, seconds))
        finals = list(_FINAL.finditer(text))
        last = finals[-1] if finals else None
        claim = Claim() if last is None else claim_of({"val_loss": float(last[1]), "val_bpb": float(last[2])})
        totals, codes, scoring = (line.findall(text) for line in (_TOTAL_LINE, _CODE_LINE, _SCORING))
        seed = _SEED_NAME.search(path.name) or _SEED_LINE.search(text)
        return cls(
            path,
            None if seed is None else seed[1],
            tuple(ends),
            replace(
                claim,
                total_bytes=int(totals[-1]) if totals else None,
                code_bytes=int(codes[-1]) if codes else None,
                score_seconds=int(scoring[-1]) / 1000 if scoring else None,
            ),
            tuple(float(line[2]) for line in finals),
        )


def telling_log(logs: Sequence[TextLog], claimed: Claim) -> TextLog | None:
    """Of several logs of a seed, one that shows the claimed score, else the last."""
    if claimed.val_bpb is None or not any(log.scores for log in logs):
        return logs[-1] if logs else None
    bpb = claimed.val_bpb
    return min((log for log in logs if log.scores), key=lambda log: min(abs(score - bpb) for score in log.scores))


class PublicRun(Evidence):
    """One seed of a public submission folder: a text log, and what submission.json says of it; either may be absent."""

    def __init__(
        self, path: Path, settings: Settings, library: Library, name: str, log: TextLog | None, claimed: Claim
    ) -> None:
        super().__init__(path, settings, library, name)
        self.log, self.claimed = log, claimed

    @kept
    def claim(self) -> Claim:
        """submission.json's where it has one, else the log's, value by value."""
        logged = self.log.claim if self.log is not None else Claim()
        sources = {name: self.claimed if getattr(self.claimed, name) else logged for name in _CLAIMED}
        values = {name: getattr(source, name) for name, source in sources.items()}
        return Claim(
            **values,
            loss_precision=sources["val_loss"].loss_precision,
            bpb_precision=sources["val_bpb"].bpb_precision,
        )

    @kept
    def timeline(self) -> Timeline:
        if self.log is None or len(self.log.ends) < 2:
            raise Unchecked(f"No log in {self.path} has lines of the form step:N/M … train_time:Tms.")
        return Timeline(self.log.ends, GPU_STEPS_IN_FLIGHT, self.log.path.name)
