"""Sources to planned records to uint8 crops, and the training order. Imports no torch."""

from . import crops as crops
from . import decoding as decoding
from . import reading as reading
from . import records as records
from .order import EpochOrder as EpochOrder
from .sources import list_images as list_images
from .sources import plan_images as plan_images

__all__ = ["EpochOrder", "crops", "decoding", "list_images", "plan_images", "reading", "records"]
