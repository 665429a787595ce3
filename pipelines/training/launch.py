"""The workers of a training: started by Ray Train, restarted after a loss, and their surroundings.

`launch` runs in the driver of `fae train`, `enter_worker` first in each worker. Ray Train tells no
difference between an error of the training function, which ends the run, and a lost worker or
node, after which all workers resume; `raised_by_worker` does.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fae_core.errors import UserError
from fae_core.machine import num_cpus

from ..config import Recipe, with_absolute_paths
from ..config.facts import flatten
from ..config.sections import TrainingSection
from ..data.account import Account
from ..data.decoding import DECODE_CPUS
from ..runtime import ray_private
from ..runtime.packages import refuse_this_node, versions
from ..runtime.session import on_cluster, plain_error, quiet_logs, start_ray
from ..storage import paths
from .entry import run_worker
from .job import TrainingError
from .preemption import NodeLeaving
from .run_folder import run_folder
from .run_log import say
from .step import NonFiniteGradientError
from .tracking import Tracker, account_note, end_run, shared_tracking

RESIZE_SECONDS = 60.0
"""Between two looks at whether hosts have joined, where a training has `min_workers`."""


def launch(
    worker: Callable[[dict[str, Any]], None],
    recipe: Recipe,
    training: TrainingSection,
    callbacks: Sequence[Any] = (),
    account: Account | None = None,
) -> None:
    """Start Ray where it does not run, and `fit` a worker that begins with `enter_worker`.

    `worker` is a function of a module's top level. `account` is that of the images behind the
    training, for the run's page in MLflow.
    """
    start_ray()
    recipe = with_absolute_paths(recipe)
    recipe.tracking = shared_tracking(recipe.tracking)
    config = {
        "recipe": recipe.model_dump(mode="json"),
        "tracking_uri": recipe.tracking.uri,
        "account": account.to_dict() if account else None,
        "on_cluster": on_cluster(),
        "versions": versions(),
    }
    called = functools.partial(run_worker, worker.__module__, worker.__name__)
    # The first worker, which tracks the run, may have died, and a stop ends it.
    try:
        fit(called, config, training, run_folder(recipe), callbacks)
    except Exception:
        end_run(recipe.tracking, run_folder(recipe), "FAILED")
        raise
    except KeyboardInterrupt:
        end_run(recipe.tracking, run_folder(recipe), "KILLED")
        raise


@dataclass(frozen=True)
class Worker:
    """What a worker of a training knows of itself; `is_first` is rank 0, which writes results."""

    network: str
    recipe: Recipe
    training: TrainingSection
    run_uri: str
    tracking_uri: str
    device: torch.device
    is_first: bool
    account: Account | None = None
    on_cluster: bool = False
    """Whether its node may be taken away; on one machine nobody would hear of it."""

    def tracker(self) -> Tracker | None:
        """The run's tracker, opened; the first worker alone has one."""
        if not self.is_first:
            return None
        params = flatten(self.recipe.model_dump(mode="json"))
        tracking, account = self.recipe.tracking, self.account
        if account is None:
            return Tracker(tracking, self.tracking_uri, self.run_uri, params)
        params |= {f"source.{name}": count for name, count in account.numbers().items()}
        # What the run's page shows as its description.
        tags = {"mlflow.note.content": account_note(account)}
        tracker = Tracker(tracking, self.tracking_uri, self.run_uri, params, tags=tags)
        text = json.dumps(account.to_dict(), indent=1, ensure_ascii=False)
        tracker.log_file(text.encode(), "source.json")
        return tracker


def enter_worker(config: dict[str, Any], network: str) -> Worker:
    """The worker of the training of recipe section `network` that this process is.

    Quiets its log and, on a CPU, gives it its share of the node's cores: Ray's default is one.
    Raises OtherVersions where its node has other packages than the driver.
    """
    import ray.data
    import ray.train
    import ray.train.torch

    quiet_logs()
    refuse_this_node(config.get("versions", {}))
    recipe = Recipe.model_validate(config["recipe"])
    training: TrainingSection = getattr(recipe, network).training
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    if device.type == "cpu":
        share = max(1, num_cpus() // context.get_local_world_size())
        torch.set_num_threads(training.threads_per_worker or share)
    is_first = context.get_world_rank() == 0
    run_uri = run_folder(recipe)
    account = Account.from_dict(config["account"]) if config.get("account") else None
    tracking_uri, on_cluster = config["tracking_uri"], config["on_cluster"]
    return Worker(
        network, recipe, training, run_uri, tracking_uri, device, is_first, account, on_cluster
    )


def fit(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    training: TrainingSection,
    run_uri: str,
    callbacks: Sequence[Any] = (),
) -> None:
    """Run `worker(config)` on the workers that `training` asks for under Ray Train.

    Where a worker is lost, all resume from the newest checkpoint, up to `training.max_failures`
    times; with `min_workers`, on as many as there is room for. Resuming because there is room for
    more, or because a node will be taken away, is not counted. `callbacks` are Ray Train's, which
    hear of every validation and checkpoint. Raises what `worker` itself raises, at once. An
    interrupt of the main thread ends the workers.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from .collectives import NodeTorchConfig

    wanted, cpus = cluster_resources(training)["CPU"], ray.cluster_resources().get("CPU", 0.0)
    if not on_cluster() and wanted > cpus:
        raise TrainingError(
            f"{training.num_workers} workers with {training.cpus_per_worker} CPUs each leave none "
            f"of this machine's {cpus:g} for decoding. Lower cpus_per_worker or num_workers."
        )
    storage, _, name = run_uri.rpartition("/")
    filesystem, path = paths.filesystem(storage)
    # Ray Train knows more of them than its annotations do.
    elastic: dict[str, Any] = {"num_workers": training.num_workers}
    if training.min_workers:
        elastic["num_workers"] = (training.fewest_workers, training.num_workers)
        elastic["elastic_resize_monitor_interval_s"] = RESIZE_SECONDS
    failures = 0
    while True:
        trainer = TorchTrainer(
            worker,
            train_loop_config=config,
            torch_config=NodeTorchConfig(),
            scaling_config=ScalingConfig(
                use_gpu=training.use_gpu,
                resources_per_worker={"CPU": training.cpus_per_worker}
                | ({"GPU": 1} if training.use_gpu else {}),
                **elastic,
            ),
            # Ray's own restarts would repeat what `worker` raises too, a NaN for example.
            run_config=RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=0),
                callbacks=list(callbacks),
            ),
        )
        controllers = ray_private.keep_interrupts(trainer)
        try:
            trainer.fit()
            return
        except KeyboardInterrupt:
            for controller in controllers:
                ray.kill(controller)
            raise
        except TrainingFailedError as error:
            own = raised_by_worker(error)
            if isinstance(own, NodeLeaving):
                say(f"{own}; the workers resume on the others")
                continue
            if isinstance(own, UserError):
                raise own from None
            if own is not None:
                raise own from error
            if failures == training.max_failures:
                raise
            failures += 1
            reason = str(error).strip().splitlines()[-1]
            say(
                f"workers were lost ({reason}); all resume from the newest checkpoint "
                f"({failures} of {training.max_failures} times)"
            )


def cluster_resources(training: TrainingSection) -> dict[str, float]:
    """CPUs and GPUs that the training takes, by Ray's names, with those of one decoding task."""
    needed = {"CPU": training.num_workers * training.cpus_per_worker + DECODE_CPUS}
    if training.use_gpu:
        needed["GPU"] = float(training.num_workers)
    return needed


def raised_by_worker(error: Exception) -> Exception | None:
    """What the training function itself raised; None where workers or their nodes were lost.

    `error` is Ray Train's, which holds the errors of all workers. One worker's end makes the others
    fail in their collectives. An error of those alone is therefore a loss that was not noticed yet,
    and beside another error it is only that one's echo.
    """
    from ray.exceptions import RayError, RayTaskError, UserCodeException

    train_error = ray_private.train_error()

    failures = list(getattr(error, "worker_failures", {}).values())
    told = [failure for failure in map(plain_error, failures) if isinstance(failure, UserError)]
    if told:  # the workers share a gradient, so a NaN ends those too whose losses are finite
        return min(told, key=lambda failure: isinstance(failure, NonFiniteGradientError))
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
