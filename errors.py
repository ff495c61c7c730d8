"""The one refusal at the root of all: what a user gave cannot be used, and the message says what would do.

Every error that blames input is an `InputError`; the command line prints those, and errors of the operating system, in
one line. Any other exception is a fault of Prestage, and shows where it happened.
"""

from __future__ import annotations


class InputError(ValueError):
    """What was given cannot be used; the message names it, and says what would be right.

    A `ValueError`, so that pydantic's validators may raise it and callers may catch either.
    """
