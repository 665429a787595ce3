"""The estimate against sums done by hand; test_precompute.py holds it against a run."""

import pytest
import torch

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.doctor.memory import (
    TASK,
    precompute_memory,
    text,
    total,
    training_memory,
)
from fae.pipelines.doctor.peak import Results, peak_of
from fae.pipelines.latents.encoder import LatentEncoder
from fae.pipelines.networks.untrained import build_autoencoder, build_backbone, fake_networks
from fae.pipelines.training.memory_plan import MEBI
from tests.tiny import SHARD_SIZE, TINY

CROP = 3 * 32 * 32


def test_the_peak_is_what_was_alive_at_once():
    x = torch.ones(1000)
    with Results() as results:
        y = x + 1
        for _ in range(5):
            y = y * 2  # the old one lives until the new one is there
        view = y[:10]
        del y
        z = view.clone()
    assert (results.peak, z.shape) == (2 * 4000, (10,))
    assert results.now == 4000 + 40


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_fake_networks_is_that_of_real_ones(precision):
    recipe = load_recipe("photos-dinov2s", TINY)
    backbone = build_backbone(recipe.backbone)
    autoencoder = build_autoencoder(recipe.autoencoder, backbone.spec)
    columns = ["mean", "logvar", "mean_flip"]
    encoder = LatentEncoder(backbone, autoencoder, "", columns, precision, torch.device("cpu"))

    def peak() -> int:
        crops = [torch.zeros(n, 32, 32, 3, dtype=torch.uint8) for n in (1, 2)]
        return peak_of(lambda n: encoder.encode_batch(crops[n - 1]), 7)

    real = peak()
    with fake_networks(backbone, autoencoder):
        assert peak() == real > 7 * 4 * CROP


def test_precompute_holds_shards_in_tasks_networks_in_actors_and_the_plan_in_the_driver(
    photographs,
):
    recipe = load_recipe("photos-dinov2s", [*TINY, f"data.path={photographs}", "data.limit=10"])
    processes = {p.name: p for p in precompute_memory(recipe)}
    assert processes["driver"].host["plan"] == 426 * 10
    shard = SHARD_SIZE * CROP
    assert processes["decode task"].host == {
        "Python": TASK,
        "crops of a shard, three times": 3 * shard,
    }
    actor = processes["actor"].host
    networks = "networks, twice while they are loaded"
    assert actor[networks] == processes["driver"].host[networks] > 2 * 4 * 5_300_000
    assert processes["object store"].host == {"crops that wait": 10 * CROP}
    # A micro-batch holds at least the images as float32.
    assert actor["results of a batch"] > 4 * CROP * SHARD_SIZE
    on_gpu = load_recipe(
        "photos-dinov2s",
        [
            *TINY,
            f"data.path={photographs}",
            "precompute.gpus_per_actor=1",
            "precompute.num_actors=3",
        ],
    )
    moved = {p.name: p for p in precompute_memory(on_gpu)}["actor"]
    results = "results of a batch"
    assert moved.device == {"networks": actor[networks] // 2, results: actor[results]}
    assert moved.count == 3
    words = text(list(processes.values()))
    assert f"together on one host: {total(processes.values()) / MEBI:,.0f}" in words


def test_a_worker_holds_the_plan_of_its_micro_batch_and_the_checkpoint_that_it_writes():
    options = [*TINY, "autoencoder.training.batch_size=8", "autoencoder.training.num_workers=2"]
    workers = [
        {p.name: p for p in training_memory(load_recipe("photos-dinov2s", made), "autoencoder")}[
            "worker"
        ]
        for made in (options, [*options, "autoencoder.training.use_gpu=true"])
    ]
    assert [w.count for w in workers] == [2, 2] and not workers[0].device
    step = workers[1].device
    assert {name: workers[0].host[name] for name in step} == step
    # The file holds weights and two moments; gradients are none of it.
    weights, rest = step["model: weights"], step["model: gradients, optimizer"]
    assert workers[0].host["checkpoint, while it is written, twice"] == 2 * (
        weights + rest * 2 // 3
    )
