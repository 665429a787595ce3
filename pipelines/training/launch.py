"""Ray Train's workers started for a training function, restarted after lost nodes, and their errors told apart."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fae_core.errors import UserError

from ..config import Recipe
from ..config.sections import TrainingSection
from ..data.decoding import DECODE_CPUS
from ..runtime import ray_private
from ..runtime.session import plain_error, quiet_logs
from ..storage import paths
from .job import TrainingError
from .loop import _say


def fit(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    recipe: Recipe,
    training: TrainingSection,
    callbacks: Sequence[Any] = (),
) -> None:
    """Run `worker(config)` on the workers that `training` asks for under Ray Train.

    Where one is lost, all begin again at the newest checkpoint, up to `training.max_failures` times. `callbacks` are Ray
    Train's, which hear of every validation and checkpoint. Raises what `worker` itself raises, at once.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    wanted = training.num_workers * training.cpus_per_worker + DECODE_CPUS
    cpus = ray.cluster_resources().get("CPU", 0.0)
    if not os.environ.get("RAY_ADDRESS") and wanted > cpus:
        raise TrainingError(
            f"{training.num_workers} workers with {training.cpus_per_worker} CPUs each leave none of this machine's "
            f"{cpus:g} for decoding. Lower cpus_per_worker or num_workers."
        )
    filesystem, path = paths.filesystem(recipe.storage)
    for failures in range(training.max_failures + 1):
        trainer = TorchTrainer(
            worker,
            train_loop_config=config,
            scaling_config=ScalingConfig(
                num_workers=training.num_workers,
                use_gpu=training.use_gpu,
                resources_per_worker={"CPU": training.cpus_per_worker}
                | ({"GPU": 1} if training.use_gpu else {}),
            ),
            # Ray's own restarts would repeat what `worker` raises too, a NaN for example.
            run_config=RunConfig(
                name=recipe.run,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=0),
                callbacks=list(callbacks),
            ),
        )
        try:
            trainer.fit()
            return
        except TrainingFailedError as error:
            own = raised_by_worker(error)
            if isinstance(own, UserError):
                raise own from None
            if own is not None:
                raise own from error
            if failures == training.max_failures:
                raise
            reason = str(error).strip().splitlines()[-1]
            _say(
                0,
                f"workers were lost ({reason}); all go on from the newest checkpoint "
                f"({failures + 1} of {training.max_failures} times)",
            )


def raised_by_worker(error: Exception) -> Exception | None:
    """What the training function itself raised, out of Ray Train's `error`; None where workers or their nodes were lost.

    Ray Train makes no difference between them. One worker's end makes the others fail in their collectives, so an error
    of those alone is a loss that was not noticed yet, and beside another error it is that one's echo.
    """
    from ray.exceptions import RayError, RayTaskError, UserCodeException

    train_error = ray_private.train_error()

    failures = list(getattr(error, "worker_failures", {}).values())
    for failure in map(plain_error, failures):
        if isinstance(failure, UserError):
            return failure
    for failure in failures:
        cause = failure
        while isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception):
            cause = cause.cause
        wrapped = isinstance(cause, RayTaskError | UserCodeException)
        if isinstance(cause, RayError | train_error) and not wrapped:
            return None
    return next((failure for failure in failures if not _is_echo(failure)), None)


def _is_echo(failure: Exception) -> bool:
    if isinstance(failure, torch.distributed.DistError):
        return True
    return isinstance(failure, RuntimeError) and any(
        word in str(failure) for word in ("gloo", "NCCL")
    )


def prepare_worker(device: torch.device, training: TrainingSection) -> None:
    """On a CPU, give this worker its share of the machine's cores (Ray's default is one thread); quiet its log."""
    import ray.data
    import ray.train

    quiet_logs()
    if device.type == "cpu":
        local_workers = ray.train.get_context().get_local_world_size()
        share = max(1, (os.cpu_count() or 1) // local_workers)
        torch.set_num_threads(training.threads_per_worker or share)


@dataclass(frozen=True)
class TrainResult:
    """`checkpoint` is the address of autoencoder.safetensors; `metrics` are the last validation's."""

    checkpoint: str
    metrics: dict[str, float]
