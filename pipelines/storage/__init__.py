"""Local and s3:// paths: whole reads and writes, retries, secrets, fingerprints, claims."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
