"""Ray: the session, calls and actor pools spread over it, progress, metrics. Imports no torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
