"""The base of every error whose message is for the person who ran the command: shown alone, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Says what is wrong and what to do; commands print it and end with a non-zero status."""
