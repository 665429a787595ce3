"""Errors of latent stores: one that is unusable, and one that belongs to other work."""

from __future__ import annotations

from fae_core.errors import UserError


class StoreError(UserError, ValueError):
    """A latent store that cannot be read or completed; the message says why."""


class StoreMismatch(StoreError):
    """The output holds the store of another model, recipe or source; the message names which."""
