"""Types that several rooms speak of."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Union

StrPath = Union[str, "os.PathLike[str]"]

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total)."""
