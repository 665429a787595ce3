"""Pages that people look at: one HTML file each, which needs no server and no network."""

from . import blocks as blocks
from . import charts as charts
from .blocks import report_page as report_page
from .rendering import render as render

__all__ = ["blocks", "charts", "render", "report_page"]
