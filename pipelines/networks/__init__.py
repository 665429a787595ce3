"""The networks that a recipe names or describes: loaded, built, and checked to belong together."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
