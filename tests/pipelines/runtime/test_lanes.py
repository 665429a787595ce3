"""What is asked of every node, on real raylets of which one ends meanwhile."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from fae.pipelines.runtime import lanes
from tests.tiny import ROOT, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.faults]


def begin_and_wait(folder: str, end: str) -> str:
    """Leave a file in `folder`, and return once `end` is there."""
    import ray

    (Path(folder) / ray.get_runtime_context().get_node_id()).touch()
    while not Path(end).exists():
        time.sleep(0.1)
    return ray.get_runtime_context().get_node_id()


def test_a_node_that_ends_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    began, end = tmp_path / "began", tmp_path / "end"
    began.mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        ray.init(address=cluster.address)

        def lose_one() -> None:
            wait_for(lambda: len(list(began.iterdir())) == 3, 60)
            cluster.remove_node(nodes[0], allow_graceful=False)
            wait_for(lambda: sum(node["Alive"] for node in ray.nodes()) == 2, 60)
            end.touch()

        thread = threading.Thread(target=lose_one)
        thread.start()
        answers = list(lanes.ask_every_node(begin_and_wait, str(began), str(end)))
        thread.join()
        assert [answer.error for answer in answers] == [None, None]
        assert nodes[0].node_id not in {answer.value for answer in answers}
    finally:
        ray.shutdown()
        cluster.shutdown()
