"""Sources to planned records to uint8 crops, and the order in which training reads them. Imports no torch."""

from . import records as records
from .crops import CROPS as CROPS
from .crops import decode_records as decode_records
from .decoding import DECODE_CPUS as DECODE_CPUS
from .decoding import WINDOW_BATCHES as WINDOW_BATCHES
from .decoding import decoded as decoded
from .listing import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from .order import EpochOrder as EpochOrder
from .reading import read_records as read_records
from .sources import list_images as list_images
from .sources import plan_images as plan_images

__all__ = [
    "CROPS",
    "DECODE_CPUS",
    "IMAGE_SUFFIXES",
    "WINDOW_BATCHES",
    "EpochOrder",
    "decode_records",
    "decoded",
    "list_images",
    "plan_images",
    "read_records",
    "records",
]
