"""Rows through tasks and actors: lanes, errors in words, and no actor left behind."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from fae.pipelines.config.recipe import Recipe
from fae.pipelines.runtime import actor_pool
from fae.pipelines.runtime.actor_pool import RowStages, lanes_for, run_rows
from fae.pipelines.runtime.packages import OtherVersions
from fae.pipelines.runtime.room import Stalled
from fae_core.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    import ray

    from fae.pipelines.runtime.session import start_ray

    start_ray(num_cpus=2)
    yield
    ray.shutdown()


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_actors_are_parted_into_lanes_that_each_have_a_cpu_of_every_node(monkeypatch):
    monkeypatch.setattr("fae.pipelines.runtime.actor_pool.ACTORS_PER_LANE", 64)
    monkeypatch.setattr("fae.pipelines.runtime.actor_pool.smallest_node_cpus", lambda: 8)
    assert [lanes_for(actors) for actors in (1, 64, 65, 256, 1000)] == [1, 1, 2, 4, 8]
    monkeypatch.setattr("fae.pipelines.runtime.actor_pool.smallest_node_cpus", lambda: 0)
    assert lanes_for(1000) == 1


class OfOtherWeights:
    """An actor that does not start."""

    def __init__(self):
        raise CheckpointError("The weights are not the ones.")

    def __call__(self, batch):
        raise AssertionError


@pytest.mark.integration
def test_an_error_of_an_actors_start_is_the_jobs_in_words(ray_session):
    rows = run_rows([{"shard": 0}], RowStages(OfOtherWeights, ()), Recipe().precompute)
    with pytest.raises(CheckpointError, match=r"^The weights are not the ones\."):
        list(rows)


class Passing:
    """An actor that changes nothing."""

    def __call__(self, batch):
        return batch


def same(row):
    return row


@pytest.mark.integration
@pytest.mark.parametrize(
    "stages",
    [
        RowStages(Passing, ()),
        RowStages(Passing, (), prepare=same),
        RowStages(Passing, (), finish=same),
    ],
    ids=["actor", "prepare", "finish"],
)
def test_a_node_with_other_versions_than_the_driver_does_no_row(ray_session, monkeypatch, stages):
    if stages.prepare or stages.finish:  # on the actor's node all is well
        monkeypatch.setattr(actor_pool, "_speaking", lambda actor, expected: actor)
    monkeypatch.setattr(actor_pool, "versions", lambda: {"timm": "0.0.1"})
    with pytest.raises(OtherVersions, match=r"^it has timm 1.*started with timm 0\.0\.1\. Use one"):
        list(run_rows([{"shard": 0}], stages, Recipe().precompute))


def refused(row):
    raise CheckpointError("It is refused.")


def refused_at_the_end(row):
    if row["shard"] == 3:
        refused(row)
    return row


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Python collects no reference cycles by itself, as it may not for long in a waiting driver."""
    gc.disable()
    logging.disable(logging.CRITICAL)  # pytest keeps records of the log, and they keep frames
    yield
    logging.disable(logging.NOTSET)
    gc.enable()


@pytest.mark.integration
@pytest.mark.parametrize(
    "stages",
    [
        RowStages(OfOtherWeights, ()),
        RowStages(Passing, (), prepare=refused),
        RowStages(Passing, (), finish=refused),
    ],
    ids=["actor", "prepare", "finish"],
)
def test_a_job_that_fails_leaves_no_actor_behind(ray_session, no_collector, stages):
    with pytest.raises(CheckpointError) as failure:
        list(run_rows([{"shard": 0}], stages, Recipe().precompute))
    wait_for(all_cpus_free, seconds=20)
    assert failure.value  # a notebook keeps the last error, too


@pytest.mark.integration
def test_lanes_that_fail_leave_no_actor_behind(ray_session, no_collector, monkeypatch):
    monkeypatch.setattr("fae.pipelines.runtime.actor_pool.ACTORS_PER_LANE", 1)
    pool = Recipe().precompute.model_copy(update={"num_actors": 2, "cpus_per_actor": 0.4})
    stages = RowStages(Passing, (), prepare=refused_at_the_end)
    with pytest.raises(CheckpointError):
        list(run_rows([{"shard": index} for index in range(4)], stages, pool))
    wait_for(all_cpus_free, seconds=20)


@pytest.mark.integration
def test_rows_that_are_closed_leave_no_actor_behind(ray_session, no_collector):
    rows = run_rows(
        [{"shard": index} for index in range(4)], RowStages(Passing, ()), Recipe().precompute
    )
    with closing(rows):
        next(rows)
    wait_for(all_cpus_free, seconds=20)


def all_cpus_free() -> bool:
    import ray

    return ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]


class Silent:
    """An actor that never finishes a row."""

    def __call__(self, batch):
        time.sleep(600)


@pytest.mark.integration
def test_a_job_in_which_nothing_moves_ends_in_words(ray_session, monkeypatch):
    import ray.data

    context = ray.data.DataContext.get_current()
    monkeypatch.setattr(context, "execution_no_progress_timeout_s", 6.0)
    rows = run_rows([{"shard": 0}], RowStages(Silent, ()), Recipe().precompute)
    with pytest.raises(Stalled, match=r"^Nothing has moved for 0 minutes; 1 node is up, .*again, "):
        list(rows)
