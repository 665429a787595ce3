"""Sources to planned records to uint8 crops, and the order in which training reads them. Imports no
torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
