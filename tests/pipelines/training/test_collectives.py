"""Which network interface gloo is told to use."""

import os

import pytest
import ray

from fae.pipelines.training.collectives import VARIABLE, interface_of, use_node_interface


def test_the_interface_of_an_address_is_found():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None


def test_gloo_uses_the_interface_of_the_node_unless_the_user_chose_one(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv(VARIABLE, "ib0")
    use_node_interface()
    assert os.environ[VARIABLE] == "ib0"
    monkeypatch.delenv(VARIABLE)
    use_node_interface()
    assert os.environ[VARIABLE] == "lo"
