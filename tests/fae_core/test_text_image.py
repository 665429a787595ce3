"""CLIP score and retrieval against their formulas; small random towers against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from fae_core.metrics.text_image import clip_scores, retrieval_top1
from fae_core.towers import load_towers
from fae_core.weights import WeightsError
from tests.tiny import save_text_encoder, save_towers

TEXTS = ["a red cat", "a small blue dog", "house"]


def test_the_clip_score_is_a_hundred_times_the_cosine_and_never_negative():
    images, texts = torch.randn(5, 8), torch.randn(5, 8)
    texts[0], texts[1] = 3 * images[0], -images[1]
    found = clip_scores(images, texts)
    assert found[0] == pytest.approx(100.0, abs=1e-3) and found[1] == 0.0
    for image, text, score in zip(images.numpy(), texts.numpy(), found, strict=True):
        cosine = image @ text / np.linalg.norm(image) / np.linalg.norm(text)
        assert float(score) == pytest.approx(max(100 * cosine, 0), abs=1e-3)


def test_a_query_is_right_where_its_nearest_target_is_of_its_group(monkeypatch):
    monkeypatch.setattr("fae_core.metrics.text_image.ROWS_AT_ONCE", 3)
    random = np.random.default_rng(0)
    queries, targets = random.normal(size=(7, 4)), random.normal(size=(11, 4))
    of_query, of_target = random.integers(0, 3, 7), random.integers(0, 3, 11)
    right = 0
    for query, group in zip(queries, of_query, strict=True):
        cosines = [query @ t / np.linalg.norm(query) / np.linalg.norm(t) for t in targets]
        right += of_target[int(np.argmax(cosines))] == group
    a, b = torch.from_numpy(queries), torch.from_numpy(targets)
    assert retrieval_top1(a, b, [{g} for g in of_query], [{g, 9} for g in of_target]) == right / 7
    assert 0 < right < 7
    assert retrieval_top1(a, 5 * a) == 1.0 and retrieval_top1(a, a.flip(0)) == 1 / 7
    with pytest.raises(ValueError, match="needs images and texts"):
        retrieval_top1(a[:0], b)


@pytest.fixture(scope="module", params=["siglip", "clip"])
def folder(request, tmp_path_factory) -> Path:
    return save_towers(tmp_path_factory.mktemp(request.param) / request.param, request.param)


def test_the_towers_embeddings_are_those_of_the_model(folder):
    towers = load_towers(folder)
    crops = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), np.uint8)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(
        images=[Image.fromarray(crop) for crop in crops], return_tensors="pt"
    )
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", max_length=16, return_tensors="pt"
    )
    given = {"input_ids": tokens["input_ids"], **pixels}
    if folder.name == "clip":
        given["attention_mask"] = tokens["attention_mask"]
    with torch.no_grad():
        expected = model(**given)
    for found, wanted in (
        (towers.images(crops), expected.image_embeds),
        (towers.texts(TEXTS), expected.text_embeds),
    ):
        assert found.shape == (3, 24) and found.dtype == torch.float32
        unit = torch.nn.functional.normalize(found, dim=-1)
        torch.testing.assert_close(unit, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected.image_embeds[0], expected.image_embeds[1], atol=1e-3)
    assert torch.equal(towers.texts(["a red cat " * 20]), towers.texts(["a red cat " * 40]))


def test_siglip_reads_texts_in_lower_case_whatever_its_tokenizer_does(folder):
    towers = load_towers(folder)  # this tokenizer knows no capital letter
    same = torch.equal(towers.texts(["A red CAT"]), towers.texts(["a red cat"]))
    assert same == (folder.name == "siglip")


def test_features_enter_at_the_pooling_head_where_the_tower_pools_patches(folder):
    towers = load_towers(folder)
    if folder.name == "clip":
        with pytest.raises(WeightsError, match="from its class token"):
            towers.pool(torch.zeros(1, 4, 24))
        return
    crops = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    pixels = towers.processor(images=list(crops), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = towers.model.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(towers.pool(features), towers.images(crops))
    with pytest.raises(WeightsError, match="24 channels; the backbone's have 32"):
        towers.pool(torch.zeros(1, 4, 32))


def test_what_holds_no_towers_is_refused(folder, tmp_path):
    with pytest.raises(WeightsError, match="no folder"):
        load_towers(tmp_path)
    with pytest.raises(WeightsError, match="holds a bert"):
        load_towers(save_text_encoder(tmp_path / "bert"))
