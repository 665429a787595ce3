"""What a generator trains on: every row once an epoch, on any number of workers; refusals."""

from __future__ import annotations

import pytest
import torch

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.config.sections import GeneratorSection, GeneratorTraining
from fae.pipelines.latents.reader import LatentStore
from fae.pipelines.storage.claims import StoreError
from fae.pipelines.training.generator import train_generator
from fae.pipelines.training.job import parts_of
from fae.pipelines.training.latent_feed import latent_feed

NUM_ROWS = 20
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(write_store, tmp_path_factory) -> LatentStore:
    return write_store(tmp_path_factory.mktemp("store"))


def section(**changes) -> GeneratorSection:
    training = GeneratorTraining(batch_size=10, **changes.pop("training", {}))
    return GeneratorSection(**{"num_classes": 5, "training": training, **changes})


def take(store, generator, num, start=0, rank=0, world_size=1):
    feed = latent_feed(store, generator, seed=3)(start, rank, world_size, CPU)
    return [next(feed) for _ in range(num)]


def test_an_epoch_holds_every_row_once_with_its_own_label(store):
    batches = take(store, section(label_dropout=0.0, latents="mode"), 2)
    rows = torch.cat([b["latents"][:, 0, 0, 0].round() % 100 for b in batches]).int().tolist()
    assert sorted(rows) == list(range(NUM_ROWS))
    labels = torch.cat([b["labels"] for b in batches]).tolist()
    assert labels == [row % 5 for row in rows]


def test_about_half_are_mirrored_and_none_where_the_recipe_says_so(store):
    mirrored = torch.cat([b["latents"][:, 0, 0, 0] > 50 for b in take(store, section(), 20)])
    assert 0.35 < mirrored.float().mean() < 0.65
    plain = take(store, section(flip=False), 4)
    assert all((b["latents"] < 50).all() for b in plain)


@pytest.mark.parametrize(
    ("workers", "num_workers", "accumulation"), [(2, 2, 1), (1, 1, 5), (5, 5, 2), (3, 5, 1)]
)
def test_workers_and_accumulation_share_out_the_same_samples_and_draws(
    store, workers, num_workers, accumulation
):
    whole = take(store, section(latents="sample"), 1, start=7)[0]
    seen: dict[int, dict[str, torch.Tensor]] = {}
    for rank in range(workers):
        training = {"num_workers": num_workers, "accumulation": accumulation}
        split = section(latents="sample", training=training)
        num_batches = len(parts_of(split.training, rank, workers))
        for batch in take(store, split, num_batches, 7, rank, workers):
            assert batch.step == 7
            for i, place in enumerate(batch.samples):
                seen[place] = {name: batch[name][i] for name in batch.tensors}
    assert sorted(seen) == list(range(10))
    for name in whole.tensors:
        assert torch.equal(torch.stack([seen[i][name] for i in range(10)]), whole[name]), name


def test_posterior_samples_spread_by_the_variance(store):
    mode = torch.cat([b["latents"] for b in take(store, section(), 8)])
    drawn = torch.cat([b["latents"] for b in take(store, section(latents="sample"), 8)])
    # logvar is 0 up to 0.01, so a sample is the mode plus a standard normal.
    assert (drawn - mode).std().item() == pytest.approx(1.0, abs=0.05)


def test_dropped_labels_are_the_null_class(store):
    labels = torch.cat([b["labels"] for b in take(store, section(label_dropout=0.5), 20)])
    assert 0.35 < (labels == 5).float().mean() < 0.65


def test_a_label_outside_the_classes_is_refused(store):
    with pytest.raises(StoreError, match=r"label \d.*num_classes is 3"):
        take(store, section(num_classes=3), 2)


def test_labels_are_checked_before_a_worker_starts_and_no_run_is_claimed(store, tmp_path):
    values = [
        "run=test", f"storage={tmp_path}", f"latents={store.uri}", "generator.width=32",
        "generator.depth=2", "generator.num_heads=2", "generator.size=S",
    ]  # fmt: skip
    recipe = load_recipe("photos-dinov2s", [*values, "generator.num_classes=3"])
    with pytest.raises(StoreError, match=r"label of '019' is 4.*Set generator.num_classes=5"):
        train_generator(recipe)
    assert not list(tmp_path.iterdir())


def test_images_without_labels_want_one_class(write_store, tmp_path):
    store = write_store(tmp_path, ("mean",), labels=False)
    with pytest.raises(StoreError, match="no label"):
        take(store, section(), 1)
    batch = take(store, section(num_classes=1, label_dropout=0.0), 1)[0]
    assert not batch["labels"].any()


def test_samples_of_a_store_of_means_are_refused_with_the_columns_to_ask_for(write_store, tmp_path):
    store = write_store(tmp_path, ("mean", "mean_flip"))
    with pytest.raises(
        StoreError, match=r"precompute.columns=\[mean,logvar,mean_flip,logvar_flip\]"
    ):
        latent_feed(store, section(latents="sample"), 0)
