"""The latent store: plan, shards, manifest, verification, reader; the job that fills it, and its
exports."""

from . import plan as plan
from . import reader as reader
from .encoder import LatentEncoder as LatentEncoder
from .export_layouts import export as export
from .inspection import inspect as inspect
from .precompute_job import precompute as precompute
from .reader import LatentStore as LatentStore
from .verify import verify_store as verify_store

__all__ = [
    "LatentEncoder",
    "LatentStore",
    "export",
    "inspect",
    "plan",
    "precompute",
    "reader",
    "verify_store",
]
