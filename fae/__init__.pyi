"""Feature Auto-Encoders on Ray, as a library: `import fae` imports nothing heavy until it is
used.
"""

from .library import FeatureAutoencoder as FeatureAutoencoder
from .library import load as load
from .library import sample as sample
from .pipelines.latents import LatentStore as LatentStore
from .version import __version__ as __version__

__all__ = ["FeatureAutoencoder", "LatentStore", "__version__", "load", "sample"]
