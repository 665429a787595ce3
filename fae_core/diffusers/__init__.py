"""FAE as models and a pipeline of the library diffusers (`pip install fae-ray[diffusers]`)."""

from fae_core.diffusers.autoencoder import AutoencoderFAE
from fae_core.diffusers.pipeline import FAEPipeline
from fae_core.diffusers.transformer import FAETransformer2DModel

__all__ = ["AutoencoderFAE", "FAEPipeline", "FAETransformer2DModel"]
