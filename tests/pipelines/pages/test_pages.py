"""Pages of reports: text stays text, charts keep their points, and Chromium shows them."""

import html
import io
import math
import re

import numpy as np
from PIL import Image

from fae.pipelines.evaluation.scores_page import MEANINGS, scores_page
from fae.pipelines.pages import report_page
from fae.pipelines.pages.blocks import Chart, Commands, Picture, Table, Words
from fae.pipelines.pages.charts import Point, line_chart
from tests.browser import needs_chromium, opened

HOSTILE = "<img src=x onerror=alert(1)>"


def example() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(buffer, "PNG")
    losses = {"train/loss": [Point(step, 1 / step, HOSTILE) for step in range(1, 50)]}
    sections = [
        ("First", [Words(HOSTILE), Table(["name", "value"], [[HOSTILE, "1,024"], ["b", "0.5"]])]),
        ("Second", [Chart([line_chart("loss", losses, "step", (False, True))])]),
        ("Third", [Picture(buffer.getvalue(), HOSTILE), Commands(["fae run recipe.yaml"])]),
        ("Empty", []),
    ]
    return report_page("A report", "of a test", sections, "Made by a test.")


def test_what_is_shown_stays_text():
    page = example().decode()
    assert HOSTILE not in page and page.count("&lt;img src=x") >= 4
    assert "Empty" not in page, "a section without content is left out"
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:)[a-z]+:", page)


def test_columns_of_numbers_stand_on_the_right():
    table = Table(["a", "b", "c"], [["x", "1,024", "1 ± 2"], ["y", "", "nan"]])
    assert [table.is_number(column) for column in range(3)] == [False, True, True]


def test_a_chart_has_every_finite_point_at_its_place():
    points = [Point(1, 1.0), Point(2, math.nan), Point(3, 100.0), Point(4, 10.0, "tip", "star")]
    drawn = str(line_chart("loss", {"a": points}, "step", (False, True)))
    places = [
        tuple(map(float, pair.split(",")))
        for pair in re.search(r'points="([^"]*)"', drawn)[1].split()
    ]
    assert len(places) == 3 and drawn.count("<title>") == 3 and drawn.count("★") == 1
    (x1, y1), (x3, y3), (x4, y4) = places
    assert x1 < x3 < x4 and y3 < y4 < y1
    assert math.isclose((y1 + y3) / 2, y4, abs_tol=0.11), "10 is half-way from 1 to 100 in logs"


def test_a_chart_of_one_huge_value_is_drawn():
    for logarithmic in ((False, False), (False, True)):
        drawn = str(line_chart("loss", {"a": [Point(1, 3e17)]}, "step", logarithmic))
        assert drawn.count("<title>") == 1


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    points = [Point(step, math.sin(step)) for step in range(10_000)]
    drawn = str(line_chart("a", {"a": points}, "step"))
    assert drawn.count("<title>") == 240 and "at step 0<" in drawn and "at step 9,999<" in drawn


def test_a_chart_of_equal_values_and_one_without_any_are_drawn():
    assert "<polyline" in line_chart("a", {"a": [Point(1, 0.0), Point(2, 0.0)]}, "x", (True, True))
    assert "<svg" in line_chart("a", {}, "x")


def test_the_page_of_scores_says_what_they_mean():
    scores = {"frechet_backbone": 12.5, "num_images": 50_000.0}
    about = {"scores": scores, "warnings": ["few images"], "inputs": {"crop": "adm", "x": [1]},
             "run": {"seconds": 3.0, "versions": {"torch": "2"}}}  # fmt: skip
    page = html.unescape(scores_page(about).decode())
    for text in ("12.5", "50,000", MEANINGS["frechet_backbone"][1], "few images", "adm"):
        assert text in page


@needs_chromium
def test_a_report_opens_without_errors_and_fits_a_phone(tmp_path):
    (tmp_path / "report.html").write_bytes(example())
    with opened(tmp_path / "report.html", tmp_path / "profile") as page:
        for width in (1280, 390):
            page.size(width, 900)
            assert page.value("document.documentElement.scrollWidth") <= width
        page.click("#theme")
        assert (
            page.value("document.images.length") == 1
            and page.value("document.images[0].naturalWidth") == 8
        )
        assert page.errors == []
        assert all(url.startswith(("file:", "data:")) for url in page.requested)
