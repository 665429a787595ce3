"""The latent store: plan, shards, manifest, verification, reader; the job that fills it, and its
exports."""

from .encoder import LatentEncoder as LatentEncoder
from .export_layouts import export as export
from .inspection import inspect as inspect
from .precompute_job import precompute as precompute
from .reader import NO_LABEL as NO_LABEL
from .reader import LatentBatch as LatentBatch
from .reader import LatentStore as LatentStore
from .verify import verify_store as verify_store

__all__ = [
    "NO_LABEL",
    "LatentBatch",
    "LatentEncoder",
    "LatentStore",
    "export",
    "inspect",
    "precompute",
    "verify_store",
]
