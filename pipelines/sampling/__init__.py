"""Images from a trained generator: samplers and decoders on a device, the job, the store of
samples."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
