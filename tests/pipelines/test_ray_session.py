"""pipelines/ray_session.py: what a killed cluster leaves behind does not reach the next one."""

import socket

import pytest

from pipelines.ray_session import forget_dead_cluster


@pytest.fixture
def note(tmp_path, monkeypatch):
    """Ray's note of this machine's cluster, in a folder of the test's own."""
    from ray._private import utils

    path = tmp_path / "ray_current_cluster"
    monkeypatch.setattr(utils, "get_ray_address_file", lambda temp_dir: str(path))
    return path


def test_the_note_of_a_dead_cluster_is_removed(note):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    note.write_text(f"127.0.0.1:{port}")
    forget_dead_cluster()
    assert not note.exists()
    forget_dead_cluster()  # nothing to forget


def test_the_note_of_a_living_cluster_stays(note):
    with socket.create_server(("127.0.0.1", 0)) as server:
        note.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        forget_dead_cluster()
    assert note.exists()
