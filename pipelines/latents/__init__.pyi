"""The latent store: plan, shards, manifest, verification, reader; the job that fills it, and its
exports."""

from . import plan as plan
from . import reader as reader
from .encoder import LatentEncoder as LatentEncoder
from .export_layouts import export as export
from .inspection import inspect as inspect
from .precompute_job import precompute as precompute
from .precompute_text_job import precompute_text as precompute_text
from .reader import LatentStore as LatentStore

__all__ = [
    "LatentEncoder",
    "LatentStore",
    "export",
    "inspect",
    "plan",
    "precompute",
    "precompute_text",
    "reader",
]
