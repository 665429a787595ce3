"""`fae demo`: the whole of it once at a small size, and what its parts do."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.demo import demo_job
from fae.pipelines.demo.command import CommandFailed, run_command
from fae.pipelines.demo.demo_page import Found, demo_page
from fae.pipelines.demo.figures import Kept, captioned_pictures, kept_by_stages
from fae.pipelines.demo.screen import Screen
from fae.pipelines.runtime.session import start_ray
from fae_core.errors import UserError
from fae_core.figures import picture_grid
from tests.browser import needs_chromium, opened

NETWORKS = ["autoencoder.checkpoint=shipped:emoji", "pixel_decoder.checkpoint=shipped:emoji"]


@pytest.fixture(scope="module")
def local_ray():
    ray = pytest.importorskip("ray")
    start_ray(num_cpus=2)
    yield
    ray.shutdown()


def test_the_time_left_follows_the_machine(capsys):
    screen = Screen({"one": 10.0, "two": 30.0})
    assert screen._left("one", 0.5) == "about 35 s left"
    with screen.stage("one") as advance:
        advance(0.5)
    screen.seconds["one"] = 40.0  # four times as slow as expected
    assert screen._left("two", 0.5) == "about 60 s left"
    with screen.stage("two"):
        screen.say("done")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["1/2  one   about 40 s left", "2/2  two   about 2 min left", "     done"]


def test_a_command_is_logged_killed_and_its_failure_told(tmp_path):
    log, told = tmp_path / "log", []
    assert not run_command(["--version"], log, "127.0.0.1:1", lambda: 0.25, told.append)
    assert re.search(r"^\$ fae --version\nfae \d", log.read_text(), re.M) and set(told) == {0.25}
    with pytest.raises(CommandFailed, match=r"ended with status 2: .*No such command.*\n.*resumes"):
        run_command(["trian"], log, "127.0.0.1:1", lambda: 0.0, told.append)
    words = ["recipes"]
    assert run_command(words, log, "127.0.0.1:1", lambda: 0.5, told.append, kill_at=0.5)
    assert log.read_text().endswith("$ fae recipes\n\n(killed by the demo)\n")


def test_pictures_go_through_every_stage_and_captions_find_their_own():
    recipe = load_recipe("emoji-dinov2s", NETWORKS)
    kept = kept_by_stages(recipe, {"emoji": demo_job.HELD_OUT})
    assert kept.figure.startswith(b"\x89PNG") and kept.cosines["emoji"] > 0.95
    found = captioned_pictures(recipe, demo_job.HELD_OUT, ["baby light skin tone", "no such"])
    assert found[0].shape == (128, 128, 3) and found[0].dtype == np.uint8 and found[1] is None
    own = captioned_pictures(recipe, demo_job.HELD_OUT, demo_job.PROMPTS)
    assert not any(picture is None for picture in own), "a prompt of the demo was not held out"


def test_an_empty_prompt_and_a_folder_without_pictures_are_told(tmp_path):
    with pytest.raises(UserError, match="--prompt ' ' is empty"):
        demo_job.run_demo(str(tmp_path / "demo"), prompts=[" "])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--images .*empty: .*holds no files"):
        demo_job.run_demo(str(tmp_path / "demo"), images=str(tmp_path / "empty"))


@needs_chromium
def test_the_page_opens_alone_with_its_pictures_and_its_curve(write_store, tmp_path):
    png = picture_grid([[np.full((8, 8, 3), 200, np.uint8)]], ["<b>one</b>"])
    found = Found(
        Kept(png, {"photographs": 0.9}), write_store(tmp_path / "store"), 3,
        {"train/loss": [(6, 0.4), (12, 0.3)]}, png, {"one": 12.0}, ["fae precompute R"], ["fae x"],
    )  # fmt: skip
    path = tmp_path / "demo.html"
    path.write_bytes(demo_page(found, 34.0))
    with opened(path, tmp_path / "browser") as page:
        widths = page.value("[...document.images].map(i => i.naturalWidth)")
        assert len(widths) == 2 and min(widths) > 0
        assert page.value("document.querySelectorAll('svg circle, svg path').length") > 0
        text = page.value("document.body.innerText")
        assert "when 3 of 3 shards were there" in text and "in 34 s" in text
        outside = [url for url in page.requested if not url.startswith("data:")]
        assert not page.errors and outside == [path.as_uri()]


@pytest.mark.integration
def test_the_demo_survives_the_death_of_its_driver_and_ends_in_a_page(
    tmp_path, monkeypatch, capsys, local_ray
):
    monkeypatch.setattr(demo_job, "STEPS", 6)
    monkeypatch.setattr(demo_job, "SHARD_SIZE", 16)
    folder = tmp_path / "demo"
    demo_job.run_demo(str(folder), images=demo_job.TRAINING_IMAGES, prompts=["a red cat"])
    printed = capsys.readouterr().out
    assert re.search(r"killed at \d of 6 shards, resumed: 93 latents, every shard", printed)
    assert not re.search(r"ray|mlflow|Warning|pid=", printed.replace("Ray Data", ""))
    page = (folder / "demo.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<svg" in page
    assert "killed the driver (SIGKILL) when" in page and "fae precompute emoji-dinov2s" in page

    demo_job.run_demo(str(folder), images=demo_job.TRAINING_IMAGES, prompts=["a red cat"])
    assert "an earlier run had finished it" in capsys.readouterr().out
    assert os.path.getsize(folder / "demo.html") < 5e6
