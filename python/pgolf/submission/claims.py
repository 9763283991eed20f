"""Other people's words for things: what submission.json claims, and a run of which there is only that and a text log.

The public folders of openai/parameter-golf have no schema. What is read here are the names that most of them use; a
name that is not found makes a rule unchecked, never passed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgolf.common.errors import FormatError
from pgolf.scoring.evaluation import BASES
from pgolf.submission.evidence import GPU_STEPS_IN_FLIGHT, Claim, Evidence, Library, Settings, Timeline, kept
from pgolf.submission.logs import TextLog, printed_precision
from pgolf.submission.verdict import Unchecked

_LOSS, _BPB = ("val_loss", "mean_val_loss", "val_loss_mean"), ("val_bpb", "mean_val_bpb", "val_bpb_mean")
_CODE = ("bytes_code", "code_bytes")
_TOTAL = ("bytes_total", "total_bytes", "artifact_bytes_max", "artifact_bytes", "artifact_size_bytes")
_STEPS = ("steps", "step_stop", "train_steps")
SCORE_NAMES = _BPB
"""What submission.json may call its bits per byte."""

_CLAIMED = ("val_loss", "val_bpb", "code_bytes", "total_bytes", "score_seconds", "steps")


class Printed(float):
    """A number of a JSON file, with half a unit of its last printed decimal as ``precision``."""

    precision: float

    def __new__(cls, digits: str) -> Printed:
        number = super().__new__(cls, digits)
        number.precision = printed_precision(digits)
        return number


def read_submission(path: Path) -> dict[str, Any]:
    """submission.json, its decimal fractions as `Printed`; raises FormatError where it is not a JSON object."""
    try:
        value = json.loads(path.read_bytes(), parse_float=Printed)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: this is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: this is a JSON {type(value).__name__}; an object is expected.")
    return value


def claim_of(values: Mapping[str, Any]) -> Claim:
    """What submission.json, or one of its seed_results, claims."""
    loss, bpb = _first(values, _LOSS), _first(values, _BPB)
    basis = values.get("byte_basis")
    return Claim(
        val_loss=None if loss is None else float(loss),
        val_bpb=None if bpb is None else float(bpb),
        total_bytes=_count(_first(values, _TOTAL)),
        code_bytes=_count(_first(values, _CODE)),
        steps=_count(_first(values, _STEPS)),
        loss_precision=_precision(loss),
        bpb_precision=_precision(bpb),
        byte_basis=basis if basis in BASES else None,
    )


def _count(value: float | None) -> int | None:
    return None if value is None else int(value)


def impossible(values: Mapping[str, Any]) -> str | None:
    """A sentence on the first score or size here that no run can have: no finite number above 0; None if there is none.

    What is null, absent or no number at all claims nothing.
    """
    for name in (*_LOSS, *_BPB, *_TOTAL, *_CODE):
        value = values.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            continue
        if not (_is_finite(value) and value > 0):
            told = f"{value:g}" if isinstance(value, float) else str(value)[:20]
            return f"{name} is {told}; a finite number above 0 is expected."
    return None


def seed_results(values: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What submission.json has of each seed, by seed: its seed_results, or its seeds where these are an object."""
    for name in ("seed_results", "seeds"):
        seeds = values.get(name)
        if isinstance(seeds, dict):
            return {str(seed): result for seed, result in seeds.items() if isinstance(result, dict)}
    return {}


def seed_claims(values: Mapping[str, Any]) -> dict[str, Claim]:
    """The claims in submission.json's seed_results, by seed."""
    return {seed: claim_of(result) for seed, result in seed_results(values).items()}


def named_seeds(values: Mapping[str, Any]) -> list[str]:
    """Every seed that submission.json names: in its seed_results, in its list of seeds, or as its one seed."""
    listed, one = values.get("seeds"), values.get("seed")
    named = [*seed_results(values), *(listed if isinstance(listed, list) else []), one]
    return list(
        dict.fromkeys(str(seed) for seed in named if isinstance(seed, (int, str)) and not isinstance(seed, bool))
    )


def _first(values: Mapping[str, Any], names: Sequence[str]) -> int | float | None:
    """The first of these that is a finite number."""
    for name in names:
        value = values.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value):
            return value
    return None


def _is_finite(value: int | float) -> bool:
    # abs is exact for an integer of any size, which a float need not hold; NaN is not below anything.
    return abs(value) <= sys.float_info.max


def _precision(value: int | float | None) -> float:
    """Half a unit of a number's last printed decimal; 0 where there is none."""
    if value is None:
        return 0.0
    return value.precision if isinstance(value, Printed) else printed_precision(repr(value))


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
        sources = {name: logged if getattr(self.claimed, name) is None else self.claimed for name in _CLAIMED}
        values = {name: getattr(source, name) for name, source in sources.items()}
        return Claim(
            **values,
            loss_precision=sources["val_loss"].loss_precision,
            bpb_precision=sources["val_bpb"].bpb_precision,
        )

    @kept
    def timeline(self) -> Timeline:
        if self.log is not None and self.log.unreadable:
            raise Unchecked(self.log.silence)
        if self.log is None or len(self.log.ends) < 2:
            raise Unchecked(f"No log in {self.path} has lines of the form step:N/M … train_time:Tms.")
        if not self.log.whole:
            raise Unchecked(
                f"{self.log.path.name} ends at step {self.log.ends[-1][0]:,} of {self.log.planned:,}, without a line "
                "that says that the run stopped there."
            )
        return Timeline(self.log.ends, GPU_STEPS_IN_FLIGHT, self.log.path.name, self.claimed.steps)
