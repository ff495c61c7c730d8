"""The base of all errors about input: the message says what was given, and what would be right.

Every error that blames input is an `InputError`; the command line prints those, and errors of the operating system, in
one line. Any other exception is a fault of Prestage, and shows where it happened.
"""

from __future__ import annotations


class InputError(ValueError):
    """What was given cannot be used; the message names it, and says what would be right.

    A `ValueError`, so that pydantic's validators may raise it and callers may catch either.
    """
