"""Training under Ray Train: one loop, one file a trainer, checkpoints, feeds, logs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
