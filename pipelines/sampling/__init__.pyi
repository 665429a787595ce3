"""Images from a trained generator: samplers and decoders on a device, the job, the store of
samples."""

from . import grid as grid
from . import guide as guide
from . import image_sampler as image_sampler
from . import latent_sampler as latent_sampler
from . import prompts as prompts
from .latent_decoder import LatentDecoder as LatentDecoder
from .sample_job import sample as sample
from .sample_store import FORMAT as FORMAT

__all__ = [
    "FORMAT",
    "LatentDecoder",
    "grid",
    "guide",
    "image_sampler",
    "latent_sampler",
    "prompts",
    "sample",
]
