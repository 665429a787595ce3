"""A place belongs to the work that was first written there; other work is refused with what differs."""

from __future__ import annotations

from fae_core.errors import UserError


class StoreError(UserError, ValueError):
    """A latent store that cannot be read or completed; the message says why."""


class StoreMismatch(StoreError):
    """The output holds another model's, recipe's or source's store; the message names the part that differs."""
