"""The script that draws what the shipped networks make of pictures."""

import sys

import pytest
from PIL import Image

from examples import shipped_networks


@pytest.mark.integration
def test_the_figure_has_a_row_for_every_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped_networks, "NUM_PICTURES", 2)
    monkeypatch.setattr(sys, "argv", ["shipped_networks.py", str(tmp_path / "figure.png")])
    shipped_networks.main()
    width, height = Image.open(tmp_path / "figure.png").size
    assert height > 1.5 * width, "five rows of two pictures"
