"""How a tensor may be stored, and how a policy says it (docs/spec.md §4)."""

from __future__ import annotations

import re
from dataclasses import dataclass

ENCODINGS = ("int5", "int6", "int8", "fp16", "fp32")
"""As an artifact's header names them."""

MIN_STEPS, MAX_STEPS = 0.5, 64.0

_RMS = re.compile(r"rms:([0-9]{1,2}(?:\.[0-9]{1,3})?)")


@dataclass(frozen=True)
class Encoding:
    """An encoding of a policy.

    stored: how the artifact's header names it, one of ENCODINGS.
    steps: of ``rms:k``, which is stored as int8: k, the steps of its integers to the tensor's root mean square; else
        None.
    """

    stored: str
    steps: float | None = None

    @property
    def is_integer(self) -> bool:
        """Whether it is integers with a scale for each row, which only matrices have."""
        return self.stored.startswith("int")

    @classmethod
    def parse(cls, text: object) -> Encoding:
        """Raises ValueError for what is not an encoding."""
        if isinstance(text, str):
            if text in ENCODINGS:
                return cls(text)
            if (found := _RMS.fullmatch(text)) and MIN_STEPS <= float(found[1]) <= MAX_STEPS:
                return cls("int8", float(found[1]))
        raise ValueError(f"{text!r} is not an encoding")
