"""What makes an evaluation or a probe impossible; each message says what to change."""

from __future__ import annotations

from fae_core.errors import UserError


class EvaluationError(UserError, ValueError):
    """A comparison that cannot be made, for example a score with a reference it cannot use."""


class ScoresMismatch(UserError, ValueError):
    """The output holds the scores of another comparison; the message names what differs."""


class ProbeError(UserError, ValueError):
    """Images that cannot be probed; the message says what is missing."""
