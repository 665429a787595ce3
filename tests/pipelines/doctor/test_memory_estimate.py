"""The estimate against sums done by hand; test_precompute.py holds it against a run."""

import shutil
import tempfile
from types import SimpleNamespace

import pytest
import torch

from fae.pipelines.config.recipe import load_recipe
from fae.pipelines.doctor.checkpoint_room import checkpoint_text, num_parts
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
from fae.pipelines.storage import s3
from fae.pipelines.training.memory_plan import MEBI
from fae.pipelines.training.requirements import checkpoint_size
from fae_core import machine
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


@pytest.mark.integration
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
    # `auto` would be another precision on a GPU than on some processors.
    options = [*TINY, f"data.path={photographs}", "precompute.precision=fp32"]
    recipe = load_recipe("photos-dinov2s", [*options, "data.limit=10"])
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
        [*options, "precompute.gpus_per_actor=1", "precompute.num_actors=3"],
    )
    moved = {p.name: p for p in precompute_memory(on_gpu)}["actor"]
    results = "results of a batch"
    assert moved.device == {"networks": actor[networks] // 2, results: actor[results]}
    assert moved.count == 3
    words = text(list(processes.values()))
    assert f"together on one host: {total(processes.values()) / MEBI:,.0f}" in words


def test_in_a_pod_the_cores_and_the_memory_are_the_pod_s(photographs, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text("3000000 1000000")
    (tmp_path / "memory.max").write_text("100000")
    (tmp_path / "own").write_text("0::/")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64), raising=False)
    options = [*TINY, f"data.path={photographs}", "data.limit=10", "precompute.cpus_per_decode=1"]
    recipe = load_recipe("photos-dinov2s", options)
    processes = {p.name: p for p in precompute_memory(recipe)}
    assert processes["idle worker"].count == 3
    assert processes["decode task"].count == 3 - recipe.precompute.cpus_per_actor
    assert processes["object store"].host == {"crops that wait": 15_000}


@pytest.mark.integration
def test_a_worker_holds_the_plan_of_its_micro_batch_and_the_checkpoint_that_it_writes():
    options = [
        *TINY, "autoencoder.training.batch_size=8", "autoencoder.training.num_workers=2",
        "autoencoder.training.precision=fp32",
    ]  # fmt: skip
    workers = [
        {p.name: p for p in training_memory(load_recipe("photos-dinov2s", made), "autoencoder")}[
            "worker"
        ]
        for made in (options, [*options, "autoencoder.training.use_gpu=true"])
    ]
    assert [w.count for w in workers] == [2, 2] and not workers[0].device
    step = workers[1].device
    kept = "kept for the backward pass"  # a CPU's attention keeps something else than a GPU's
    assert {n: size for n, size in workers[0].host.items() if n in step and n != kept} == {
        n: size for n, size in step.items() if n != kept
    }
    assert 0.5 * step[kept] < workers[0].host[kept] < 2 * step[kept]
    # The file holds weights and two moments; gradients are none of it.
    weights, rest = step["model: weights"], step["model: gradients, optimizer"]
    recipe = load_recipe("photos-dinov2s", options)
    size = checkpoint_size(recipe, "autoencoder")
    assert size == weights + rest * 2 // 3
    # It is written tensor by tensor. From a GPU a copy on the host is written meanwhile, and at the
    # end one of the network, for its own file.
    names = ("checkpoint, a copy until it is written", "network, whole for its file")
    copies = [sum(w.host.get(name, 0) for name in names) for w in workers]
    assert copies == [0, size + weights]
    made = load_recipe("photos-dinov2s", [*options, "autoencoder.training.checkpoint_parts=true"])
    memory = {p.name: p for p in training_memory(made, "autoencoder")}["worker"].host
    assert memory["checkpoint, a copy until it is written"] == size // 2
    assert f"{size / 2 / MEBI:,.0f}  each of its 2 parts" in checkpoint_text(made, "autoencoder")


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_checkpoint_is_compared_with_the_store_and_the_free_disk(tmp_path, monkeypatch, place):
    storage = "s3://bucket/runs" if place == "s3" else str(tmp_path / "not" / "there" / "yet")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    recipe = load_recipe("photos-dinov2s", [*TINY, f"storage={storage}"])
    size = checkpoint_size(recipe, "autoencoder")
    kept = recipe.autoencoder.training.keep_checkpoints
    needed = size if place == "s3" else (kept + 1) * size
    for free, fits in ((needed, True), (needed - 1, False)):
        asked = []

        def usage(path: str, free: int = free, asked: list[str] = asked) -> SimpleNamespace:
            asked.append(path)
            return SimpleNamespace(free=free)

        monkeypatch.setattr(shutil, "disk_usage", usage)
        words = checkpoint_text(recipe, "autoencoder")
        assert asked == [str(tmp_path)]
        assert f"{size / MEBI:,.0f}  one checkpoint" in words
        assert ("This will not fit" in words) != fits
        assert ("TMPDIR" in words) == (place == "s3" and not fits)
    monkeypatch.setattr(s3, "LARGEST_OBJECT", size - 1)
    assert ("S3 will refuse it" in checkpoint_text(recipe, "autoencoder")) == (place == "s3")


def test_parts_grow_where_an_object_would_need_more_than_ten_thousand():
    assert num_parts(11 * 2**30) == 176
    assert num_parts(10_000 * s3.PART_SIZE) == 10_000
    assert num_parts(10_000 * s3.PART_SIZE + 1) == 5_001
    assert num_parts(s3.LARGEST_OBJECT) <= 10_000
