"""Images from a trained generator: samplers and decoders on a device, the job, the store of
samples."""

from . import image_sampler as image_sampler
from . import latent_sampler as latent_sampler
from . import prompts as prompts
from .grid import at_scale as at_scale
from .grid import draw_grid as draw_grid
from .latent_decoder import LatentDecoder as LatentDecoder
from .sample_job import sample as sample
from .sample_store import FORMAT as FORMAT

__all__ = [
    "FORMAT",
    "LatentDecoder",
    "at_scale",
    "draw_grid",
    "image_sampler",
    "latent_sampler",
    "prompts",
    "sample",
]
