"""The latent store: plan, shards, manifest, verification, reader; the job that fills it, and its
exports."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
