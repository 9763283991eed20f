"""Arguments as functions take them."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def checked_integer(value: Any, name: str, low: int, high: int) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; an integer was expected.")
    number = int(value)
    if not low <= number <= high:
        raise ValueError(f"{name} is {value}; {low} … {high} was expected.")
    return number
