"""The native thread pool's size. Results do not depend on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pgolf import _C

_T = TypeVar("_T")
_U = TypeVar("_U")


def set_num_threads(n: int) -> None:
    """Use n CPU threads (1 to 1024) from the next call on; the environment's PGOLF_NUM_THREADS sets the first value.

    Raises ValueError outside that range.
    """
    _C.set_num_threads(n)


def get_num_threads() -> int:
    """The number of CPU threads in use; at first, one for each core."""
    return _C.get_num_threads()


def on_threads(function: Callable[[_T], _U], values: Iterable[_T]) -> list[_U]:
    """[function(value) for value in values], by as many threads as pgolf uses: for a `function` without the GIL."""
    with ThreadPoolExecutor(get_num_threads()) as pool:
        return list(pool.map(function, values))
