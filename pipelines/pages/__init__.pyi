"""Pages that people look at: one HTML file each, which needs no server and no network."""

from . import rendering as rendering
from .rendering import embedded as embedded
from .rendering import render as render

__all__ = ["embedded", "render", "rendering"]
