"""Sweeps over recipes with Ray Tune: the search, and the report about its trials."""

from .sweep import SearchError as SearchError
from .sweep import report as report
from .sweep import search as search
from .sweep_status import status_of_sweep as status_of_sweep

__all__ = ["SearchError", "report", "search", "status_of_sweep"]
