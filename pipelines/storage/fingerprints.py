"""One hash of the parts that decide a result, given as words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def fingerprint_of(parts: Mapping[str, Any]) -> str:
    """SHA-256 of `parts`, whose values are plain JSON, independent of their order; 64 hex
    digits.
    """
    return hashlib.sha256(json.dumps(dict(sorted(parts.items()))).encode()).hexdigest()
