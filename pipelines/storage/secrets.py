"""Keeps passwords out of recipes, MLflow's parameters, error messages and logs.

A secret is what stands before the @ of an address, or the value of an environment variable whose
name says so (TOKEN, PASSWORD, ...).
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
MIN_LENGTH = 6
_IN_ADDRESS = re.compile(r"(\w[\w+.-]*://)[^/\s@'\"]+@")
_NAMED_SECRET = re.compile(
    r"(?!.*_(?:FILE|PATH)$).*(SECRET|PASSWORD|PASSWD|TOKEN|API_KEY)", re.IGNORECASE
)


def redact(text: str) -> str:
    """`text` with *** in place of credentials in addresses and of this environment's secrets."""
    text = _IN_ADDRESS.sub(rf"\1{HIDDEN}@", text)
    for name, value in os.environ.items():
        # A value of a few letters is a flag or a word, which may occur anywhere in the text.
        if _NAMED_SECRET.match(name) and len(value) >= MIN_LENGTH and value in text:
            text = text.replace(value, HIDDEN)
    return text
