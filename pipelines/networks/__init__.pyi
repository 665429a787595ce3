"""The networks that a recipe names or describes: loaded, built, and checked to belong together."""

from . import text_encoder as text_encoder
from . import untrained as untrained
from .loading import autoencoder_of as autoencoder_of
from .loading import backbone_fingerprints as backbone_fingerprints
from .loading import backbone_of as backbone_of
from .loading import check_fingerprints as check_fingerprints
from .loading import features_of as features_of
from .loading import load_checkpoint as load_checkpoint

__all__ = [
    "autoencoder_of",
    "backbone_fingerprints",
    "backbone_of",
    "check_fingerprints",
    "features_of",
    "load_checkpoint",
    "text_encoder",
    "untrained",
]
