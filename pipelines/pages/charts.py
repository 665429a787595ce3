"""Charts as SVG inside a page: lines and points, each point with its values as a tooltip."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .rendering import render

WIDTH, HEIGHT = 460.0, 280.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 14.0, 14.0, 42.0
MOST_POINTS = 240
"""Points of one line; a longer one is thinned evenly."""
NUM_SERIES_COLOURS = 4


@dataclass(frozen=True)
class Point:
    """A place in a chart; `tip` is shown beside the values, `mark` is plain, star or hollow."""

    x: float
    y: float
    tip: str = ""
    mark: str = "plain"


def line_chart(
    title: str,
    series: Mapping[str, Sequence[Point]],
    x_label: str,
    logarithmic: tuple[bool, bool] = (False, False),
    joined: bool = True,
) -> Markup:
    """An SVG of the series by name, each in its colour, with its points joined or not.

    `logarithmic` are the axes x and y; an axis with a value of 0 or below stays linear. Points that
    are not finite are left out.
    """
    kept = {
        name: _thinned([p for p in points if math.isfinite(p.x) and math.isfinite(p.y)])
        for name, points in series.items()
    }
    every = [point for points in kept.values() for point in points]
    x_axis = _Axis([p.x for p in every], logarithmic[0], LEFT, WIDTH - RIGHT)
    y_axis = _Axis([p.y for p in every], logarithmic[1], HEIGHT - BOTTOM, TOP)
    drawn = [
        {
            "name": name,
            "colour": f"var(--series-{number % NUM_SERIES_COLOURS})",
            "path": " ".join(f"{x_axis.place(p.x):.1f},{y_axis.place(p.y):.1f}" for p in points),
            "points": [
                {
                    "x": round(x_axis.place(p.x), 1),
                    "y": round(y_axis.place(p.y), 1),
                    "mark": p.mark,
                    "tip": f"{name}: {number_text(p.y)} at {x_label} {number_text(p.x)}"
                    + (f"\n{p.tip}" if p.tip else ""),
                }
                for p in points
            ],
        }
        for number, (name, points) in enumerate(kept.items())
    ]
    return Markup(
        render(
            "chart.svg.j2",
            title=title,
            x_label=x_label,
            width=WIDTH,
            height=HEIGHT,
            left=LEFT,
            right=WIDTH - RIGHT,
            bottom=HEIGHT - BOTTOM,
            x_ticks=x_axis.ticks(),
            y_ticks=y_axis.ticks(),
            series=drawn,
            joined=joined,
            small=max(map(len, kept.values()), default=0) > 60,
        )
    )


def number_text(value: float) -> str:
    """The number with four digits; an exponent only below a thousandth or from a million on."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


class _Axis:
    """Values on a stretch of pixels, linear or logarithmic."""

    def __init__(self, values: Sequence[float], logarithmic: bool, start: float, end: float):
        self.logarithmic = logarithmic and bool(values) and min(values) > 0
        self.start, self.end = start, end
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        self.low, self.high = self._scaled(low), self._scaled(high)
        if self.low == self.high:
            half = max(0.5, 1e-3 * abs(self.low))  # 0.5 is lost beside a large number
            self.low, self.high = self.low - half, self.high + half
        edge = 0.04 * (self.high - self.low)
        self.low, self.high = self.low - edge, self.high + edge

    def place(self, value: float) -> float:
        share = (self._scaled(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """(pixel, text) of some round values."""
        return [(round(self.place(v), 1), number_text(v)) for v in self._round_values()]

    def _round_values(self) -> list[float]:
        if self.logarithmic:
            exponents = range(math.floor(self.low) - 1, math.ceil(self.high) + 1)
            for digits in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
                values = [digit * 10.0**e for e in exponents for digit in digits]
                inside = [v for v in values if self.low <= math.log10(v) <= self.high]
                if len(inside) >= 3:
                    return inside[:: max(1, len(inside) // 6)]
        low, high = (10**b if self.logarithmic else b for b in (self.low, self.high))
        rough = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * f for f in (1, 2, 5, 10) if power * f >= rough)
        first = math.ceil(low / step)
        return [step * n for n in range(first, math.floor(high / step) + 1)]

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.logarithmic else value


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= MOST_POINTS:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]
