"""A local cluster knows its own address, whatever else runs or ran on the machine, and its driver
ends in words."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

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
