"""Over which network interface the workers of a training on CPUs talk to each other.

gloo takes the one that the host's name resolves to, which is loopback where /etc/hosts says
127.0.1.1, as Debian writes it: workers on two hosts then never meet. Ray knows the address at which
the other nodes reach this one. launch.py hands `NodeTorchConfig` to Ray Train.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from typing import Any

import ray
from ray.train.torch import TorchConfig

SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""
VARIABLE = "GLOO_SOCKET_IFNAME"


class NodeTorchConfig(TorchConfig):
    """Ray Train's setup of torch.distributed, over the interface of each node's address."""

    @property
    def backend_cls(self) -> type:
        return _NodeTorchBackend


class _NodeTorchBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


def use_node_interface() -> None:
    """Let gloo in this process use the interface of its node's address; the user's choice stays."""
    name = interface_of(ray.util.get_node_ip_address())
    if name:
        os.environ.setdefault(VARIABLE, name)


def interface_of(address: str) -> str | None:
    """The network interface with this IPv4 address; None where none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(asking, SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
