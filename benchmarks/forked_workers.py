"""Ray workers forked from one process that has imported everything: hundreds fit on one machine.

A worker of Ray's own starts a Python process, imports for two seconds and has 108 MiB of its own; a
fork shares both. Only the start of a worker differs: it runs Ray's `default_worker.py`, and Ray
communicates with it as with any other worker.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from fae.pipelines.runtime import ray_private

IMPORTED = (
    *ray_private.ACTOR_MODULES,
    "benchmarks.sleeping",
    "fae.pipelines.latents.tasks",
)
# Ray starts this script in place of Python. It sends a worker's command line to the fork server and
# runs every other command in the real Python. The first worker starts the server in its own
# environment, because Ray's core reads the job and the raylet from it when it is imported.
_STAND_IN = """#!{python} -IS
import json, os, socket, subprocess, sys, time
arguments = sys.argv[1:]
if not any(argument.endswith("default_worker.py") for argument in arguments):
    os.execv({python!r}, [{python!r}, *arguments])
try:
    os.mkdir({address!r} + ".starting")
    command = [{python!r}, "-m", "benchmarks.forked_workers", {address!r}]
    subprocess.Popen(command, start_new_session=True)
except FileExistsError:
    pass
while not os.path.exists({address!r}):
    time.sleep(0.05)
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [b"x"], [1, 2])
    server.sendall(json.dumps([arguments, dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    server.recv(1)
"""


@contextlib.contextmanager
def forked_workers() -> Iterator[Path]:
    """A context in which a local Ray has forked workers; Ray must be shut down before it ends.

    Yields the path of a file that holds the process id of the workers' parent, once there is one.
    """
    python = sys.executable
    with tempfile.TemporaryDirectory() as folder:
        address = str(Path(folder) / "socket")
        stand_in = Path(folder) / "python"
        stand_in.write_text(_STAND_IN.format(python=python, address=address))
        stand_in.chmod(0o755)
        sys.executable = str(stand_in)
        try:
            yield Path(f"{address}.pid")
        finally:
            sys.executable = python


def serve(address: str) -> None:
    """Fork a worker for every command line that is sent to the socket `address`."""
    for module in IMPORTED:
        importlib.import_module(module)
    # A garbage collection in a fork would write to every object's header and so copy every page.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    Path(f"{address}.pid").write_text(str(os.getpid()))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen(64)
    os.rename(address + ".new", address)
    listener.settimeout(1.0)
    raylet = Path("/proc") / os.environ["RAY_RAYLET_PID"]
    while raylet.exists():
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        connection.settimeout(None)
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 2)
        with connection.makefile("rb") as received:
            arguments, environment = json.load(received)
        if os.fork() == 0:
            listener.close()
            connection.close()
            try:
                _become_worker(arguments, environment, descriptors)
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(1)
        for descriptor in descriptors:
            os.close(descriptor)
        connection.close()


def _become_worker(
    arguments: list[str], environment: dict[str, str], descriptors: list[int]
) -> None:
    parser, context_class = ray_private.worker_setup()
    # Ray kills a worker together with its process group, so each worker needs its own.
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, descriptor in zip((1, 2), descriptors, strict=True):
        os.dup2(descriptor, target)
        os.close(descriptor)
    # Where a runtime environment is set, Ray puts its setup_worker.py before default_worker.py. Its
    # work is done here.
    options, command = parser.parse_known_args(arguments)
    while not command[0].endswith("default_worker.py"):
        del command[0]
    context = context_class.deserialize(options.serialized_runtime_env_context or "{}")
    os.environ.clear()
    os.environ.update({**environment, **context.env_vars})
    sys.argv = command
    # runpy would clear the script's globals at its end, while threads of Ray's core still use them.
    names = {"__name__": "__main__", "__file__": command[0]}
    exec(compile(Path(command[0]).read_text(), command[0], "exec"), names)
    os._exit(0)


if __name__ == "__main__":
    serve(sys.argv[1])
