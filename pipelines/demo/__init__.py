"""`fae demo`: the shipped networks at work in some minutes, and one page that shows it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
