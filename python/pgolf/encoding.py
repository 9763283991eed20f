"""How a tensor may be stored, and how a policy says it (docs/spec.md §4)."""

from __future__ import annotations

import re
from dataclasses import dataclass

ENCODINGS = ("int4", "int5", "int6", "int7", "int8", "fp16", "fp32")
"""As an artifact's header names them; a policy may add a clip."""

_CLIPPED = re.compile(r"int([4-8]):([1-9][0-9]{0,2})")


@dataclass(frozen=True)
class Encoding:
    """An encoding of a policy: ``int6``, or with a clip of its own, ``int6:23``.

    stored: how the artifact's header names it, one of ENCODINGS.
    clip: c, the largest integer, for rows scaled by max|row|/c; None for floats and for ``int8``, whose rows the
        recipes scale by a quantile.
    """

    stored: str
    clip: int | None

    @classmethod
    def parse(cls, text: object) -> Encoding:
        """Raises ValueError for what is no encoding."""
        if isinstance(text, str):
            if text in ENCODINGS:
                plain = text.startswith("int") and text != "int8"
                return cls(text, cls.largest(int(text[3:])) if plain else None)
            if found := _CLIPPED.fullmatch(text):
                bits, clip = int(found[1]), int(found[2])
                if clip <= cls.largest(bits):
                    return cls(f"int{bits}", clip)
                raise ValueError(f"{text!r} has a clip above {cls.largest(bits)}, the largest integer of {bits} bits")
        raise ValueError(f"{text!r} is no encoding")

    @classmethod
    def of_clip(cls, clip: int) -> str:
        """The text of the fewest bits that hold clip: ``int6`` for 31, ``int6:23`` for 23."""
        bits = max(clip.bit_length() + 1, 4)
        return f"int{bits}" if clip == cls.largest(bits) and bits < 8 else f"int{bits}:{clip}"

    @staticmethod
    def largest(bits: int) -> int:
        """2^(bits−1) − 1."""
        return (1 << (bits - 1)) - 1
