"""The one place that connects to Ray: a cluster named by RAY_ADDRESS, or a quiet local one.

Every command calls `start_ray` first. A local cluster is this process's own and ends with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import signal
import socket
import sys
import threading
from typing import Any

from fae_core.errors import UserError

from .ray_private import AUTHENTICATION_LOGGER, PROGRESS_LOGGER, has_started_ray

VARIABLES = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every print of a worker appears twice
    # Threads that wait by spinning take the cores from the other processes of a node.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment variables of a job's processes, where the user has not set them."""
CONNECT_SECONDS = 10.0
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""RFC 9113: the client's preface and an empty SETTINGS frame (type 4), which a server answers."""
RETRY_ADVICE = "\nFailed to apply UDF transform after "
"""How the text begins that Ray Data appends to a task's error, about retries of its own."""
GCS_PORT = "RAY_GCS_SERVER_PORT"
STATE_API = "RAY_API_SERVER_ADDRESS"
"""Where tasks find the dashboard's state API: by the address of the head, HOST:PORT."""
ON_CLUSTER = "FAE_ON_CLUSTER"
"""Tells tasks, actors and a sweep's trials what `on_cluster` is in their driver: 1 or 0."""


def start_ray(**local: Any) -> None:
    """Attach to RAY_ADDRESS, else start a local cluster; nothing if connected already.

    `local` goes to ray.init. The process keeps its handler of SIGTERM, if it has one.

    Raises UserError where no server of Ray's kind answers at RAY_ADDRESS.
    """
    for key, value in VARIABLES.items():
        os.environ.setdefault(key, value)
    import ray
    import ray.data  # it sets its own log levels when imported; ours come after

    if ray.is_initialized():
        prepare_data()  # a trial's process is connected by Ray Tune
        return
    quiet_logs()
    for_tasks = {key: os.environ[key] for key in VARIABLES}
    for_tasks[ON_CLUSTER] = str(int(on_cluster()))
    if address := os.environ.get("RAY_ADDRESS"):
        _refuse_silence(address)
        local = {}
        if os.environ.get(STATE_API) == address:  # the demo names the Ray that it has started
            for_tasks[STATE_API] = address
    else:
        # Without an address Ray would join any cluster that runs on this machine. Ray Train asks
        # the dashboard's state API about its controller, and complains every second without it.
        local = {"address": "local", "include_dashboard": True, **local}
        # Ray Train's own actors look for that API on this machine. They give up where they find a
        # second cluster, or what a killed one left behind, unless they are told where theirs is.
        port = os.environ[GCS_PORT] = str(free_port())
        for_tasks[STATE_API] = f"127.0.0.1:{port}"
    stop = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            ignore_reinit_error=True,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": for_tasks},
            **local,
        )
    finally:
        os.environ.pop(GCS_PORT, None)
        # Ray's own handler ends the process without a word, and its core's aborts it.
        if callable(stop) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)
    prepare_data()


def on_cluster() -> bool:
    """Whether nodes may join and leave the Ray that this process uses or will start.

    So it is unless the driver has started Ray on its own machine, or will: without RAY_ADDRESS, and
    without a connection that its caller made.
    """
    if os.environ.get("RAY_ADDRESS"):
        return True
    if told := os.environ.get(ON_CLUSTER):
        return told == "1"
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized() and not has_started_ray())


def prepare_data() -> None:
    """Settings of Ray Data in a process that runs data sets: errors keep their class."""
    import ray.data

    context = ray.data.DataContext.get_current()
    # Else a task's error is wrapped in one that loses its cause, and `plain_error` finds none.
    context.raise_original_map_exception = True
    # It warns every half minute of each process that has imported torch.
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1


def free_port() -> int:
    """A free port below the range that the kernel hands out, so that nobody takes it before Ray."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("", port))
            return port
    raise OSError("A hundred ports between 20000 and 32000 were all taken.")


def plain_error(error: Exception) -> Exception:
    """The UserError that a task on some worker raised, out of Ray's wrapping; else `error`."""
    from ray.exceptions import RayError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError) and not isinstance(cause, RayError):
            return type(cause)(str(cause).partition(RETRY_ADVICE)[0])
        cause = getattr(cause, "cause", None) or cause.__cause__
    return error


def _refuse_silence(address: str) -> None:
    """Raises UserError where no gRPC server answers at HOST:PORT or ray://HOST:PORT.

    Ray itself would wait for minutes.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and whatever else Ray alone understands
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as server:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                server.sendall(HTTP2_GREETING)
                if server.recv(4)[3:] != b"\x04":
                    raise OSError("another kind of server answers there")
    except (OSError, OverflowError) as error:
        raise UserError(
            f"No Ray at {address}: tried port {port} of {host} for at most {CONNECT_SECONDS:g} s "
            f"({error}). Check the address (--address or RAY_ADDRESS) and that the head runs. The "
            "head's port is 6379, or what `ray start --port` set; ray:// addresses use 10001. From "
            "outside a cluster use fae submit, which connects to port 8265."
        ) from None


def quiet_logs() -> None:
    """Leave warnings and errors of Ray's libraries; drop their announcements."""
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Token authentication stays on and progress is our own; neither is worth a warning to the user.
    for name in (AUTHENTICATION_LOGGER, PROGRESS_LOGGER):
        logging.getLogger(name).setLevel(logging.ERROR)
