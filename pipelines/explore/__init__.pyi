"""One page about pictures, their features and their latents."""

from . import pictures as pictures
from .exploration import explore_data as explore_data
from .explore_job import explore as explore

__all__ = ["explore", "explore_data", "pictures"]
