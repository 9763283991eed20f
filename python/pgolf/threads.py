"""The native thread pool's size. Results do not depend on it."""

from __future__ import annotations

from pgolf import _C


def set_num_threads(n: int) -> None:
    """Use n CPU threads (1 to 1024) from the next call on; the environment's PGOLF_NUM_THREADS sets the first value.

    Raises ValueError outside that range.
    """
    _C.set_num_threads(n)


def get_num_threads() -> int:
    """The number of CPU threads in use; at first, one for each core."""
    return _C.get_num_threads()
