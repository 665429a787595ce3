"""A local cluster knows its own address, whatever else runs or ran on the machine, and its driver
ends in words."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fae.pipelines.runtime import ray_private
from fae.pipelines.runtime.session import on_cluster, plain_error, start_ray
from fae.pipelines.storage.paths import StorageError


def test_an_error_of_a_task_is_its_own_words_without_rays_about_retries():
    error = StorageError("Cannot read a.")
    ray_private.with_advice_on_retries(error)
    assert "retries" in str(error)
    failed = RuntimeError("a task failed")
    failed.__cause__ = error
    plain = plain_error(failed)
    assert isinstance(plain, StorageError) and str(plain) == "Cannot read a."


SCRIPT = """
import os
import signal
import sys
import time
import ray
import typer
from fae.pipelines.runtime.progress import Progress
from fae.pipelines.runtime.session import _refuse_silence, start_ray
from fae.stopping import stoppable

def job():
    start_ray(num_cpus=1)
    _refuse_silence(ray.get_runtime_context().gcs_address)  # which it is not guilty of

    @ray.remote
    def state_of(actor_id):
        # What Ray Train's actors do: no address given.
        from ray.util.state import get_actor
        return get_actor(actor_id, timeout=30).state

    @ray.remote(num_cpus=0)
    class Actor:
        def ping(self):
            return True

        def never(self):
            time.sleep(1000)

    actor = Actor.remote()
    ray.get(actor.ping.remote())
    print("state", ray.get(state_of.remote(actor._actor_id.hex())))

    progress = Progress(num_shards=4, num_images=32, enabled=False, num_written=2)
    progress.add(rows=8, errors=0, encoded_at=0.0)
    os.kill(os.getpid(), signal.SIGTERM)
    ray.get(actor.never.remote())

try:
    with stoppable():
        job()
except typer.Exit as end:
    sys.exit(end.exit_code)
"""


@pytest.mark.parametrize("address", ["", "auto"])
def test_tasks_and_trials_know_whether_their_driver_is_on_a_cluster(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, str] = {}
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.init", lambda **all: given.update(all["runtime_env"]["env_vars"]))
    start_ray()
    assert on_cluster() == bool(address)
    # In a task: connected, by Ray itself, and without the driver's environment.
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.delenv("RAY_ADDRESS")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert on_cluster() == bool(address)


def test_a_process_that_joined_a_running_ray_itself_is_on_a_cluster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not on_cluster()
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    assert on_cluster()


@pytest.mark.integration
def test_workers_find_their_own_cluster_beside_a_dead_ones_note_and_sigterm_ends_it_with_a_line():
    """Ray notes a machine's cluster in a file of its temporary folder, and a killed head leaves it
    there. Ray also sets a handler of SIGTERM of its own."""
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # pytest's own is too long a path for Ray's sockets
        note = Path(folder, "ray", "ray_current_cluster")
        note.parent.mkdir()
        note.write_text("127.0.0.1:9")
        environment = {**os.environ, "RAY_TMPDIR": folder}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert "state ALIVE" in done.stdout, done.stdout + done.stderr
    line = "fae: stopped by SIGTERM. At least 3 of 6 shards are written. Run the same command again"
    assert line in done.stderr and done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr and "***" not in done.stderr
