"""Every score against what others wrote, on the same features; and what has an answer by hand."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from fae_core.errors import TooFewImages
from fae_core.metrics.frechet import Gaussian, Moments, frechet_distance, frechet_of_features
from fae_core.metrics.inception import (
    POOL_DIM,
    SPATIAL_DIM,
    SplitSums,
    load_inception,
    split_numbers,
)
from fae_core.metrics.manifold import kernel_distance, precision_recall
from fae_core.metrics.reconstruction import psnr, ssim
from fae_core.weights import WeightsError


def features(seed: int, count: int = 400, dim: int = 48, shift: float = 0.0) -> np.ndarray:
    """Correlated, not centred, not Gaussian: [count, dim] float32."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dim, dim))
    return (np.maximum(random.normal(size=(count, dim)) @ mixing, 0) + shift).astype(np.float32)


def test_the_frechet_distance_is_torch_fidelitys() -> None:
    a, b = features(0), features(1, 500, shift=0.3)
    theirs = fid_statistics_to_metric(
        *(fid_features_to_statistics(torch.from_numpy(x).double()) for x in (a, b)), verbose=False
    )
    assert frechet_of_features(a, b) == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-9
    )


def test_the_distance_of_gaussians_is_the_formula() -> None:
    # With diagonal covariances: ‖μ‖² + Σ (σa − σb)².
    mean, a, b = np.array([1.0, -2.0, 0.5]), np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 9.0])
    distance = frechet_distance(Gaussian(mean, np.diag(a)), Gaussian(0 * mean, np.diag(b)))
    assert distance == pytest.approx(mean @ mean + 1 + 1 + 0, abs=1e-12)


def test_the_distance_of_a_set_to_itself_is_zero() -> None:
    a = features(0)
    assert frechet_of_features(a, a) < 1e-9 * np.trace(np.cov(a.T))


def test_fewer_images_than_dimensions_are_worth_a_warning() -> None:
    few = features(0, count=20)
    with pytest.warns(RuntimeWarning, match="20 images for 48 dimensions"):
        distance = frechet_of_features(few, features(1))
    assert np.isfinite(distance) and distance > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_of_features(features(0), features(1))


@given(cuts=st.lists(st.integers(0, 400), max_size=6), offset=st.sampled_from([0.0, 1e6]))
@settings(max_examples=25, deadline=None)
def test_moments_merge_to_those_of_the_whole_wherever_it_is_cut(
    cuts: list[int], offset: float
) -> None:
    whole = features(3).astype(np.float64) + offset
    merged = Moments.of(whole[:0])
    for part in np.split(whole, sorted(cuts)):
        merged.merge(Moments.of(part))
    gaussian = merged.gaussian()
    assert merged.count == 400
    np.testing.assert_allclose(gaussian.mean, whole.mean(0), rtol=1e-12)
    # np.cov of the shifted values itself is exact only to the spacing of float64 near the offset.
    np.testing.assert_allclose(gaussian.covariance, np.cov(whole.T), rtol=1e-7, atol=1e-7)


def test_moments_refuse_what_is_not_finite_or_does_not_fit() -> None:
    with pytest.raises(ValueError, match="finite"):
        Moments.of(np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="48 dimensions do not merge into 8"):
        Moments.of(features(0, dim=8)).merge(Moments.of(features(0)))


def test_precision_and_recall_are_torch_fidelitys() -> None:
    generated, real = features(0, 300, dim=8), features(1, 500, dim=8, shift=0.7)
    theirs = prc_features_to_metric(
        torch.from_numpy(generated), torch.from_numpy(real), prc_neighborhood=3, verbose=False
    )
    ours = precision_recall(generated, real, 3)
    assert 0 < ours[0] < 1 and 0 < ours[1] < 1 and ours[0] != ours[1]
    assert ours == pytest.approx((theirs["precision"], theirs["recall"]), abs=1e-6)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 1e3, real) == (0.0, 0.0)


def test_the_kernel_distance_is_torch_fidelitys() -> None:
    a, b = features(0), features(1, 500, shift=0.1)
    theirs = kid_features_to_metric(
        torch.from_numpy(a).double(), torch.from_numpy(b).double(), kid_subsets=7,
        kid_subset_size=150, verbose=False,
    )  # fmt: skip
    ours = kernel_distance(a, b, num_subsets=7, subset_size=150)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_scores_that_need_more_images_say_how_many() -> None:
    with pytest.raises(TooFewImages, match="subsets of 1000 images, and there are 400"):
        kernel_distance(features(0), features(1))
    with pytest.raises(TooFewImages, match="more than 3 images"):
        precision_recall(features(0, 3), features(1))


@pytest.mark.parametrize("count", [403, 12])
def test_the_inception_score_is_torch_fidelitys_however_its_sums_are_merged(count: int) -> None:
    logits = 2 * features(0, count, dim=30)
    theirs = isc_features_to_metric(
        torch.from_numpy(logits), splits=10, shuffle=True, rng_seed=2020
    )
    numbers = split_numbers(count, 10, 2020)
    merged = SplitSums.of(logits[:5], numbers[:5], 10)
    for start in range(5, count, 50):
        rows = slice(start, start + 50)
        merged.merge(SplitSums.of(logits[rows], numbers[rows], 10))
    assert merged.score() == pytest.approx(theirs["inception_score_mean"], rel=1e-9)


def test_psnr_and_ssim_are_scikit_images() -> None:
    torch.manual_seed(0)
    a = torch.rand(2, 3, 64, 64)
    b = (a + 0.1 * torch.randn(2, 3, 64, 64)).clamp(0, 1)
    for i in range(2):
        x, y = (np.moveaxis(t[i].numpy(), 0, -1) for t in (a, b))
        expected = peak_signal_noise_ratio(x, y, data_range=1.0)
        assert psnr(b, a)[i].item() == pytest.approx(expected, abs=1e-3)
        _, full = structural_similarity(
            x, y, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, full=True,
        )  # fmt: skip
        expected = full[5:-5, 5:-5].mean()  # without the border that only padding fills
        assert ssim(b, a)[i].item() == pytest.approx(expected, abs=1e-4)


def test_ssim_keeps_the_small_variance_of_bright_flat_images() -> None:
    torch.manual_seed(0)
    a, b = (0.97 + 0.02 * torch.rand(1, 3, 32, 32) for _ in range(2))
    x, y = (np.moveaxis(t[0].double().numpy(), 0, -1) for t in (a, b))
    _, full = structural_similarity(
        x, y, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True,
    )  # fmt: skip
    assert ssim(b, a).item() == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-7)


def test_inceptions_features_are_torch_fidelitys_and_its_spatial_ones_are_adms(
    inception_weights: Path,
) -> None:
    inception = load_inception(inception_weights)
    pixels = torch.randint(0, 256, (2, 40, 40, 3), dtype=torch.uint8)
    ours = inception(pixels)
    network = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(inception_weights))
    kept = []
    network.Mixed_6c.register_forward_hook(lambda module, inputs, output: kept.append(output))
    pool, logits = network(pixels.permute(0, 3, 1, 2))
    assert torch.equal(ours["inception"], pool) and pool.shape == (2, POOL_DIM)
    assert torch.equal(ours["logits"], logits) and logits.shape == (2, 1008)
    # By hand, through the same layers: the first branch of mixed_6, NHWC, seven channels, rows
    # flattened.
    conv = network.Mixed_6d.branch1x1(kept[0]).numpy().transpose(0, 2, 3, 1)
    expected = conv[..., :7].reshape(2, -1)
    assert expected.shape == (2, SPATIAL_DIM) and np.array_equal(ours["spatial"], expected)
    assert ours["spatial"].std() > 0


def test_inception_convolves_without_tf32(inception_weights: Path) -> None:
    inception = load_inception(inception_weights)
    allowed = []
    inception.network.Mixed_6c.register_forward_hook(
        lambda *_: allowed.append(torch.backends.cudnn.allow_tf32)
    )
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        inception(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
        assert torch.backends.cudnn.allow_tf32
    assert allowed == [False]


def test_weights_that_are_not_inceptions_or_not_only_tensors_are_refused(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="not torch-fidelity's Inception"):
        load_inception(tmp_path / "other.pth")
    torch.save({"run": print}, tmp_path / "code.pth")
    with pytest.raises(WeightsError, match="more than tensors"):
        load_inception(tmp_path / "code.pth")
    with pytest.raises(WeightsError, match="No Inception weights at"):
        load_inception(tmp_path / "absent.pth")
