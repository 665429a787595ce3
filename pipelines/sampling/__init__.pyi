"""Images from a trained generator: samplers and decoders on a device, the job, the store of
samples."""

from .grid import draw_grid as draw_grid
from .image_sampler import ImageSampler as ImageSampler
from .image_sampler import draw_images as draw_images
from .latent_decoder import LatentDecoder as LatentDecoder
from .latent_sampler import LatentSampler as LatentSampler
from .latent_sampler import image_noise as image_noise
from .sample_job import sample as sample
from .sample_store import FORMAT as FORMAT

__all__ = [
    "FORMAT",
    "ImageSampler",
    "LatentDecoder",
    "LatentSampler",
    "draw_grid",
    "draw_images",
    "image_noise",
    "sample",
]
