"""pipelines/ray_session.py: a local cluster knows its own address, whatever else runs or ran on the
machine."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SCRIPT = """
import os
import ray
from fae.pipelines.runtime.session import _refuse_silence, start_ray

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

actor = Actor.remote()
ray.get(actor.ping.remote())
print("state", ray.get(state_of.remote(actor._actor_id.hex())))
"""


@pytest.mark.integration
def test_workers_find_their_own_cluster_beside_the_note_of_a_dead_one():
    """Ray notes a machine's cluster in a file of its temporary folder, and a killed head leaves it
    there."""
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
