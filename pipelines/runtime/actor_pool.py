"""Rows through a task on a CPU, a pool of actors and a task on a CPU, by Ray Data.

Precompute, sampling, evaluation and probes are this chain. A row is one unit of work, for example
a whole shard, so no operator can split it, and a lost worker costs one row.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fae_core.errors import UserError

from ..config.sections import ActorPoolSection, DecodingPoolSection
from .lanes import in_lanes, smallest_node_cpus, this_node
from .packages import OtherVersions, refuse_this_node, versions
from .room import Stalled, Waiting, check_room, cluster
from .session import plain_error, start_ray

ACTORS_PER_LANE = 64
"""Actors that one Ray data set drives. benchmarks/scale.py measures where its driver is full."""
EVENTS_OF_LANES = False
"""Whether Ray records events of single tasks with several lanes, as with one."""
ROWS_PER_DATASET = 100_000
"""Each row is an object from the start: a million at once cost the driver minutes and gigabytes."""
FINISH_CPUS = 0.1
"""CPUs that Ray reserves for a finishing task, which writes and mostly waits."""

EXPAND_CPUS = 0.25
"""CPUs of a task that only reads; another number than a preparing task's keeps both apart."""

Row = dict[str, Any]
RowTask = Callable[[Row], Row]


@dataclass(frozen=True)
class RowStages:
    """What becomes of a row: `prepare` on a CPU, `actor(*arguments)` called on it, `finish`.

    An actor is called with a batch of one row, each value in a list or array of length one.
    """

    actor: type
    arguments: tuple[Any, ...]
    prepare: RowTask | None = None
    finish: RowTask | None = None
    expand: Callable[[Row], Iterator[Row]] | None = None
    """First of all, where one row stands for several: called as an actor is, it yields them."""


def run_rows(
    rows: Sequence[Row], stages: RowStages, pool: ActorPoolSection, keep_order: bool = False
) -> Generator[Row, None, None]:
    """The finished rows as they come, or in the order of `rows`; starts Ray where it must.

    Its actors keep their CPUs and GPUs until it ends or is closed (`contextlib.closing`).

    One thread of Python drives a Ray data set, and some hundred actors keep it busy. More than
    ACTORS_PER_LANE actors are therefore divided into lanes: each has a data set, an equal part of
    the rows, and a process that drives it. Ray then records no events of single tasks, which would
    keep its directory (`gcs_server`) busy next. Rows in order take one lane.

    Raises the UserError that a task or an actor raised, NoRoom, and Stalled where nothing has moved
    for half an hour.
    """
    start_ray()
    _release_actors()  # a log or a notebook that kept an error of before may have let go of it now
    if stages.prepare is not None:
        check_room(pool)
    num_lanes = 1 if keep_order else lanes_for(pool.num_actors)
    if num_lanes == 1:
        finished = _lane(rows, stages, pool, keep_order, True)
    else:
        parts = (
            pool.model_copy(update={"num_actors": len(range(lane, pool.num_actors, num_lanes))})
            for lane in range(num_lanes)
        )
        lanes = [
            (rows[lane::num_lanes], stages, part, False, EVENTS_OF_LANES)
            for lane, part in enumerate(parts)
        ]
        finished = in_lanes(_lane, lanes)
    failure: Exception | None = None
    try:
        with Waiting() as waiting:
            for row in finished:
                waiting.came()
                yield row
    except Exception as error:
        failure = _in_words(error)
    finally:
        del finished
        _release_actors()
    if failure is not None:
        raise failure


def _in_words(error: Exception) -> Exception:
    if isinstance(error, _gave_up()):
        return Stalled(
            f"Nothing has moved for {_patience() / 60:.0f} minutes; {cluster()} What is "
            "finished remains: when there are nodes again, run the same command. "
            "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S sets the time in seconds."
        )
    return plain_error(error)


def _release_actors() -> None:
    """Frees the CPUs and GPUs of data sets that were not read to their end.

    Ray ends an actor when its last handle is gone. A data set that failed leaves handles in
    reference cycles. Python collects them at a time of its own, which does not come while the next
    data set waits for their CPUs.
    """
    gc.collect()


def lanes_for(num_actors: int) -> int:
    """Number of Ray data sets for so many actors.

    Ray Data gives each of several data sets the same whole number of every node's CPUs, so there
    are no more than the smallest node has CPUs: a data set without a CPU would stand still.
    """
    wanted = -(-num_actors // ACTORS_PER_LANE)
    if wanted == 1:
        return 1
    return max(1, min(wanted, smallest_node_cpus()))


def _lane(
    rows: Sequence[Row],
    stages: RowStages,
    pool: ActorPoolSection,
    keep_order: bool,
    task_events: bool,
) -> Iterator[Row]:
    for start in range(0, len(rows), ROWS_PER_DATASET):
        some = rows[start : start + ROWS_PER_DATASET]
        yield from dataset_of(some, stages, pool, keep_order, task_events).iter_rows()


def dataset_of(
    rows: Sequence[Row],
    stages: RowStages,
    pool: ActorPoolSection,
    keep_order: bool = False,
    task_events: bool = True,
) -> Any:
    """The Ray data set of the finished rows; nothing runs until it is read.

    `task_events` are what Ray's dashboard and timeline show of single tasks.
    """
    import ray.data

    how, here = None if task_events else _without_events, versions()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset: Any = ray.data.from_items(list(rows), override_num_blocks=len(rows))
    dataset.context.execution_options.preserve_order = keep_order
    if stages.expand is not None:
        # Ray Data would put small rows together into a block, which one task then prepares alone.
        dataset.context.target_max_block_size = 1
        dataset = dataset.map_batches(
            stages.expand,
            batch_size=1,
            batch_format="numpy",
            num_cpus=EXPAND_CPUS,
            ray_remote_args_fn=how,
        )
    if stages.prepare is not None:
        assert isinstance(pool, DecodingPoolSection), "a section without settings for decoding"
        dataset = dataset.map(
            _of_these_versions(stages.prepare, here),
            num_cpus=pool.cpus_per_decode,
            label_selector=pool.decode_labels or None,
            ray_remote_args_fn=how,
        )
    dataset = dataset.map_batches(
        _speaking(stages.actor, here),
        fn_constructor_args=stages.arguments,
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=pool.num_actors),
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor,
        ray_remote_args_fn=how,
    )
    if stages.finish is not None:
        finish = _of_these_versions(stages.finish, here)
        dataset = dataset.map(finish, num_cpus=FINISH_CPUS, ray_remote_args_fn=how)
    return dataset


def _of_these_versions(task: RowTask, expected: Mapping[str, str]) -> RowTask:
    """`task`, but on a node that has joined with other versions it raises OtherVersions."""

    def checked(row: Row) -> Row:
        refuse_this_node(expected)
        return task(row)

    # Ray's dashboard and logs show it.
    checked.__name__ = getattr(task, "func", task).__name__
    return checked


def _speaking(actor: type, expected: Mapping[str, str]) -> type:
    """`actor`, but its first call raises a UserError of its start, and names the node.

    Ray keeps no cause of an error of the start. A node with other versions than those `expected`
    is one.
    """

    class Speaking(actor):  # type: ignore[misc]
        _error: UserError | None = None

        def __init__(self, *arguments: Any) -> None:
            try:
                refuse_this_node(expected)
                super().__init__(*arguments)
            except OtherVersions as error:
                self._error = error
            except UserError as error:
                self._error = type(error)(f"{this_node()}{error}")

        def __call__(self, batch: Row) -> Row:
            if self._error is not None:
                raise self._error
            result: Row = super().__call__(batch)
            return result

    # Ray's dashboard and logs show it.
    Speaking.__name__ = Speaking.__qualname__ = actor.__name__
    return Speaking


def _gave_up() -> tuple[type[Exception], ...]:
    """What Ray Data raises where nothing moves; no class before Ray 2.60."""
    import ray.data.exceptions

    kind = getattr(ray.data.exceptions, "ExecutionTimeoutError", None)
    return (kind,) if kind else ()


def _patience() -> float:
    import ray.data

    return float(ray.data.DataContext.get_current().execution_no_progress_timeout_s)


def _without_events() -> dict[str, Any]:
    return {"enable_task_events": False}
