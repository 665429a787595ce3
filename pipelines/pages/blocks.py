"""What the pages of reports consist of: words, tables, pictures, charts and commands.

A job puts these in sections, and `report_page` makes the page. Values are escaped by the template.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .rendering import render


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str
    kind: str = "words"


@dataclass(frozen=True)
class Commands:
    """Lines for the terminal."""

    lines: Sequence[str]
    kind: str = "commands"


@dataclass(frozen=True)
class Table:
    """A table; cells that are numbers stand on the right. `marked` are rows that stand out."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[int] = ()
    kind: str = "table"

    def is_number(self, column: int) -> bool:
        """Whether every cell of the column that is not empty is a number."""
        cells = [row[column] for row in self.rows if row[column]]
        return bool(cells) and all(map(_is_number, cells))


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption, which also describes it to those who cannot see it."""

    png: bytes
    caption: str
    kind: str = "picture"

    @property
    def address(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Chart:
    """Charts side by side, as charts.py draws them, with a common caption."""

    drawings: Sequence[Markup]
    caption: str = ""
    kind: str = "chart"


Block = Words | Commands | Table | Picture | Chart
Section = tuple[str, Sequence[Block]]
"""A heading, empty for none, and what stands below it."""


def report_page(title: str, about: str, sections: Sequence[Section], made_by: str) -> bytes:
    """The page as one HTML file in UTF-8."""
    shown = [(heading, blocks) for heading, blocks in sections if blocks]
    return render(
        "report.html.j2", title=title, about=about, sections=shown, made_by=made_by
    ).encode()


def _is_number(text: str) -> bool:
    try:
        json.loads(text.replace(",", "").removesuffix(" %").split(" ± ")[0])
    except ValueError:
        return text in ("nan", "inf", "-inf", "–")
    return True
