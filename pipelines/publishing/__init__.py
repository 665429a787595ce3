"""Trained networks as a folder that others load: weights, their account, a model card, the Hub."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
