"""What text files can hold."""

from __future__ import annotations

import textwrap


def has_utf8(text: str) -> bool:
    """Whether a text has a UTF-8 form. One with lone surrogates has none: Python so keeps bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def wrapped(text: str, width: int, first: str = "", following: str = "") -> list[str]:
    """Lines of a text, broken between words and nowhere else: a file name can be copied.

    A word longer than ``width`` has a line that is too long. first, following: what the lines begin with.
    """
    wrapper = textwrap.TextWrapper(width, first, following, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text) or [first.rstrip()]
