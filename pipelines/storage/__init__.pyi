"""Local and s3:// paths: whole reads and writes, retries, secrets, fingerprints, claims."""

from . import paths as paths
from . import s3 as s3
from .claims import StoreError as StoreError
from .claims import StoreMismatch as StoreMismatch
from .claims import differences as differences
from .claims import refuse_other_work as refuse_other_work
from .fingerprints import fingerprint_of as fingerprint_of
from .secrets import redact as redact

__all__ = [
    "StoreError",
    "StoreMismatch",
    "differences",
    "fingerprint_of",
    "paths",
    "redact",
    "refuse_other_work",
    "s3",
]
