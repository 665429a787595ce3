"""One hash of the parts that decide a result, given as words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping


def fingerprint_of(parts: Mapping[str, str]) -> str:
    """SHA-256 of `parts`, independent of their order."""
    return hashlib.sha256(json.dumps(dict(sorted(parts.items()))).encode()).hexdigest()
