"""The text logs of other people's training scripts: step times, sizes, and scores with what was scored.

A score's line names what it is of, and that decides what it can show. From the logs of openai/parameter-golf:

- before quantisation: ``step:N/M``, ``N/M``, ``DIAGNOSTIC post_ema``, ``pre-quantization post-ema``;
- of the artifact: ``final_int8_zlib_roundtrip``, ``final_int6_sliding_window_exact``, ``final_sliding``, ``quantized``,
  ``diagnostic quantized``, ``quantized_ttt_phased``, ``legal_ttt_exact``, ``ttt_sliding:done``;
- unknown: every other name, and no name.

Only scores of the artifact can show a claim. One artifact may have several, each by another evaluation.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pgolf.submission.evidence import Claim

COARSEST = 5e-4
"""How far scores may differ however few digits they have: one without its third decimal says nothing of a record."""

Moment = Literal["before quantisation", "artifact", "unknown"]

# Some scripts give a step's time in tenths of minutes, and in milliseconds only where they stop. No run prints numbers
# of more digits than are looked for.
_STEP = re.compile(
    r"^(?:step:\s*(?P<step>\d{1,15})/(?P<planned>\d{1,15})\b.*?|(?P<stop>stopping_early:).*?)"
    r"\btrain_time:\s*(?P<time>\d{1,15}(?:\.\d{1,15})?)ms(?: step:\s*(?P<last>\d{1,15})/)?"
)
_NUMBER = r"(\d{1,9}\.\d{1,17})"
_SCORE = re.compile(rf"(?:\bsliding )?\bval_loss[:=]\s*{_NUMBER},?\s+(?:sliding )?val_bpb[:=]\s*{_NUMBER}")
_SCORING = re.compile(r"\beval_time:\s*(\d{1,15})ms")
_TOTAL = re.compile(r"^Total submission size[^:\n]*:\s*(\d{1,15}) bytes")
_CODE = re.compile(r"^Code size[^:\n]*:\s*(\d{1,15}) bytes")
_STAMP = re.compile(r"^\d{9,11}\.\d{1,9}\s+")  # seconds since 1970, before every line of some logs
_SEED_LINE, _SEED_NAME = re.compile(r"^\s*seed:\s*(\d{1,15})"), re.compile(r"seed[_-]?(\d{1,15})")

_PROGRESS = re.compile(r"(?:^|\s)(?:step:?\s*)?\d+/\d+\b|^\W*step\b")
_UNQUANTISED = re.compile(
    r"(?:pre|un|non|not|before|without|no)[-_ ]?(?:quant|export)|float|(?<![a-z\d])(?:fp|bf)(?:16|32)(?!\d)|"
    r"full[-_ ]?precision"
)
_QUANTISED = re.compile(r"quanti[sz]|round[-_ ]?trip|int\d|artifact|export")
_WEIGHTS = re.compile(r"(?<![a-z])(?:ema|swa|raw|diagnostics?|averaged?)(?![a-z])")
_EVALUATION = re.compile(r"final|sliding|(?<![a-z])ttt")

# The first that fits: UTF-32's little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class LoggedScore:
    """A line with a score: the name before it, nats per token, bits per byte, and which weights it is of.

    loss_precision, bpb_precision: half a unit of the last printed decimal, COARSEST at most.
    """

    name: str
    loss: float
    bpb: float
    moment: Moment
    loss_precision: float
    bpb_precision: float

    @property
    def evaluation(self) -> str:
        """The name without the word by which scripts print the same score again, in all its digits."""
        return self.name.replace("_exact", "")

    def shows(self, claim: Claim) -> bool:
        """Whether the claimed bits per byte are these, within the digits of the one that has fewer."""
        assert claim.val_bpb is not None
        return abs(self.bpb - claim.val_bpb) <= max(self.bpb_precision, claim.bpb_precision) * _ROUNDING

    def shows_loss(self, claim: Claim) -> bool:
        """Whether the claimed loss is this one, or none is claimed."""
        if claim.val_loss is None:
            return True
        return abs(self.loss - claim.val_loss) <= max(self.loss_precision, claim.loss_precision) * _ROUNDING


_ROUNDING = 1.001  # of half a unit: decimal fractions are not exact in binary


def moment_of(name: str) -> Moment:
    """Which weights a line's name says that it scores; see the top of this file."""
    name = name.lower()
    if _PROGRESS.search(name) or _UNQUANTISED.search(name):
        return "before quantisation"
    if _QUANTISED.search(name):
        return "artifact"
    if _WEIGHTS.search(name):
        return "before quantisation"
    return "artifact" if _EVALUATION.search(name) else "unknown"


@dataclass(frozen=True)
class TextLog:
    """What a training script printed; of several runs in one file, the last.

    ends: of steps, as (step, seconds), from (0, 0.0). planned: steps that the run was to have, 0 where no line says it.
    stopped: whether a line says that it stopped before. claim: the last score of the artifact, sizes, scoring time.
    scores: every line with a score. characters, lines: of the file, without white space around it. unreadable: why its
    text cannot be read, else "".
    """

    path: Path
    seed: str | None = None
    ends: tuple[tuple[int, float], ...] = ((0, 0.0),)
    planned: int = 0
    stopped: bool = False
    claim: Claim = field(default_factory=Claim)
    scores: tuple[LoggedScore, ...] = ()
    characters: int = 0
    lines: int = 0
    unreadable: str = ""

    @classmethod
    def read(cls, path: Path) -> TextLog:
        text, unreadable = decode(path.read_bytes())
        name = _SEED_NAME.search(path.name)
        log = cls(path, None if name is None else name[1], unreadable=unreadable)
        text = text.strip()
        log = replace(log, characters=len(text), lines=len(text.splitlines()))
        return log if unreadable else _read(log, text, named=name is not None)

    @property
    def finals(self) -> tuple[LoggedScore, ...]:
        """Scores of the artifact, each in the most digits that it is printed with."""
        finals = [score for score in self.scores if score.moment == "artifact"]
        return tuple(
            score
            for score in finals
            if not any(
                other.evaluation == score.evaluation
                and other.bpb_precision < score.bpb_precision
                and abs(other.bpb - score.bpb) <= score.bpb_precision * _ROUNDING
                for other in finals
            )
        )

    @property
    def whole(self) -> bool:
        """Whether the log goes on to training's end: the last planned step, a stop, or a score of the artifact."""
        return self.stopped or bool(self.finals) or self.ends[-1][0] >= self.planned

    @property
    def silence(self) -> str:
        """Why the log shows no score of the artifact, as a sentence."""
        if self.unreadable:
            return f"{self.path.name} {self.unreadable}."
        if not self.characters:
            return f"{self.path.name} is empty."
        if not self.scores:
            return f"{self.path.name} has no score: none of its {self.lines:,} lines has val_loss and val_bpb."
        names = ", ".join(dict.fromkeys(repr(score.name) for score in self.scores[-3:]))
        return (
            f"No line of {self.path.name} is known to score the artifact, after quantisation; the last scores there "
            f"are of {names}."
        )


def _read(log: TextLog, text: str, named: bool) -> TextLog:
    ends, planned, stopped, seed = [(0, 0.0)], 0, False, log.seed
    scores: list[LoggedScore] = []
    total: int | None = None
    code: int | None = None
    scoring: float | None = None
    for stamped in text.splitlines():
        line = _STAMP.sub("", stamped)
        if step := _STEP.match(line):
            at, seconds = int(step["step"] or step["last"] or 0), float(step["time"]) / 1000
            if at < ends[-1][0] and not step["stop"]:  # another run goes on in the same file: the last one counts
                ends, stopped, scores, total, code, scoring = [(0, 0.0)], False, [], None, None, None
            if at > ends[-1][0]:  # a step that is validated has two lines
                ends.append((at, seconds))
            planned = int(step["planned"] or planned)
            stopped = stopped or bool(step["stop"])
        if found := _SCORE.search(line):
            name = line[: found.start()].strip()
            moment = moment_of(name)
            precisions = (min(printed_precision(digits), COARSEST) for digits in found.groups())
            scores.append(LoggedScore(name, float(found[1]), float(found[2]), moment, *precisions))
            if moment == "artifact" and (took := _SCORING.search(line)):
                scoring = int(took[1]) / 1000
        elif size := _TOTAL.match(line):
            total = int(size[1])
        elif size := _CODE.match(line):
            code = int(size[1])
        elif not named and (found := _SEED_LINE.match(line)):
            seed = seed or found[1]
    log = replace(log, seed=seed, ends=tuple(ends), planned=planned, stopped=stopped, scores=tuple(scores))
    claim = Claim(code_bytes=code, total_bytes=total, score_seconds=scoring)
    if log.finals:
        last = log.finals[-1]
        claim = replace(
            claim,
            val_loss=last.loss,
            val_bpb=last.bpb,
            loss_precision=last.loss_precision,
            bpb_precision=last.bpb_precision,
        )
    return replace(log, claim=claim)


def decode(content: bytes) -> tuple[str, str]:
    """The text by its byte order mark, else as UTF-8; and why it cannot be read, or ""."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return content.decode(encoding, errors="replace"), ""
    text = content.decode("utf-8", errors="replace")
    if text.count("\0") * 4 >= len(text) > 0:
        return text, "is not UTF-8: it is full of NUL characters, as UTF-16 without a byte order mark is"
    return text, ""


def printed_precision(digits: str) -> float:
    """Half a unit of the last decimal of a number as it is printed, such as ``1.2240``: 0.00005."""
    mantissa, _, exponent = digits.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(f"5e{int(exponent or 0) - decimals - 1}")


def telling_log(logs: Sequence[TextLog], claimed: Claim) -> TextLog | None:
    """Of several logs of a seed, the one whose scores come nearest to the claim, of the artifact if any has such."""
    for scores_of in (_finals, _scores):
        having = [log for log in logs if scores_of(log)]
        if having:
            if claimed.val_bpb is None:
                return having[-1]
            bpb = claimed.val_bpb
            return min(having, key=lambda log: min(abs(score.bpb - bpb) for score in scores_of(log)))
    return logs[-1] if logs else None


def _finals(log: TextLog) -> tuple[LoggedScore, ...]:
    return log.finals


def _scores(log: TextLog) -> tuple[LoggedScore, ...]:
    return log.scores
