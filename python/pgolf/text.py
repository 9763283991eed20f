"""What text files can hold."""

from __future__ import annotations


def has_utf8(text: str) -> bool:
    """Whether a text has a UTF-8 form. One with lone surrogates has none: Python so keeps bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
