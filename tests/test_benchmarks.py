"""The benchmarks' own functions, small: what they print is only as good as these."""

from __future__ import annotations

import pytest

from benchmarks import scale, store
from pipelines import latent_store, precompute
from pipelines.latent_reader import LatentStore


def test_the_driver_is_full_where_its_cost_is_the_time_in_which_the_cluster_ends_a_shard():
    service = 1.5
    constant, growth, actors = scale.saturation([10, 20, 40], [0.003, 0.004, 0.006], service)
    assert (constant, growth) == pytest.approx((0.002, 0.0001))
    assert service / actors == pytest.approx(constant + growth * actors)
    assert scale.saturation([10, 20], [0.003, 0.003], service)[2] == pytest.approx(500)


def test_lanes_are_counted_as_the_pipeline_makes_them(monkeypatch):
    monkeypatch.setattr(precompute, "ACTORS_PER_LANE", 64)
    assert [scale.lanes_of({"actors": actors}) for actors in (1, 64, 65, 256)] == [1, 1, 2, 4]


def test_a_made_up_store_of_many_shards_is_planned_committed_and_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "FOOTERS", 20)
    monkeypatch.setattr(latent_store, "SHARDS_AT_ONCE", 16)
    monkeypatch.setattr(latent_store, "PLAN_GROUPS", 7)
    results = {name: step() for name, step in scale.steps_of(str(tmp_path), 50)}
    assert results["list what is missing of none"] == list(range(50))
    assert results["list what is missing of all"] == []
    manifest = results["commit, the footers given"]
    assert manifest["stored"] == 50
    assert results["read the manifest"] == manifest


def test_a_written_store_reads_back_and_a_manifest_alone_opens(tmp_path):
    store.write_store(str(tmp_path), 1024, (2, 2, 2))
    assert latent_store.verify(str(tmp_path)) == []
    for read in (store.read_files, store.read_arrow, store.read_epoch):
        assert store.timed(read, str(tmp_path), cached=False) > 0
    store.write_manifest(str(tmp_path), 2000)
    opened = LatentStore.open(str(tmp_path))
    assert (len(opened), opened.num_rows.tolist()) == (2000, [512, 512, 512, 464])
