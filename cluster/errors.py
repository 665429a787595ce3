"""The error of a submission that cannot be made; its message is for the person who asked for it."""

from __future__ import annotations

from fae_core.errors import UserError


class SubmitError(UserError):
    """What was given, what was expected, what to do."""
