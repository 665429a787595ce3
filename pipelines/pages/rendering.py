"""Fills the templates of pages with Jinja2. A page is one HTML file that loads nothing.

Every value is escaped, and the page's own policy (base.html.j2) allows no address but data inside
it: names of files and captions of strangers stay text.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """The page that `template`, a file of TEMPLATES, makes of `values`."""
    return _environment().get_template(template).render(**values)


def asset(name: str) -> Markup:
    """The text of a script or style of TEMPLATES, to stand in a page as it is."""
    return Markup((TEMPLATES / name).read_text("utf-8"))


def embedded(data: Any) -> Markup:
    """`data` as JSON for a script element: no value can end the element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(asset=asset, embedded=embedded)
    return environment
