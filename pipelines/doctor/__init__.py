"""What can be known before a job starts: cluster, bucket, tracking server, memory."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
