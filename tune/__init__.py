"""Sweeps over recipes with Ray Tune: the search, and the report about its trials."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
