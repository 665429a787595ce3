"""`fae probe`: how much of the backbone's semantics reconstructed features and latents keep.

list -> split by the hash of the key -> pooled vectors and patch comparisons (`probe_features.py`,
Ray Data) -> k-NN and linear probes in this process -> probe.json and two figures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fae_core.figures import picture_grid
from fae_core.metrics.probes import (
    Accuracy,
    LinearProbe,
    cosine_matrix,
    knn_accuracy,
    match_patches,
    object_patches,
)
from fae_core.precision import settled_precision
from fae_core.similarity_figures import MatchedPair, matching_figure, similarity_rows

from ..config import Recipe, with_absolute_paths
from ..config.facts import deciding_values
from ..config.sections import ProbeSection
from ..data import list_images
from ..data.crops import crop_version
from ..data.reading import load_crops
from ..data.records import ImageRecord, source_digest, split_records
from ..runtime.packages import versions
from ..runtime.places import check_places
from ..storage import differences, fingerprint_of, paths, refuse_other_work
from .errors import ProbeError
from .probe_features import KINDS, Networks, Pair, Probed, extract


def probe(recipe: Recipe, show_progress: bool = True) -> dict[str, float]:
    """The scores of the recipe's autoencoder on the labelled images of data.path.

    `knn_X` and `linear_X` are accuracies on test images, X being true features, reconstructed
    features or latents (KINDS). `linear_transfer` is the accuracy of the head of the true features,
    unmodified, on reconstructed ones, which is the paper's protocol. Each has `_low` and `_high`,
    Wilson's 95 % interval. `retention_knn` and `retention_linear` are reconstructed / true,
    `retention_transfer` is transfer / true.

    `similarity` is the correlation of the patches' cosine matrices of latents and features,
    averaged over test images. `matching` is the share of the object's patches whose match by
    latents, in another image of the class, is within one patch of the match by features; it is left
    out where no class has two test images. `linear_X_c` is the chosen regularization C.
    `num_train`, `num_test`, `num_classes` and `num_errors` are counts.

    With probe.output, matching.png, similarity.png and then probe.json are written there, or the
    scores that are there are returned. Raises RecipeError, SourceError, CheckpointError,
    ProbeError, and StoreMismatch where the output holds another probe.
    """
    recipe = with_absolute_paths(recipe)
    needed = ("data.path", "autoencoder.checkpoint")
    source, _ = recipe.require("a probe of labelled images", *needed)
    check_places(recipe, (*needed, "backbone.weights"))
    options = recipe.probe
    records = list_images(recipe.data)
    split = split_images(options, records, source)
    before = _report(options.output).get("parts", {}).get("probe.precision")
    options.precision = settled_precision(options.precision, options.gpus_per_actor, before)
    networks = Networks.of(recipe)
    parts = probe_parts(recipe, networks, records)
    if found := _finished(options.output, parts):
        return found
    probed = extract(recipe, [*split.test, *split.train], split.pairs, parts, show_progress)
    scores = score(options, split, probed)
    if options.output is not None:
        draw(recipe, networks, split, options.output)
        report = {
            "fingerprint": fingerprint_of(parts),
            "scores": scores,
            "parts": parts,
            "versions": versions(),
        }
        # probe.json is written last: where it exists, the figures exist.
        uri = paths.join(options.output, "probe.json")
        paths.write_bytes(uri, json.dumps(report, indent=1).encode())
    return scores


def summary(scores: dict[str, float]) -> str:
    """The scores as lines for a terminal."""

    def cell(name: str) -> str:
        return f"{scores[name]:.3f} ({scores[name + '_low']:.3f}–{scores[name + '_high']:.3f})"

    lines = [f"{'':22}{'k-NN':24}linear probe"]
    lines += [f"{kind:22}{cell('knn_' + kind):24}{cell('linear_' + kind)}" for kind in KINDS]
    lines += [f"{'true head on rebuilt':46}{cell('linear_transfer')}"]
    for name in (
        "retention_knn",
        "retention_linear",
        "retention_transfer",
        "similarity",
        "matching",
    ):
        if name in scores:
            lines.append(f"{name:22}{scores[name]:.3f}")
    counts = {name: int(scores[f"num_{name}"]) for name in ("train", "test", "classes", "errors")}
    lines.append(", ".join(f"{count} {name}" for name, count in counts.items()))
    return "\n".join(lines)


def probe_parts(
    recipe: Recipe, networks: Networks, records: Sequence[ImageRecord]
) -> dict[str, str]:
    """What decides the scores: networks by content, crop, images, labels, seed and settings."""
    settings = deciding_values(recipe, ["probe"], addresses=False)
    return {
        "backbone weights": networks.encoder.backbone.weights_sha256,
        "autoencoder weights": networks.encoder.autoencoder_sha256,
        "grid": str(networks.grid),
        "image size": str(recipe.image_size),
        "crop": crop_version(recipe.data),
        "source": source_digest(records),
        "seed": str(recipe.seed),
        **{name: str(value) for name, value in settings.items()},
    }


def _report(output: str | None) -> dict[str, Any]:
    """probe.json of `output`, empty where there is none."""
    if output is None or not paths.exists(uri := paths.join(output, "probe.json")):
        return {}
    return dict(json.loads(paths.read_bytes(uri)))


def _finished(output: str | None, parts: dict[str, str]) -> dict[str, float] | None:
    """The scores that `output` holds already. Raises StoreMismatch where they are of others."""
    if not (report := _report(output)):
        return None
    differing = differences(report["parts"], parts)
    refuse_other_work(f"{output} holds another probe", differing, "Choose another probe.output=….")
    return dict(report["scores"])


@dataclass(frozen=True)
class Split:
    """Images that train the probes, images that test them, and pairs of the latter to match."""

    train: list[ImageRecord]
    test: list[ImageRecord]
    pairs: list[Pair]


def probe_problem(records: Sequence[ImageRecord], recipe: Recipe) -> str | None:
    """Why `records` cannot be probed as the recipe says, None where they can."""
    try:
        split_images(recipe.probe, records, str(recipe.data.path))
    except ProbeError as error:
        return str(error)
    return None


def split_images(options: ProbeSection, records: Sequence[ImageRecord], source: str) -> Split:
    """Training and test images, by the hash of the key. `source` names the images in messages.

    Raises ProbeError for missing labels and for too few images or classes.
    """
    unlabelled = [record.key for record in records if record.label is None]
    if unlabelled:
        raise ProbeError(
            f"{len(unlabelled)} of {len(records)} images of {source} have no label, the first is "
            f"{unlabelled[0]!r}. A probe needs class folders, or an integer column named by "
            "data.label_column."
        )
    train, test = split_records(records, options.test_fraction)
    train, test = train[: options.train_limit], test[: options.test_limit]
    _check_split(options, train, test, source)
    return Split(train, test, image_pairs(test, options.num_image_pairs))


def _check_split(
    options: ProbeSection, train: Sequence[ImageRecord], test: Sequence[ImageRecord], source: str
) -> None:
    """Raises ProbeError where the images are too few, or of too few classes."""
    if len(train) < options.num_neighbors or not test:
        raise ProbeError(
            f"{len(train)} training and {len(test)} test images of {source} "
            f"(probe.test_fraction={options.test_fraction:g}): probe.num_neighbors="
            f"{options.num_neighbors} needs as many training images, and testing at least one. "
            "Give more images, or lower probe.num_neighbors."
        )
    if len({record.label for record in train}) < 2:
        raise ProbeError(f"The training images of {source} are of one class. Give images of two.")


def image_pairs(test: Sequence[ImageRecord], num_pairs: int) -> list[Pair]:
    """At most `num_pairs` pairs of images of one class, from each class in turn.

    No image is in two pairs.
    """
    by_label: dict[int | None, list[ImageRecord]] = {}
    for record in test:
        by_label.setdefault(record.label, []).append(record)
    found = [
        (turn, label, (images[2 * turn], images[2 * turn + 1]))
        for label, images in by_label.items()
        for turn in range(len(images) // 2)
    ]
    return [pair for _, _, pair in sorted(found, key=lambda item: item[:2])][:num_pairs]


def score(options: ProbeSection, split: Split, found: dict[str, Probed]) -> dict[str, float]:
    """The scores that `probe` returns, from what `extract` found out.

    Raises ProbeError where too few of the images could be decoded.
    """
    train = [record for record in split.train if record.key in found]
    test = [record for record in split.test if record.key in found]
    _check_split(options, train, test, "the images that can be decoded")
    train_labels, test_labels = (np.array([r.label for r in part]) for part in (train, test))
    accuracies: dict[str, Accuracy] = {}
    chosen: dict[str, float] = {}
    for kind in KINDS:
        x, y = (np.stack([found[r.key].pooled[kind] for r in part]) for part in (train, test))
        accuracies[f"knn_{kind}"] = knn_accuracy(
            x, train_labels, y, test_labels, options.num_neighbors
        )
        head = LinearProbe.fit(x, train_labels, options.regularization, options.max_iterations)
        accuracies[f"linear_{kind}"] = head.accuracy(y, test_labels)
        chosen[f"linear_{kind}_c"] = head.regularization
        if kind == "true":
            rebuilt = np.stack([found[r.key].pooled["reconstructed"] for r in test])
            accuracies["linear_transfer"] = head.accuracy(rebuilt, test_labels)
    scores: dict[str, float] = {}
    for name, accuracy in accuracies.items():
        scores[name] = accuracy.value
        scores[f"{name}_low"], scores[f"{name}_high"] = accuracy.interval
    ratios = {
        "retention_knn": ("knn_reconstructed", "knn_true"),
        "retention_linear": ("linear_reconstructed", "linear_true"),
        "retention_transfer": ("linear_transfer", "linear_true"),
    }
    for name, (ours, theirs) in ratios.items():
        # Where the probe of true features is never right, there is nothing to retain.
        scores[name] = scores[ours] / scores[theirs] if scores[theirs] else 0.0
    scores["similarity"] = float(np.mean([found[r.key].similarity for r in test]))
    right, all_patches = np.sum([found[r.key].matches for r in test], axis=0)
    if all_patches:
        scores["matching"] = float(right / all_patches)
    counts = {
        "num_train": len(train),
        "num_test": len(test),
        "num_classes": len({*train_labels.tolist(), *test_labels.tolist()}),
        "num_errors": len(split.train) + len(split.test) - len(train) - len(test),
    }
    return {**scores, **chosen, **{name: float(count) for name, count in counts.items()}}


def draw(recipe: Recipe, networks: Networks, split: Split, output: str) -> None:
    """Write matching.png of pairs and similarity.png of their first images into `output`.

    Where there are no pairs, nothing is written.
    """
    options, grid = recipe.probe, networks.grid
    random = np.random.default_rng(recipe.seed)
    pictures: list[np.ndarray] = []
    chosen: list[int] = []
    maps: list[list[np.ndarray]] = []
    matched: list[MatchedPair] = []
    for pair in split.pairs[: options.figure_rows]:
        images, ok, _ = load_crops(pair, recipe.image_size, recipe.data)
        if len(ok) < 2:
            continue
        tokens = networks.tokens(images)
        true, latents = tokens["true"], tokens["latent"]
        inside = object_patches(latents[0], grid, options.num_clusters, recipe.seed)
        patches = random.choice(inside, min(options.num_pairs, len(inside)), replace=False)
        matches = match_patches(latents[0][patches], latents[1])
        reference = match_patches(true[0][patches], true[1])
        matched.append(MatchedPair(images[0], images[1], patches, matches, reference))
        pictures.append(images[0])
        chosen.append(int(patches[0]))
        maps.append([cosine_matrix(kind[0])[patches[0]] for kind in (true, latents)])
    if not matched:
        return
    note = "lines: matches by latents; rings: by the backbone's features"
    figure = matching_figure(matched, grid, note)
    paths.write_bytes(paths.join(output, "matching.png"), figure)
    rows = similarity_rows(np.stack(pictures), chosen, maps, grid)
    titles = ("image and patch", "cosine of features", "cosine of latents")
    paths.write_bytes(paths.join(output, "similarity.png"), picture_grid(rows, titles))
