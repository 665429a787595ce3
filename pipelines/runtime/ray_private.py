"""Every private name of Ray that this project uses, each with what would replace it.

A new release of Ray may change any of them, which is why pyproject.toml bounds Ray's version above.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

AUTHENTICATION_LOGGER = "ray._private.authentication"
"""It announces token authentication at every start. Replaced by: a log level of Ray's own."""
PROGRESS_LOGGER = "ray.data._internal.progress"
"""It announces that progress bars are off. Replaced by: silence where a setting turned them off."""
ACTOR_MODULES = (
    "ray.data._internal.execution.operators.actor_pool_map_operator",
    "ray._private.workers.setup_worker",
)
"""What every actor of Ray Data imports; benchmarks/forked_workers.py imports them once and forks.

Replaced by: a fork server of Ray's own.
"""


def most_after_scaling() -> dict[str, float]:
    """What an autoscaler may bring up at most, by resource; empty where there is none.

    Ray 2.60 has a call for the limits and never tells it any. There is an autoscaler all the same
    on KubeRay and after `ray up`, which start its second version, and where no node has a CPU: the
    limits are then infinite. Replaced by: a public state API for the cluster's configuration. Ray
    Train asks the same way.
    """
    import ray._private.state
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    found: dict[str, Any] | None = ray._private.state.state.get_max_resources_from_cluster_config()
    if found:
        return {name: float(value) for name, value in found.items()}
    if is_autoscaler_v2(fetch_from_server=True) or not ray.cluster_resources().get("CPU"):
        return {"CPU": math.inf, "GPU": math.inf}
    return {}


def has_started_ray() -> bool:
    """Whether `ray.init` of this process started the Ray that it is connected to, as its head.

    Replaced by: `ray.init` or the runtime context telling it.
    """
    import ray._private.worker

    node: Any = ray._private.worker._global_node
    return node is not None and bool(node.is_head())


def train_error(name: str = "RayTrainError") -> type[Exception]:
    """The class `name` of the errors by which Ray Train reports lost workers.

    Replaced by: public classes beside `ray.train.TrainingFailedError`, which holds such errors.
    """
    kind: type[Exception] = getattr(
        importlib.import_module("ray.train.v2._internal.exceptions"), name
    )
    return kind


def keep_interrupts(trainer: Any) -> list[Any]:
    """Keep this process's handler of SIGINT while `trainer`, one of Ray Train's, fits and after.

    Returns a list that will hold the handle of the controller. Ray Train's own handler would end
    the process with status 0, and stays when the training has ended. In other threads than the
    main one it sets none, and the list stays empty. Replaced by: a setting of `RunConfig`.
    """
    controllers: list[Any] = []
    trainer._register_sigint_handler = controllers.append
    return controllers


def with_advice_on_retries(error: Exception) -> None:
    """Add to `error` what Ray Data adds to those of tasks: its settings of retries.

    Only tests need it. Replaced by: nothing; the error of a task would be enough.
    """
    from ray.data._internal.util import _annotate_exception_with_retry_context

    _annotate_exception_with_retry_context(
        error,
        description="apply UDF transform",
        attempts=1,
        max_attempts=1,
        total_backoff_s=0.0,
        exception_str="",
    )


def fill_in_machine_images(config: dict[str, Any]) -> None:
    """Set the `ImageId` of the nodes in a `ray up` file that name none, as Ray does on AWS.

    Only tests need it. Replaced by: `ray up --dry-run`.
    """
    from ray.autoscaler._private.aws.config import _check_ami

    _check_ami(config)


def worker_setup() -> tuple[Any, Any]:
    """(the parser of a worker's command line, the class of its runtime environment).

    Replaced by: a fork server of Ray's own; only benchmarks/forked_workers.py needs them.
    """
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.workers.setup_worker import parser

    return parser, RuntimeEnvContext
