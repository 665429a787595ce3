"""The error of a submission that cannot be made; its message is for the person who asked for it."""

from __future__ import annotations


class SubmitError(Exception):
    """What was given, what was expected, what to do. `fae` shows it alone and ends with status 2."""
