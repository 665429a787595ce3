"""Evaluation: sets of every kind, refusals before any work, and scores with real Ray.

torch-fidelity computes the expected scores of Inception from the same folders.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image

from fae.pipelines.config.recipe import Recipe, RecipeError, load_recipe
from fae.pipelines.data.crops import adm_center_crop
from fae.pipelines.evaluation.errors import EvaluationError, ScoresMismatch
from fae.pipelines.evaluation.evaluate_job import _scores_before, evaluate
from fae.pipelines.evaluation.extractor import Extractor
from fae.pipelines.evaluation.image_sets import open_set, read_piece
from fae.pipelines.evaluation.npz_files import write_statistics
from fae.pipelines.sampling.sample_store import FORMAT as SAMPLES_FORMAT
from fae.pipelines.sampling.sample_store import write_sample_shard
from fae_core.metrics.frechet import Gaussian, frechet_of_features
from fae_core.metrics.reconstruction import psnr, ssim
from fae_core.pixel_decoder import from_uint8
from fae_core.weights import WeightsError
from tests.here import leave_ray_out

TINY = [
    "image_size=32",
    "backbone.name=vit_tiny_patch16_224",
    "backbone.weights=random",
    "backbone.image_size=32",
    "evaluate.chunk_size=10",
    "evaluate.batch_size=4",
]


def recipe_of(images: object, reference: object, *more: str) -> Recipe:
    sides = [f"evaluate.images={images}", f"evaluate.reference={reference}"]
    return load_recipe("photos-dinov2s", [*TINY, *sides, *more])


def write_folder(folder: Path, pixels: np.ndarray, suffix: str = "png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index:03d}.{suffix}")
    return folder


def write_samples(folder: Path, pixels: np.ndarray) -> Path:
    """A finished store of `fae sample`, by its own writer."""
    recipe = load_recipe("photos-dinov2s", [f"output={folder}"])
    indices = np.arange(len(pixels))
    row = {"shard": 0, "images": pixels, "indices": indices, "labels": 0 * indices, "drawn_at": 0.0}
    write_sample_shard(row, str(folder), recipe.sample.formats)
    manifest = {"format": SAMPLES_FORMAT, "generator": "abc", "stored": len(pixels)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "plan.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def crops(photographs: Path) -> np.ndarray:
    """uint8 [48, 32, 32, 3]."""
    paths = sorted(photographs.iterdir())[::2]
    return np.stack([adm_center_crop(Image.open(path), 32) for path in paths])


@pytest.fixture(scope="module")
def originals(crops: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("sets") / "originals", crops)


@pytest.fixture(scope="module")
def damaged(crops: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The originals with noise, of the same keys."""
    noise = np.random.default_rng(0).integers(-40, 41, crops.shape)
    noisy = (crops.astype(int) + noise).clip(0, 255).astype(np.uint8)
    return write_folder(tmp_path_factory.mktemp("sets") / "damaged", noisy)


def some_of(images: Path, folder: Path, number: int) -> Path:
    """A folder with the first images of another."""
    (folder / images.name).mkdir()
    for path in sorted(images.iterdir())[:number]:
        shutil.copy(path, folder / images.name)
    return folder / images.name


def read_set(images: object, *more: str) -> np.ndarray:
    recipe = recipe_of(images, None, *more)
    size, data = recipe.image_size, recipe.data
    found = open_set("images", str(images), recipe.evaluate.limit, size, data)
    return np.concatenate([read_piece(piece, size, data)[0] for piece in found.pieces(5)])


def test_a_set_is_the_same_images_whatever_holds_it(
    crops: np.ndarray, originals: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "adm.npz", arr_0=crops, mu=np.zeros(3), sigma=np.eye(3))
    samples = write_samples(tmp_path / "samples", crops)
    for place in (originals, tmp_path / "adm.npz"):
        assert np.array_equal(read_set(place), crops)
    by_key = sorted(range(len(crops)), key=str)
    # A source's own columns are not the samples'.
    columns = ("data.image_column=jpg", "data.label_column=class", "data.key_column=id")
    assert np.array_equal(read_set(samples, *columns), crops[by_key])
    assert len(read_set(tmp_path / "adm.npz", "evaluate.limit=7")) == 7


def gaussians(names: tuple[str, ...], dim: int = 4) -> dict[str, Gaussian]:
    return {name: Gaussian(np.zeros(dim), np.eye(dim), 9) for name in names}


def broken_sets(folder: Path, crops: np.ndarray) -> dict[str, Path]:
    """Sets and references that some score cannot use."""
    np.savez(folder / "adm.npz", arr_0=crops, mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(folder / "big.npz", arr_0=np.zeros((2, 64, 64, 3), np.uint8))
    np.savez(folder / "floats.npz", arr_0=np.zeros((2, 32, 32, 3)))
    np.savez(folder / "odd.npz", latents=crops)
    np.savez(folder / "pickled.npz", mu=np.array([print]), sigma=np.eye(1))
    np.savez_compressed(folder / "compressed.npz", arr_0=crops)
    (folder / "text.npz").write_text("no archive")
    (folder / "empty").mkdir()
    write_folder(folder / "other", crops[:5])
    write_folder(folder / "single", crops[:1])
    write_statistics(
        str(folder / "ours.npz"),
        gaussians(("backbone",)),
        {"backbone": "dinov2_vitl14 another"},
        None,
    )
    unfinished = write_samples(folder / "unfinished", crops)
    (unfinished / "manifest.json").unlink()
    write_samples(folder / "samples", crops)
    return {path.stem: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("images", "reference", "scores", "message"),
    [
        ("originals", "adm", "rfid", "adm.npz is a reference for generation. Give the folder of"),
        ("samples", "originals", "rfid", "samples holds generated samples"),
        ("originals", "other", "reconstruction", "of 48 images in .* and 5 in .* 5 have the same"),
        ("originals", "big", "frechet_backbone", "images of 64x64, the recipe's image_size is 32"),
        ("big", "originals", "frechet_backbone", "images of 64x64"),
        ("originals", "floats", "frechet_backbone", "not uint8"),
        ("originals", "odd", "frechet_backbone", "holds latents: neither images"),
        ("originals", "pickled", "frechet_backbone", "not a sound .npz"),
        ("originals", "text", "frechet_backbone", "not a sound .npz"),
        ("originals", "compressed", "frechet_backbone", "Write it with numpy.savez"),
        ("originals", "ours", "frechet_backbone", "made with backbone dinov2_vitl14 another"),
        (
            "originals",
            "ours",
            "precision_recall",
            "statistics alone .* needs the images themselves",
        ),
        ("originals", "ours", "fid", "needs the statistics of inception"),
        ("unfinished", "originals", "frechet_backbone", "not finished. Run `fae sample` again"),
        ("empty", "originals", "frechet_backbone", "evaluate.images='.*empty' holds no files"),
        ("originals", "absent", "frechet_backbone", "evaluate.reference='.*absent' does not exist"),
        ("originals", "samples", "kid", "48 images, fewer than evaluate.kid_subset_size=1000"),
        ("single", "originals", "frechet_backbone", "has 1 image, and a covariance needs two"),
        ("originals", "single", "fid", "has 1 image, and a covariance needs two"),
    ],
)
def test_a_reference_that_a_score_cannot_use_is_refused_before_any_work(
    images: str, reference: str, scores: str, message: str,
    crops: np.ndarray, originals: Path, tmp_path: Path,
) -> None:  # fmt: skip
    sets = {**broken_sets(tmp_path, crops), "originals": originals, "absent": tmp_path / "absent"}
    more = (f"evaluate.scores=[{scores}]", "evaluate.features=backbone")
    with pytest.raises(EvaluationError, match=message):
        evaluate(recipe_of(sets[images], sets[reference], *more), show_progress=False)


def test_what_is_not_given_is_asked_for(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="evaluate.images is not set"):
        evaluate(load_recipe("photos-dinov2s", TINY))
    with pytest.raises(RecipeError, match="evaluate.scores is empty"):
        recipe = [*TINY, f"evaluate.images={originals}", "evaluate.scores=[]"]
        evaluate(load_recipe("photos-dinov2s", recipe))
    with pytest.raises(RecipeError, match="fid: these compare with evaluate.reference="):
        recipe = [*TINY, f"evaluate.images={originals}", "evaluate.scores=[inception_score,fid]"]
        evaluate(load_recipe("photos-dinov2s", recipe))
    with pytest.raises(RecipeError, match="no class token. Set evaluate.backbone_token=mean"):
        without = ("backbone.name=test_vit2", "backbone.image_size=null")
        evaluate(recipe_of(originals, originals, *without))
    monkeypatch.setenv("FAE_INCEPTION_WEIGHTS", str(tmp_path / "absent.pth"))
    with pytest.raises(WeightsError, match="No Inception weights at .*absent.pth"):
        evaluate(recipe_of(originals, originals, "evaluate.scores=[fid]"))


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    import ray

    from fae.pipelines.runtime.session import start_ray

    start_ray(num_cpus=5, include_dashboard=False, object_store_memory=500_000_000)
    yield
    ray.shutdown()


@pytest.mark.integration
def test_scores_are_the_same_in_one_process_and_on_three_actors(
    ray_session: None, crops: np.ndarray, originals: Path, damaged: Path
) -> None:
    more = (
        "evaluate.scores=[frechet_backbone,precision_recall,kid,reconstruction]",
        "evaluate.features=backbone",
        "evaluate.kid_subset_size=20",
    )
    recipe = recipe_of(damaged, originals, *more)
    with pytest.MonkeyPatch.context() as patch:
        leave_ray_out(patch)
        one = evaluate(recipe, show_progress=False)
    three = evaluate(recipe_of(damaged, originals, *more, "evaluate.num_actors=3"), False)
    assert one.keys() == {
        "frechet_backbone", "precision", "recall", "kid", "psnr", "ssim",
        "num_images", "num_reference",
    }  # fmt: skip
    assert three == pytest.approx(one, rel=1e-6, abs=1e-6)
    extract = Extractor(recipe.evaluate, recipe.backbone, {"backbone"})
    noisy = read_set(damaged)
    a, b = (extract(pixels)["backbone"] for pixels in (noisy, crops))
    with pytest.warns(RuntimeWarning, match="48 images for 192 dimensions"):
        assert one["frechet_backbone"] == pytest.approx(frechet_of_features(a, b), rel=1e-4)
    x, y = (from_uint8(torch.from_numpy(pixels)) for pixels in (noisy, crops))
    assert one["psnr"] == pytest.approx(psnr(x, y).mean().item(), rel=1e-5)
    assert one["ssim"] == pytest.approx(ssim(x, y).mean().item(), rel=1e-5)
    assert one["num_images"] == one["num_reference"] == 48


@pytest.mark.integration
def test_scores_of_finished_work_are_returned_and_those_of_other_work_are_not(
    without_ray: None, originals: Path, damaged: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "scores"
    arguments = (damaged, originals, f"evaluate.output={output}")
    first = evaluate(recipe_of(*arguments))
    assert first["frechet_backbone"] > 0
    assert "images: 48 images of" in capsys.readouterr().err
    told = json.loads((output / "scores.json").read_text())
    assert told["scores"] == first and "48 images for 192" in told["warnings"][0]
    assert told["images"]["content_sha256"] != told["reference"]["content_sha256"]
    assert evaluate(recipe_of(*arguments, "evaluate.num_actors=3")) == first
    with pytest.raises(ScoresMismatch, match="backbone_token: 'class' there, 'mean' now"):
        evaluate(recipe_of(*arguments, "evaluate.backbone_token=mean"))
    # A job that was killed before its scores has saved the statistics of the sets: nothing is
    # extracted twice.
    (output / "scores.json").unlink()
    assert evaluate(recipe_of(*arguments)) == first
    statistics = output / "reference_statistics.npz"
    again = recipe_of(damaged, statistics, f"evaluate.output={tmp_path / 'by statistics'}")
    capsys.readouterr()
    assert evaluate(again) == pytest.approx(first, rel=1e-12)
    assert "reference:" not in capsys.readouterr().err
    # The same names with other pixels are another set.
    os.utime(damaged / "000.png", ns=(0, 0))
    with pytest.raises(ScoresMismatch, match="images: "):
        evaluate(recipe_of(*arguments))


def test_saved_settings_that_decide_nothing_are_no_difference(tmp_path: Path) -> None:
    inputs = {"images": "abc", "backbone": "dinov2:1", "limit": None}
    saved = {"inputs": {**inputs, "max_error_rate": 0.0, "chunk_size": 8}, "scores": {"fid": 2.0}}
    (tmp_path / "scores.json").write_text(json.dumps(saved))
    assert _scores_before(str(tmp_path), inputs) == {"fid": 2.0}
    with pytest.raises(ScoresMismatch, match="images: 'abc' there, 'def' now"):
        _scores_before(str(tmp_path), {**inputs, "images": "def"})


@pytest.mark.integration
def test_inceptions_scores_are_torch_fidelitys_own(
    without_ray: None, originals: Path, damaged: Path, inception_weights: Path, tmp_path: Path
) -> None:
    """torch-fidelity reads the same folders with the same weights, which are random."""
    originals, damaged = (some_of(folder, tmp_path, 16) for folder in (originals, damaged))
    theirs = torch_fidelity.calculate_metrics(
        input1=str(damaged), input2=str(originals), fid=True, isc=True, kid=True, prc=True,
        isc_splits=3, kid_subsets=5, kid_subset_size=10, cuda=False, verbose=False, cache=False,
        # Its default for precision and recall is VGG-16; ADM's evaluator and ours use Inception.
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_weights),
    )  # fmt: skip
    ours = evaluate(
        recipe_of(
            damaged, originals,
            "evaluate.scores=[fid,inception_score,kid,precision_recall]",
            "evaluate.inception_splits=3", "evaluate.kid_subsets=5", "evaluate.kid_subset_size=10",
            f"evaluate.inception_weights={inception_weights}",
            f"evaluate.output={tmp_path / 'scores'}",
        ),
        show_progress=False,
    )  # fmt: skip
    expected = {
        "fid": theirs["frechet_inception_distance"],
        "inception_score": theirs["inception_score_mean"],
        "kid": theirs["kernel_inception_distance_mean"],
        "precision": theirs["precision"],
        "recall": theirs["recall"],
    }
    assert {name: ours[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-6)
    told = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert "this is rfid, not the FID of a generator" in told["warnings"][0]
    saved = np.load(tmp_path / "scores" / "images_statistics.npz")
    assert saved["mu"].shape == (2048,) and saved["sigma"].shape == (2048, 2048)


def test_a_pair_that_cannot_be_decoded_ends_the_job_or_is_left_out_of_the_count(
    without_ray: None, crops: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, originals = (write_folder(tmp_path / name, crops[:10]) for name in ("made", "true"))
    scores = "evaluate.scores=[reconstruction]"
    (originals / "003.png").write_bytes(b"no picture")
    with pytest.raises(EvaluationError, match=r"1 of 10 images of .*true could not"):
        evaluate(recipe_of(images, originals, scores), show_progress=False)
    (images / "007.png").write_bytes(b"no picture")
    allowed = recipe_of(images, originals, scores, "evaluate.max_error_rate=0.1")
    result = evaluate(allowed, show_progress=False)
    assert result["num_images"] == result["num_reference"] == 8
    assert result["psnr"] == pytest.approx(120) and result["ssim"] == pytest.approx(1)
    assert "reconstruction: means over 8 of 10 pairs" in capsys.readouterr().err


@pytest.mark.integration
def test_an_image_that_cannot_be_decoded_ends_the_job_or_is_left_out(
    without_ray: None, crops: np.ndarray, originals: Path, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "some", crops)
    broken = (folder / "011.png").read_bytes()
    (folder / "011.png").write_bytes(broken[: len(broken) // 2])
    with pytest.raises(EvaluationError, match=r"1 of 48 images of .*\n  011.png \[decode\]"):
        evaluate(recipe_of(folder, originals), show_progress=False)
    allowed = ("evaluate.max_error_rate=0.1", "evaluate.chunk_size=1")
    scores = "evaluate.scores=[frechet_backbone,reconstruction]"
    result = evaluate(recipe_of(folder, originals, *allowed, scores), show_progress=False)
    assert result["num_images"] == 47 and result["num_reference"] == 48
    # What is left pairs with its own original, so nothing differs.
    assert result["psnr"] == pytest.approx(120) and result["ssim"] == pytest.approx(1)
