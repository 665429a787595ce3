"""The Ray Train harness that every trainer shares: one short loop, one optimizer step, checkpoints.

A trainer supplies a `Job` (model, feed, loss, validation, for a GAN an adversary); `run_job` trains it inside a Ray Train
worker, `fit` starts the workers. Randomness and data order come from the step (batches.py), and a checkpoint is one file
written whole, so the same command after a SIGKILL continues to the same parameters, bit for bit on a CPU.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn

from ..config import Recipe
from ..config.facts import flatten
from ..config.sections import TrainingSection
from .checkpoints import resume, save_checkpoint
from .distributed import gathered, is_sharded, shard
from .job import Job, Validation
from .memory_plan import memory_plan_of
from .meters import BadImages, Meter
from .metrics_log import MetricsLog
from .state import TrainState
from .step import learning_rate, train_step
from .tracking import Tracker


def run_job(
    job: Job,
    training: TrainingSection,
    recipe: Recipe,
    run_uri: str,
    tracking_uri: str,
) -> tuple[nn.Module, dict[str, float]]:
    """Train `job` to the last step inside a Ray Train worker; the trained model and the last validation's metrics (rank 0).

    The model has the final weights (averaged ones where `training` has an EMA).
    """
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    tracker = _tracker(recipe, run_uri, tracking_uri) if rank == 0 else None
    sharded = training.parallel == "fsdp" and world_size > 1
    # What rank 0 validates and keeps: the model itself, or where that is split over the workers, a whole copy on its CPU.
    plain = copy.deepcopy(job.model) if sharded and rank == 0 else job.model
    model = job.model.to(device)
    if sharded:
        shard(model)
    if job.adversary:
        job.adversary.module.to(device)
    state = TrainState(model, training, job.adversary)
    if said := resume(state, run_uri):
        _say(rank, said)
    last_step = training.steps
    wrapped = model if sharded else ray.train.torch.prepare_model(model)
    wrapped_adversary = (
        ray.train.torch.prepare_model(job.adversary.module) if job.adversary else None
    )
    adversary_loss = job.adversary.loss if job.adversary else None
    history = MetricsLog(run_uri, state.step) if rank == 0 else None
    bad_images = BadImages(run_uri, rank)
    meter = Meter(training, world_size, device)
    validation: dict[str, float] = {}
    feed = job.feed(state.step, rank, world_size, device)
    if rank == 0 and not sharded and state.step < last_step:
        first = next(feed)
        _say(rank, memory_plan_of(job, training, first).text(device))
        feed = itertools.chain([first], feed)
    if training.compile:  # after the plan, whose small batches are not worth compiling for
        for module in (wrapped, *job.frozen.values()):
            module.compile()
    meter.restart()
    while state.step < last_step:
        with meter.waiting():
            batches = [next(feed) for _ in range(training.accumulation)]
        for batch in batches:
            bad_images.add(batch.errors)
        meter.add(
            train_step(
                state, wrapped, job.loss, batches, training, wrapped_adversary, adversary_loss
            )
        )
        step, last = state.step, state.step == last_step
        if step % training.log_every == 0 or last:
            metrics = meter.flush() | {"bad_images": float(len(bad_images))}
            metrics["learning_rate"] = learning_rate(step - 1, training)
            _say(rank, _line(f"step {step}/{training.steps}", metrics))
            if tracker and history:
                named = {f"train/{name}": value for name, value in metrics.items()}
                tracker.log_metrics(named, step)
                history.add(named, step)
        validates = step % training.validate_every == 0 and not last
        if validates:
            with state.averaged():
                _gather(model, plain)
                if tracker and history and job.validate:
                    validation = _validate(job.validate, plain, device, step, tracker, history)
        saves = step % training.checkpoint_every == 0 or last
        if saves:
            bad_images.save()
            save_checkpoint(state, run_uri, training.keep_checkpoints, write=rank == 0)
            if history:
                history.save()
        if validates or saves:
            ray.train.report({"step": step, **(validation if validates else {})})
            meter.restart()
    state.swap_ema()
    _gather(model, plain)
    if tracker and history:
        if job.validate:
            validation = _validate(job.validate, plain, device, state.step, tracker, history)
            history.save()
        tracker.finish()
    return plain, validation


def _tracker(recipe: Recipe, run_uri: str, tracking_uri: str) -> Tracker:
    return Tracker(recipe.tracking, tracking_uri, run_uri, flatten(recipe.model_dump(mode="json")))


def _gather(model: nn.Module, plain: nn.Module) -> None:
    """Bring the weights of a sharded model into rank 0's whole copy; all workers call it. Nothing where they are one."""
    if is_sharded(model):
        weights = gathered(model.state_dict())
        if plain is not model:
            plain.load_state_dict(weights)


def _validate(
    validate: Validation,
    model: nn.Module,
    device: torch.device,
    step: int,
    tracker: Tracker,
    history: MetricsLog,
) -> dict[str, float]:
    home = next(model.parameters()).device
    model.to(device).eval()
    with torch.no_grad():
        metrics, figure = validate(model, step)
    model.to(home).train()
    if metrics:
        _say(0, _line(f"validation at step {step}", metrics))
    named = {f"validation/{name}": value for name, value in metrics.items()}
    tracker.log_metrics(named, step)
    history.add(named, step)
    if figure:
        history.save_figure(figure)
        tracker.log_figure(figure, f"step_{step:09d}.png")
    return metrics


def _say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


def _line(title: str, metrics: dict[str, float]) -> str:
    return title + "  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
