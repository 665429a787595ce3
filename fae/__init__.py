"""Feature Auto-Encoders on Ray, as a library: `import fae` imports nothing heavy until it is
used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
