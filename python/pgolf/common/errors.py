"""The package's own error types; everything else is Python's (ValueError, TypeError, ...)."""

from __future__ import annotations


class FormatError(ValueError):
    """A file is not what it should be: the message names the file, what was found and what was expected."""


class DeviceError(RuntimeError):
    """A device cannot be used: the message says why and what would mend it."""


class NonFiniteError(ArithmeticError):
    """A loss, gradient or weight became NaN or infinite: the message names the step or the tensor."""
