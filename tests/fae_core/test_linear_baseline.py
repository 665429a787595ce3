"""The linear yardstick against scikit-learn's PCA."""

import numpy as np
from sklearn.decomposition import PCA

from fae_core.linear_baseline import Covariance


def test_it_is_scikit_learns_pca_of_standardized_features():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(20, 20)) * np.linspace(3, 0.1, 20)
    features = (rng.normal(size=(40, 16, 20)) @ mixing + 5 * rng.normal(size=20)).astype(np.float32)
    covariance = Covariance(20)
    for part in np.array_split(features, 7):
        covariance.update(part)
    baseline = covariance.fit(6)
    rows = features.reshape(-1, 20).astype(np.float64)
    mean, std = rows.mean(0), rows.std(0)
    pca = PCA(6).fit((rows - mean) / std)
    expected = pca.inverse_transform(pca.transform((rows - mean) / std)) * std + mean
    np.testing.assert_allclose(baseline.reconstruct(rows), expected, atol=1e-6)


def test_as_many_components_as_channels_lose_nothing():
    features = np.random.default_rng(1).normal(size=(50, 8))
    covariance = Covariance(8)
    covariance.update(features)
    np.testing.assert_allclose(covariance.fit(8).reconstruct(features), features, atol=1e-10)
