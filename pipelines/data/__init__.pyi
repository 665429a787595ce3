"""Sources to planned records to uint8 crops, and the order in which training reads them. Imports no
torch."""

from . import account as account
from . import crops as crops
from . import decoding as decoding
from . import reading as reading
from . import records as records
from .order import EpochOrder as EpochOrder
from .sources import list_images as list_images
from .sources import plan_source as plan_source

__all__ = [
    "EpochOrder",
    "account",
    "crops",
    "decoding",
    "list_images",
    "plan_source",
    "reading",
    "records",
]
