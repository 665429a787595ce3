"""A cluster without a GPU, whose autoscaler brings nodes when a job asks for them.

Ray's own fake provider starts the nodes, as raylets on one host of tests/hosts.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.cluster.gpu_pool import NUM_ACTORS, NUM_ROWS
from tests.hosts import GCS_PORT, SCRATCH, Host, Hosts, why_not

pytestmark = [
    pytest.mark.integration,
    pytest.mark.faults,
    pytest.mark.skipif(bool(why_not()), reason=f"no hosts of their own: {why_not()}"),
]
GPU_NODES = {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "min_workers": 0}
CONFIG = {
    "cluster_name": "fake",
    "max_workers": 2,
    "idle_timeout_minutes": 5,
    "upscaling_speed": 1,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,  # the nodes share an address
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "gpu": {**GPU_NODES, "max_workers": 2},
    },
    "head_node_type": "ray.head.default",
    **{name: {} for name in ("auth", "docker", "file_mounts", "head_node", "worker_nodes")},
    **{f"{name}_commands": [] for name in ("initialization", "setup")},
    **{f"{node}_setup_commands": [] for node in ("head", "worker")},
    **{f"{node}_start_ray_commands": [] for node in ("head", "worker")},
    **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
}


@pytest.fixture
def head() -> Iterator[Host]:
    with Hosts() as hosts:
        head = hosts.add("head")
        head.path(f"{SCRATCH}/scaling.json").write_text(json.dumps(CONFIG))
        head.environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        head.start_ray(head, f"--autoscaling-config={SCRATCH}/scaling.json", num_cpus=0)
        yield head


def test_a_pool_on_gpus_grows_from_no_node_to_all_of_its_actors(head: Host) -> None:
    started = time.monotonic()
    address = {"RAY_ADDRESS": f"{head.address}:{GCS_PORT}"}
    job = head.run(["python", "-m", "tests.cluster.gpu_pool"], address, timeout=400)
    assert job.returncode == 0, job.stdout
    print(f"{time.monotonic() - started:.0f} s")
    found = json.loads(job.stdout.splitlines()[-1])
    assert found == {"doubled": [2 * i for i in range(NUM_ROWS)], "nodes": NUM_ACTORS, "gpus": [1]}
