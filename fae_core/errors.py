"""Errors whose message is for the user: commands print it without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """An error whose message says what is wrong and what to do.

    Commands print the message alone and exit with a non-zero status.
    """


class TooFewImages(UserError, ValueError):
    """There are fewer images than a score needs."""
