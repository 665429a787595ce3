"""Probes against scikit-learn and SciPy, and against answers that are known beforehand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from fae_core.metrics.probes import (
    KNN_CHUNK,
    Accuracy,
    LinearProbe,
    cosine_matrix,
    held_out,
    knn_accuracy,
    match_patches,
    object_patches,
    similarity_correlation,
    within_one_patch,
)


def clusters(per_class: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [5 * per_class, 16] float32 around five directions, labels 3, 13, … 43."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(5, 16))
    labels = np.repeat(np.arange(5), per_class)
    vectors = centres[labels] + spread * random.normal(size=(len(labels), 16))
    return vectors.astype(np.float32), labels * 10 + 3


@given(total=st.integers(1, 400), data=st.data())
def test_the_interval_is_scipys_wilson(total, data):
    right = data.draw(st.integers(0, total))
    expected = binomtest(right, total).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(Accuracy(right, total).interval, expected, atol=1e-12)


@pytest.mark.parametrize("k", [1, 7, 20])
def test_knn_is_scikit_learns_majority_by_cosine(k):
    train, train_labels = clusters(40, 1.5)
    test, test_labels = clusters(KNN_CHUNK // 5 + 20, 1.5, seed=1)
    reference = KNeighborsClassifier(k, metric="cosine").fit(train.astype(float), train_labels)
    found = knn_accuracy(train, train_labels, test, test_labels, k)
    assert 0.4 < found.value < 0.98  # the classes overlap: not every rule gives this number
    assert found.num_right == int((reference.predict(test.astype(float)) == test_labels).sum())


def test_separable_clusters_are_all_right_and_unknown_classes_all_wrong():
    train, train_labels = clusters(10, 0.05)
    test, test_labels = clusters(4, 0.05, seed=1)
    assert knn_accuracy(train, train_labels, test, test_labels, 10).value == 1.0
    probe = LinearProbe.fit(train, train_labels, [0.1, 1.0])
    assert probe.accuracy(test, test_labels) == Accuracy(20, 20)
    assert probe.accuracy(test, test_labels + 1) == Accuracy(0, 20)
    with pytest.raises(ValueError, match="51 neighbours of 50"):
        knn_accuracy(train, train_labels, test, test_labels, 51)


def test_the_linear_probe_is_scikit_learns_with_the_c_that_does_best_on_held_out_images():
    train, train_labels = clusters(25, 2.0)
    test, test_labels = clusters(60, 2.0, seed=1)
    grid = [10.0, 1e-4, 0.01]
    held = held_out(train_labels)
    assert held.sum() == 25 and all((held & (train_labels == c)).sum() == 5 for c in train_labels)

    def head(rows: np.ndarray, c: float):
        scaler = StandardScaler().fit(train[rows].astype(float))
        model = LogisticRegression(C=c, max_iter=1000)
        return scaler, model.fit(scaler.transform(train[rows].astype(float)), train_labels[rows])

    def right(fitted, x: np.ndarray, y: np.ndarray) -> int:
        return int((fitted[1].predict(fitted[0].transform(x.astype(float))) == y).sum())

    scores = {c: right(head(~held, c), train[held], train_labels[held]) for c in sorted(grid)}
    assert len(set(scores.values())) > 1  # else any C would do
    best = max(scores, key=lambda c: scores[c])
    probe = LinearProbe.fit(train, train_labels, grid)
    assert probe.regularization == best
    expected = right(head(np.ones(len(train), bool), best), test, test_labels)
    assert probe.accuracy(test, test_labels) == Accuracy(expected, 300)


def test_a_class_of_one_image_is_never_held_out():
    labels = np.array([7, 8, 8, 9])
    assert held_out(labels).tolist() == [False, False, True, False]
    features = np.eye(4)[:, :3]
    assert LinearProbe.fit(features, np.array([1, 2, 3, 4]), [1.0, 0.1]).regularization == 0.1


def test_similarity_is_numpys_correlation_and_unmoved_by_rotation_and_scale():
    random = np.random.default_rng(0)
    tokens, other = random.normal(size=(3, 20, 8)), random.normal(size=(3, 20, 5))
    rotation, _ = np.linalg.qr(random.normal(size=(8, 8)))
    np.testing.assert_allclose(similarity_correlation(tokens @ rotation * 7, tokens), 1.0)
    upper = np.triu_indices(20, 1)
    expected = [
        np.corrcoef(cosine_matrix(a)[upper], cosine_matrix(b)[upper])[0, 1]
        for a, b in zip(tokens, other, strict=True)
    ]
    np.testing.assert_allclose(similarity_correlation(tokens, other), expected)
    assert similarity_correlation(np.ones((1, 20, 4)), tokens[:1]).tolist() == [0.0]


def test_shuffled_patches_are_matched_back():
    random = np.random.default_rng(0)
    tokens, order = random.normal(size=(30, 6)), random.permutation(30)
    scaled = tokens * random.uniform(0.1, 9, (30, 1))  # a cosine ignores the length
    assert order[match_patches(tokens, scaled[order])].tolist() == list(range(30))


def test_within_one_patch_counts_neighbours_but_not_the_other_end_of_a_row():
    grid = (4, 5)  # patch 7 is row 1, column 2
    found = within_one_patch(np.full(6, 7), np.array([7, 1, 13, 9, 17, 8]), grid)
    assert found.tolist() == [True, True, True, False, False, True]
    assert not within_one_patch(np.array([4]), np.array([5]), grid)[0]


def test_the_object_is_the_cluster_in_the_middle():
    random = np.random.default_rng(0)
    directions = np.eye(3, 8)
    place = np.zeros((8, 8), int)  # sky above, ground below, an object between
    place[5:] = 1
    place[2:6, 3:6] = 2
    tokens = directions[place.ravel()] + 0.05 * random.normal(size=(64, 8))
    found = object_patches(tokens, (8, 8), num_clusters=3, seed=0)
    assert sorted(found) == np.flatnonzero(place.ravel() == 2).tolist()
