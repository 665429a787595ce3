"""The training loop that every trainer shares, run by each worker under Ray Train.

A trainer supplies a `Job`, a feed and a validation; launch.py starts the workers. Randomness and
the order of the data depend on the step alone (batches.py), and a checkpoint is complete or absent.
The same command after a SIGKILL therefore ends with the same parameters: bit for bit on a CPU.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from . import run_folder
from .checkpoints import Checkpoints
from .compilation import Compilation
from .distributed import gather, shard
from .job import Feed, Job, Validation, parts_of
from .launch import Worker
from .memory_plan import memory_plan_of
from .meters import BadImages, Meter
from .metrics_log import MetricsLog
from .preemption import NodeLeaving, Notice
from .run_log import RunLog, say
from .state import TrainState
from .step import learning_rate, train_step
from .tracking import Tracker


def run_job(
    worker: Worker,
    job: Job,
    feed: Feed,
    validate: Validation | None,
    fingerprints: Callable[[], Mapping[str, str]],
    class_names: Sequence[str] = (),
) -> None:
    """Train `job` to the last step, and write the run's network and result.

    The network has the final weights, or their average where the training keeps one. Rank 0 alone
    validates, where there is something to validate on, and writes, with `fingerprints` of what the
    network was trained with and `class_names` where its classes have names. An error marks the run
    FAILED in MLflow; it is RUNNING again when it resumes.
    """
    tracker = worker.tracker()
    checkpoints = Checkpoints(worker.run_uri, worker.training)
    try:
        trained, metrics = _train(worker, job, feed, validate, tracker, checkpoints)
        if tracker:
            marks, network = fingerprints(), worker.network
            run_folder.finish(worker.run_uri, network, trained, marks, metrics, class_names)
    except Exception as error:
        with contextlib.suppress(Exception):  # the first error is the run's
            checkpoints.wait()
        if tracker:
            tracker.finish("KILLED" if isinstance(error, NodeLeaving) else "FAILED")
        raise
    if tracker:
        tracker.finish()


def _train(
    worker: Worker,
    job: Job,
    feed: Feed,
    validate: Validation | None,
    tracker: Tracker | None,
    checkpoints: Checkpoints,
) -> tuple[nn.Module, dict[str, float]]:
    """The trained model, and on rank 0 the metrics of its validation."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device, training, run_uri = worker.device, worker.training, worker.run_uri
    sharded = training.parallel == "fsdp" and world_size > 1
    # What rank 0 validates and keeps is the model itself, or a whole copy of a sharded one.
    whole = copy.deepcopy(job.model) if sharded and rank == 0 else job.model
    model = job.model.to(device)
    if sharded:
        shard(model)
    if job.adversary:
        job.adversary.module.to(device)
    state = TrainState(model, training, job.adversary)
    resumed = checkpoints.resume(state)
    log = RunLog(tracker, MetricsLog(run_uri, state.step)) if tracker else None
    if log and resumed:
        say(resumed)
    if log and training.min_workers:
        say(f"on {world_size} of {training.num_workers} workers")
    last_step = training.steps
    wrapped = model if sharded else ray.train.torch.prepare_model(model)
    wrapped_adversary = (
        ray.train.torch.prepare_model(job.adversary.module) if job.adversary else None
    )
    adversary_loss = job.adversary.loss if job.adversary else None
    bad_images = BadImages(run_uri, rank, world_size)
    meter = Meter(training.batch_size, world_size)
    validation: dict[str, float] = {}
    notice = Notice()
    num_batches = len(parts_of(training, rank, world_size))
    batches_to_come = feed(state.step, rank, world_size, device)
    if log and not sharded and state.step < last_step:
        first = next(batches_to_come)
        say(memory_plan_of(job, training, first).text(device))
        batches_to_come = itertools.chain([first], batches_to_come)
    # After the plan, which would be measured on what is compiled.
    modules = (wrapped, *job.frozen.values())
    compilation = Compilation(
        training, run_uri, modules, device, rank == 0, world_size, job.retains_graph
    )
    meter.restart()
    while state.step < last_step:
        with meter.waiting():
            batches = [next(batches_to_come) for _ in range(num_batches)]
        for batch in batches:
            bad_images.add(batch.errors)
        with compilation.step(state.step):
            terms = train_step(
                state, wrapped, job.loss, batches, training, wrapped_adversary, adversary_loss
            )
        meter.add(terms)
        step, last = state.step, state.step == last_step
        if step % training.log_every == 0 or last:
            metrics = meter.flush() | {"bad_images": float(bad_images.count())}
            metrics["learning_rate"] = learning_rate(step - 1, training)
            if log:
                log.add("train", f"step {step}/{training.steps}", metrics, step)
                log.metrics_log.publish()
        validates = step % training.validate_every == 0 and not last
        if validates:
            with state.averaged(), compilation.paused():
                if sharded:
                    gather(model, whole)
                if log and validate:
                    validation = _validate(validate, whole, device, step, log)
        checkpoints.check()
        leaves = worker.on_cluster and notice.after_step() and not last
        saves = step % training.checkpoint_every == 0 or last or leaves
        if saves:
            # Before the checkpoint: what resumes at the one before drops the later lines.
            bad_images.save()
            if log:
                log.metrics_log.save()
            checkpoints.save(state)
            if last or leaves:
                checkpoints.wait()
        if validates or saves:
            # No worker goes on before rank 0 has written, or ends before all have.
            ray.train.report({"step": step, **(validation if validates else {})})
            meter.restart()
        if leaves:
            raise NodeLeaving(f"a node will be taken away: saved at step {step}")
    state.swap_ema()
    if sharded:
        gather(model, whole)
    if log and validate:
        with compilation.paused():
            validation = _validate(validate, whole, device, state.step, log)
        log.metrics_log.save()
    return whole, validation


def _validate(
    validate: Validation, model: nn.Module, device: torch.device, step: int, log: RunLog
) -> dict[str, float]:
    home = next(model.parameters()).device
    model.to(device).eval()
    with torch.no_grad():
        metrics, figure = validate(model, step)
    model.to(home).train()
    log.add("validation", f"validation at step {step}", metrics, step)
    if figure:
        log.add_figure(figure, step)
    return metrics
