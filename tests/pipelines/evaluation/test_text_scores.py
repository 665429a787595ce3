"""`fae evaluate` of captioned images, without Ray: the same numbers as by hand, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from fae.pipelines.config.recipe import Recipe, RecipeError, load_recipe
from fae.pipelines.evaluation.errors import EvaluationError
from fae.pipelines.evaluation.evaluate_job import evaluate
from fae.pipelines.networks.loading import backbone_fingerprints, backbone_of
from fae.pipelines.networks.untrained import build_autoencoder
from fae_core import checkpoint
from fae_core.towers import Towers, load_towers
from fae_core.weights import WeightsError
from tests.tiny import save_towers

CAPTIONS = {
    "0": "a red cat",
    "1": ["a blue dog", "small dog"],
    "2": "a red cat",
    "3": "green house",
    "4": ["big", "a cat a dog"],
}
TINY = [
    "image_size=32", "backbone.name=vit_tiny_patch16_224", "backbone.weights=random",
    "backbone.image_size=32", "evaluate.chunk_size=2", "evaluate.batch_size=2",
    "autoencoder.latent_dim=4", "autoencoder.encoder.num_heads=2",
    "autoencoder.encoder.head_dim=8", "autoencoder.decoder.depth=1",
    "autoencoder.decoder.num_heads=3", "precompute.precision=fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> Path:
    return save_towers(tmp_path_factory.mktemp("towers") / "siglip")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random, lines = np.random.default_rng(0), []
    for name, text in CAPTIONS.items():
        pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def recipe_of(images: Path, towers: Path, scores: str, *more: str) -> Recipe:
    values = (f"evaluate.images={images}", f"evaluate.towers={towers}", f"evaluate.scores={scores}")
    return load_recipe("photos-dinov2s", [*TINY, *values, *more])


def by_hand(pictures: torch.Tensor, model: Towers) -> dict[str, float]:
    """CLIP score and retrieval of the five images, one caption after the other."""
    several = [[text] if isinstance(text, str) else text for text in CAPTIONS.values()]
    cosines, owners = [], []
    for captions in several:
        for text in captions:
            owners.append(captions[0])
            cosines.append(F.cosine_similarity(pictures, model.texts([text])))
    table = torch.stack(cosines, 1)
    mine = [captions[0] for captions in several]
    right = [owners[int(row.argmax())] == own for row, own in zip(table, mine, strict=True)]
    back = [mine[int(row.argmax())] == own for row, own in zip(table.T, owners, strict=True)]
    first = [owners.index(captions[0]) for captions in several]
    scores = [max(0.0, 100 * float(table[i, j])) for i, j in enumerate(first)]
    return {
        "clip_score": float(np.mean(scores)),
        "image_to_text": float(np.mean(right)),
        "text_to_image": float(np.mean(back)),
    }


def crops(images: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(images / f"{name}.png")) for name in CAPTIONS])


def test_the_scores_of_captioned_images_are_those_by_hand(images, towers, tmp_path, without_ray):
    recipe = recipe_of(images, towers, "[clip_score,retrieval]", f"evaluate.output={tmp_path}")
    found = evaluate(recipe, show_progress=False)
    model = load_towers(towers)
    expected = by_hand(model.images(crops(images)), model)
    assert found["num_images"] == 5
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-3), name
    saved = json.loads((tmp_path / "scores.json").read_text())
    assert saved["inputs"]["towers"] == model.weights_sha256
    assert evaluate(recipe, show_progress=False) == found


def test_equal_captions_are_one_wherever_they_stand(towers, tmp_path, monkeypatch, without_ray):
    captions = [["a red cat", "a small cat"], ["a small cat"]]
    lines = []
    for index, several in enumerate(captions):
        pixels = np.full((32, 32, 3), 255 * index, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": several}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    # The second image is its caption, and the first lies nearer to that than to its own first one.
    of_text = {"a red cat": [1.0, 0.0], "a small cat": [0.0, 1.0]}
    of_image = [[0.6, 0.8], [0.0, 1.0]]
    monkeypatch.setattr(Towers, "texts", lambda _, texts: torch.tensor([of_text[t] for t in texts]))
    monkeypatch.setattr(
        Towers, "images", lambda _, crops: torch.tensor([of_image[c.max() // 255] for c in crops])
    )
    found = evaluate(recipe_of(tmp_path, towers, "[retrieval]"), show_progress=False)
    assert (found["image_to_text"], found["text_to_image"]) == (1.0, 1.0)


def test_rebuilt_features_are_pooled_as_true_ones_are(
    images, towers, tmp_path, monkeypatch, without_ray
):
    base = recipe_of(images, towers, "[retrieval_rebuilt]")
    backbone = backbone_of(base)
    torch.manual_seed(1)
    autoencoder = build_autoencoder(base.autoencoder, backbone.spec).eval()
    path = tmp_path / "autoencoder.safetensors"
    checkpoint.save(path, autoencoder, backbone_fingerprints(base, backbone))
    recipe = recipe_of(images, towers, "[retrieval_rebuilt]", f"autoencoder.checkpoint={path}")
    with pytest.raises(WeightsError, match="pool features of 24 channels; the backbone's have 192"):
        evaluate(recipe, show_progress=False)
    head = torch.randn(192, 24, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(Towers, "pool", lambda _, features: features.mean(1) @ head)
    found = evaluate(recipe, show_progress=False)
    model = load_towers(towers)
    with torch.no_grad():
        features = backbone(torch.from_numpy(crops(images))).float()
        rebuilt = autoencoder.decode(autoencoder.encode(features).mean)
    for prefix, tokens in (("true_", features), ("rebuilt_", rebuilt)):
        expected = by_hand(model.pool(tokens), model)
        for name in ("image_to_text", "text_to_image"):
            assert found[prefix + name] == pytest.approx(expected[name]), name


def test_samples_are_scored_with_their_prompts(images, towers, tmp_path, without_ray):
    from fae.pipelines.sampling.sample_store import FORMAT, write_sample_shard

    texts = ["a red cat", "green house", "a red cat", "green house", "a red cat"]
    row = {
        "shard": 0, "images": crops(images), "indices": np.arange(5), "labels": np.arange(5) % 2,
        "prompts": json.dumps([{"prompt": text} for text in texts]), "num_prompts": 2,
        "drawn_at": 0.0,
    }  # fmt: skip
    write_sample_shard(row, str(tmp_path), [])
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT, "stored": 5}))
    found = evaluate(recipe_of(tmp_path, towers, "[clip_score]"), show_progress=False)
    model = load_towers(towers)
    cosines = F.cosine_similarity(model.images(crops(images)), model.texts(texts))
    expected = float((100 * cosines).clamp_min(0).mean())
    assert found["clip_score"] == pytest.approx(expected, abs=1e-3)


def test_an_image_that_cannot_be_decoded_is_left_out_with_its_caption(
    images, towers, tmp_path, without_ray
):
    some = shutil.copytree(images, tmp_path / "some")
    (some / "1.png").write_bytes(b"no picture")
    scores = "[clip_score,retrieval]"
    with pytest.raises(EvaluationError, match="1 of 5 images .* could not be decoded"):
        evaluate(recipe_of(some, towers, scores), show_progress=False)
    allowed = recipe_of(some, towers, scores, "evaluate.max_error_rate=0.2")
    found = evaluate(allowed, show_progress=False)
    fewer = shutil.copytree(some, tmp_path / "fewer")
    (fewer / "1.png").unlink()
    lines = (fewer / "metadata.jsonl").read_text().splitlines()
    (fewer / "metadata.jsonl").write_text("\n".join([lines[0], *lines[2:]]))
    assert evaluate(recipe_of(fewer, towers, scores), show_progress=False) == pytest.approx(found)
    assert found["num_images"] == 4


def test_what_cannot_be_scored_is_said_before_an_image_is_read(images, towers, tmp_path):
    with pytest.raises(RecipeError, match="retrieval needs evaluate.towers"):
        evaluate(load_recipe("photos-dinov2s", [*TINY, f"evaluate.images={images}",
                                                "evaluate.scores=[retrieval]"]))  # fmt: skip
    some = shutil.copytree(images, tmp_path / "some")
    (some / "metadata.jsonl").unlink()
    with pytest.raises(EvaluationError, match="5 of 5 images .* have no caption, for example '0"):
        evaluate(recipe_of(some, towers, "[clip_score]"))
    np.savez(tmp_path / "set.npz", arr_0=np.zeros((2, 32, 32, 3), np.uint8))
    with pytest.raises(EvaluationError, match="holds no captions"):
        evaluate(recipe_of(tmp_path / "set.npz", towers, "[clip_score]"))
    with pytest.raises(RecipeError, match=r"autoencoder.checkpoint"):
        evaluate(recipe_of(images, towers, "[retrieval_rebuilt]"))
