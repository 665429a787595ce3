"""`fae explore` makes one page that shows true cosines, and works by mouse, keyboard and
touch."""

import base64
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fae.cli import app
from fae.pipelines.config.recipe import RecipeError, load_recipe
from fae.pipelines.data.sources import plan_source
from fae.pipelines.explore import exploration, explore_job, pictures
from fae.pipelines.explore.pictures import ExploreError
from fae.pipelines.latents.plan import ensure_plan
from tests.browser import needs_chromium, opened
from tests.tiny import SMALLEST_BACKBONE, TINY, noisy_jpegs

HOSTILE = "</script><script>throw 1</script>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two classes, an untrained autoencoder, its recipe, and a page."""
    folder = tmp_path_factory.mktemp("explore")
    for index, data in enumerate(noisy_jpegs(12)):
        place = folder / "images" / ("cats" if index % 2 else HOSTILE.replace("/", "_"))
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index:02d}.jpg").write_bytes(data)
    recipe = load_recipe("photos-dinov2s", [*TINY, *SMALLEST_BACKBONE])
    save_autoencoder_of(recipe, folder / "run" / "autoencoder.safetensors")
    (folder / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    explored = run(folder, "--images", "10")
    assert explored.exit_code == 0, explored.output
    return folder


def save_autoencoder_of(recipe, path: Path) -> None:
    import torch

    from fae.pipelines.networks.loading import backbone_fingerprints, backbone_of
    from fae.pipelines.networks.untrained import build_autoencoder
    from fae_core import checkpoint

    path.parent.mkdir()
    backbone = backbone_of(recipe)
    torch.manual_seed(0)
    network = build_autoencoder(recipe.autoencoder, backbone.spec)
    checkpoint.save(path, network, backbone_fingerprints(recipe, backbone))


def run(folder: Path, *options: str):
    places = ["explore", str(folder / "images"), "-o", str(folder / "explore.html")]
    network = str(folder / "run" / "autoencoder.safetensors")
    return CliRunner().invoke(app, [*places, "--autoencoder", network, *options])


def data_of(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>',
                      page.read_text(), re.S)  # fmt: skip
    return json.loads(found[1])


def test_the_page_is_one_file_without_an_address(made):
    text = (made / "explore.html").read_text()
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text))
    assert {address.removeprefix("http:") for address in addresses} <= {"//www.w3.org"}
    assert "default-src 'none'" in text and "<script>throw" not in text
    data = data_of(made / "explore.html")
    assert len(data["images"]) == 10 and data["grid"] == [2, 2]
    assert sorted(data["labels"]) == sorted(["cats", HOSTILE.replace("/", "_")])
    assert all(len(kind["neighbours"][0]) == 6 for kind in data["kinds"])
    assert all(-1e-6 <= image["error"] <= 2 for image in data["images"])


def test_cosines_of_the_bytes_are_those_of_the_tokens():
    random = np.random.default_rng(0)
    basis = random.normal(size=(12, 96))
    tokens = (random.normal(size=(5, 16, 12)) @ basis + 2).astype(np.float32)
    values, scales = exploration.quantized(tokens)
    assert values.dtype == np.int8 and values.shape == (5, 16, 48)
    exact, near = exploration._unit(tokens), values * scales[..., None]
    cosines = [np.einsum("d,npd->np", part[0, 0], part) for part in (exact, near)]
    assert np.abs(cosines[0] - cosines[1]).max() < 0.02
    assert exploration.cosine_difference(tokens, values, scales) < 0.01
    broken = values.copy()
    broken[..., 0] = 0
    assert exploration.cosine_difference(tokens, broken, scales) > 0.01


def test_neighbours_are_the_nearest_others_by_cosine():
    vectors = np.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0]])
    assert [[other for other, _ in row] for row in exploration.neighbours(vectors)] == [
        [1, 2],
        [0, 2],
        [1, 0],
    ]


def test_pictures_are_spread_over_what_is_there():
    assert pictures._spread(5, 10) == [0, 1, 2, 3, 4]
    assert pictures._spread(100, 3) == [0, 49, 99]


def test_a_store_knows_its_networks(made, tmp_path):
    recipe = load_recipe("photos-dinov2s", [*TINY, *SMALLEST_BACKBONE,
                         f"data.path={made / 'images'}"])  # fmt: skip
    recipe.autoencoder.checkpoint = str(made / "run" / "autoencoder.safetensors")
    source = plan_source(recipe.data)
    store = str(tmp_path / "store")
    ensure_plan(store, source.table, 8, {"backbone": "b"}, source.account.to_dict())
    (tmp_path / "store" / "recipe.yaml").write_text(recipe.to_yaml())
    (tmp_path / "store" / "recipe.yaml").write_text("a_key_of_another_version: 1")
    with pytest.raises(RecipeError, match="store/recipe.yaml:\n  unknown key"):
        pictures.pictures_of([store], None, 4)
    (tmp_path / "store" / "recipe.yaml").write_text(recipe.to_yaml())
    page = tmp_path / "of_store.html"
    result = CliRunner().invoke(app, ["explore", store, "-o", str(page), "--images", "4"])
    assert result.exit_code == 0, (result.output, result.exception)
    data = data_of(page)
    assert len(data["images"]) == 4 and "cats" in data["labels"]


def test_how_a_training_read_its_images_does_not_matter_to_others(made, tmp_path):
    recipe = load_recipe(
        "photos-dinov2s",
        [*TINY, *SMALLEST_BACKBONE, "data.format=webdataset", "data.suffixes=[.tiff]",
         "data.label_column=null", "data.limit=1", "data.decoder=fast", "data.max_pixels=1234567",
         "precompute.precision=fp32"],
    )  # fmt: skip
    shutil.copytree(made / "run", tmp_path / "run")
    text = recipe.to_yaml() + "a_key_of_another_version: 1\n"
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    network = str(tmp_path / "run" / "autoencoder.safetensors")
    shown = pictures.pictures_of([str(made / "images")], network, 10)
    assert len(shown.keys) == 10 and "cats" in shown.labels
    data, precision = shown.recipe.data, shown.recipe.precompute.precision
    assert (data.decoder, data.max_pixels, precision) == ("fast", 1234567, "fp32")
    text = text.replace("decoder: fast", "decoder: tomorrow")
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"run/recipe.yaml:\n  data.decoder: given 'tomorrow'"):
        pictures.pictures_of([str(made / "images")], network, 10)


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--images", "1"], "2 to 400"), (["--images", "9999"], "2 to 400")],
)
def test_too_few_and_too_many_pictures_are_refused(made, options, words):
    with pytest.raises(ExploreError, match=words):
        raise run(made, *options).exception


def test_a_page_that_would_be_too_large_says_how_many_pictures_fit(made, monkeypatch):
    monkeypatch.setattr(explore_job, "MAX_BYTES", 30_000)
    with pytest.raises(ExploreError, match=r"give --images \d+ or fewer"):
        raise run(made, "--images", "12").exception


def test_images_without_an_autoencoder_say_what_to_give(made):
    result = CliRunner().invoke(app, ["explore", str(made / "images")])
    assert "--autoencoder" in str(result.exception)


@needs_chromium
def test_the_page_works_by_mouse_keyboard_and_touch(made, tmp_path):
    with opened(made / "explore.html", tmp_path / "profile") as page:
        page.size(1440, 1200)
        said = "document.getElementById('live').textContent"
        shown = "document.querySelectorAll('#panels canvas')[{}].toDataURL()"
        frame = "document.querySelectorAll('.cell.query .frame').length"
        assert page.value("document.querySelectorAll('.cell').length") == 20
        assert page.value("document.querySelectorAll('.point').length") == 10
        before = page.value(shown.format(3))
        page.click("#latents-2", 0.25, 0.75)
        assert "patch row 2, column 1" in page.value(said) and page.value(frame) == 2
        assert page.value(shown.format(3)) != before, "the similarities are drawn anew"
        page.value("document.getElementById('large').focus()")
        page.key("ArrowRight")
        assert "patch row 2, column 2" in page.value(said)
        page.key("n")
        assert page.value("document.querySelector('.cell.query').id") == "latents-3"
        page.key("v")
        assert page.value("document.getElementById('large-canvas').style.display") == "block"
        page.touch("#features-5", 0.75, 0.25)
        assert page.value("document.querySelector('.cell.query').id") == "latents-5"
        assert "patch row 1, column 2" in page.value(said)
        page.value("document.querySelectorAll('.bar')[0].dispatchEvent(new Event('click'))")
        worst = max(data_of(made / "explore.html")["images"], key=lambda image: image["error"])
        assert page.value("document.getElementById('picture-title').textContent") == worst["key"]
        page.click("#theme")
        assert page.value("document.documentElement.dataset.theme") == "dark"
        page.size(390, 844)
        assert page.value("document.documentElement.scrollWidth") <= 390, "no sideways scrolling"
        assert page.errors == []
        assert all(url.startswith(("file:", "data:")) for url in page.requested)


@needs_chromium
def test_the_page_shows_the_cosines_that_numpy_computes(made, tmp_path):
    data = data_of(made / "explore.html")
    kind = next(kind for kind in data["kinds"] if kind["id"] == "latents")
    tokens = np.frombuffer(base64.b64decode(kind["tokens"]), np.int8).reshape(-1, kind["dims"])
    scaled = tokens * np.frombuffer(base64.b64decode(kind["scales"]), np.float32)[:, None]
    cosines = scaled @ scaled[5]  # picture 1, patch 1
    best = cosines.reshape(-1, 4).max(1)
    best[1] = -2
    with opened(made / "explore.html", tmp_path / "profile") as page:
        page.size(1440, 1200)
        page.click("#latents-1", 0.75, 0.25)
        said = page.value("document.getElementById('live').textContent")
    assert data["images"][int(best.argmax())]["key"] in said.split("by latents")[1]
    assert f"{best.max():.2f}" in said


def test_images_without_an_autoencoder_and_places_that_are_not_there_are_told_apart(made, tmp_path):
    with pytest.raises(ExploreError, match="nowhere does not exist"):
        pictures.pictures_of([str(tmp_path / "nowhere")], None, 10)
    with pytest.raises(ExploreError, match="need a trained autoencoder: --autoencoder"):
        pictures.pictures_of([str(made / "images")], None, 10)
