"""Real hosts on one machine: each has its own network, disk and processes, and a bridge joins them.

A host is a set of Linux namespaces (network, mount, PID, UTS, IPC). It shares the machine's root
folder read-only, as nodes share an image, and has its own /tmp, HOME, /dev/shm and /etc/hosts; only
the folders that are declared shared are the same on all. Killing a host's first process ends all
its processes, and with the last of them its namespaces, so nothing is left behind, also not by a
test that is killed. No address of a host can be reached from outside. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
NETWORK = "10.77.0"
HOME, SCRATCH = "/tmp/home", "/tmp/scratch"
"""Folders of a host's own disk."""
TOKEN = "0123456789abcdef0123456789abcdef"
GCS_PORT, DASHBOARD_PORT = 6379, 8265
STARTED = "Ray runtime started"
"""What `ray start` says."""
_RAY = str(Path(sys.executable).parent / "ray")
CLONE_NEWNET = 0x40000000
SETUP = """
set -e
hostname {name}
ip link set lo up
mount -t tmpfs -o size={disk_mb}m tmpfs /mnt
mkdir -p /mnt/home /mnt/scratch
for folder in {shared}; do
  mkdir -p /mnt/${{folder#/tmp}}
  mount --bind $folder /mnt/${{folder#/tmp}}
done
printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' > /mnt/hosts
echo nameserver 127.0.0.1 > /mnt/resolv.conf
mount --bind /mnt/hosts /etc/hosts
mount --bind /mnt/resolv.conf /etc/resolv.conf
mount --move /mnt /tmp
mount -t tmpfs -o size={shm_mb}m tmpfs /dev/shm
mount -n -o remount,ro,bind /
touch /tmp/ready
sleep infinity & wait
"""


def why_not() -> str:
    """Why hosts cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if absent := [tool for tool in ("ip", "nsenter", "unshare") if not shutil.which(tool)]:
        return f"{', '.join(absent)} not found (Debian: iproute2, util-linux)"
    made = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return made.stderr.strip()


class Host:
    """One host; `disk_mb` is the size of its /tmp, which takes memory as it is filled."""

    def __init__(
        self, name: str, number: int, shared: Sequence[Path], disk_mb: int, shm_mb: int
    ) -> None:
        self.name, self.address = name, f"{NETWORK}.{number}"
        folders = " ".join(shlex.quote(str(folder)) for folder in shared)
        script = SETUP.format(name=name, shared=folders, disk_mb=disk_mb, shm_mb=shm_mb)
        spaces = ["--mount", "--net", "--uts", "--ipc", "--pid", "--mount-proc"]
        self._first = _living(["unshare", *spaces, "--fork", "--kill-child", "bash", "-c", script])
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": HOME,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "RAY_worker_niceness": "0",  # else they stand behind all else on the machine
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
        }
        """Of every process of the host."""
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        _wait(lambda: children.read_text().strip() or self._first.poll() is not None)
        assert self._first.poll() is None, f"the host {name} could not be made"
        self.pid = int(children.read_text())

    def path(self, path: str) -> Path:
        """A path of the host's own disk, as this process sees it."""
        return Path(f"/proc/{self.pid}/root") / path.lstrip("/")

    def command(self, command: Sequence[str]) -> list[str]:
        """`command` in the host, in its scratch folder."""
        spaces = ["--mount", "--net", "--uts", "--ipc", "--pid"]
        return ["nsenter", "-t", str(self.pid), *spaces, f"--wdns={SCRATCH}", "--", *command]

    def start(
        self, command: Sequence[str], more: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """A process of the host, its output in one pipe; `more` is added to its environment."""
        return subprocess.Popen(
            self.command(command), env={**self.environment, **(more or {})}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(
        self, command: Sequence[str], more: Mapping[str, str] | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """A process of the host, to its end; stdout holds all of its output."""
        process = self.start(command, more)
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(command, process.returncode, printed)

    def start_ray(
        self, head: Host, *options: str, num_cpus: int = 2, for_ever: bool = False
    ) -> None:
        """`ray start`, which becomes the head where `head` is this host itself.

        On a busy machine it gives up after half a minute; it is repeated until it has started once.
        `for_ever` starts it again also after that, whenever it ends, as Kubernetes does.
        """
        log = self.path("/tmp/ray.log").open("w")
        where = [f"--address={head.address}:{GCS_PORT}"]
        if head is self:
            where = ["--head", f"--port={GCS_PORT}"]
        command = [
            "ray", "start", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}",
            f"--node-ip-address={self.address}", "--object-store-memory=200000000",
            *where, *options,
        ]  # fmt: skip
        script = f'until "$@" || grep -q "{STARTED}" /tmp/ray.log; do sleep 1; done'
        if for_ever:
            script = 'while :; do "$@"; sleep 1; done'
        command = ["bash", "-c", script, "ray", *command]
        with log:
            self._ray = subprocess.Popen(
                self.command(command), env=self.environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        if head is self:
            _wait(self.ray_starts, 300)

    def warn_ray(self) -> psutil.Process:
        """SIGTERM to `ray start`, as Kubernetes and spot instances send it; the process."""
        family = psutil.Process(self._ray.pid).children(recursive=True)
        (node,) = (one for one in family if one.cmdline()[1:3] == [_RAY, "start"])
        node.terminate()
        return node

    def ray_starts(self) -> int:
        """How often the host's Ray has started."""
        log = self.path("/tmp/ray.log")
        return log.read_text().count(STARTED) if log.exists() else 0

    def fill(self, folder: str) -> None:
        """Leave no byte free where `folder` is; its file `full` holds the rest."""
        with self.path(f"{folder}/full").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**20))
            except OSError as error:
                assert error.errno == errno.ENOSPC, error

    def answers(self, port: int) -> bool:
        """Whether something listens at the host's own address."""
        probe = f"exec 3<>/dev/tcp/{self.address}/{port}"
        asked = subprocess.run(self.command(["bash", "-c", probe]), capture_output=True)
        return asked.returncode == 0

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """This thread, and the threads that it starts meanwhile, open sockets in the host."""
        with open("/proc/thread-self/ns/net") as here, open(f"/proc/{self.pid}/ns/net") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(here.fileno())

    def lose(self, other: Host) -> None:
        """What this host sends to `other` gets lost without a word; the way back stays open."""
        nobody = ["lladdr", "02:00:00:00:00:01", "dev", "eth0", "nud", "permanent"]
        self.ip("neigh", "replace", other.address, *nobody)

    def find(self, other: Host) -> None:
        """Undo `lose`."""
        self.ip("neigh", "del", other.address, "dev", "eth0")

    def slow(self, rate: str) -> None:
        """Let the host send at most `rate`, as 2mbit; `fast` undoes it."""
        limit = ["rate", rate, "burst", "32kbit", "latency", "2s"]
        _run("nsenter", "-t", str(self.pid), "--net", "tc", "qdisc", "add", "dev", "eth0", "root",
             "tbf", *limit)  # fmt: skip

    def fast(self) -> None:
        _run("nsenter", "-t", str(self.pid), "--net", "tc", "qdisc", "del", "dev", "eth0", "root")

    def ip(self, *words: str) -> None:
        _run("nsenter", "-t", str(self.pid), "--net", "ip", *words)

    def kill(self) -> None:
        """End all processes of the host at once, as a loss of power does."""
        self._first.kill()
        self._first.wait()
        _wait(lambda: not Path(f"/proc/{self.pid}").exists())


class Hosts:
    """Hosts on one bridge; a context manager that ends them. `shared` folders are all hosts' own.

    Shared folders lie in /tmp; the rest of the machine's /tmp no host sees.
    """

    def __init__(self, shared: Sequence[Path] = ()) -> None:
        assert all(folder.is_relative_to("/tmp") for folder in shared)
        # A node's image holds the programs, wherever they are on this machine.
        image = [path for path in (ROOT, Path(sys.prefix)) if path.is_relative_to("/tmp")]
        self.shared = [*image, *shared]
        self.hosts: dict[str, Host] = {}
        self._number = 0

    def __enter__(self) -> Hosts:
        self._bridge = _living(["unshare", "--net", "sleep", "infinity"])
        outside = os.readlink("/proc/self/ns/net")
        _wait(lambda: os.readlink(f"/proc/{self._bridge.pid}/ns/net") != outside)
        self._ip("link", "add", "bridge", "type", "bridge")
        self._ip("link", "set", "bridge", "up")
        return self

    def __exit__(self, *exception: object) -> None:
        for host in self.hosts.values():
            host.kill()
        self._bridge.kill()
        self._bridge.wait()

    def add(self, name: str, disk_mb: int = 2000, shm_mb: int = 500) -> Host:
        """A new host; one of the name of a killed host has a new address and an empty disk."""
        self._number += 1
        host = self.hosts[name] = Host(name, self._number, self.shared, disk_mb, shm_mb)
        port = self._port(host)
        peer = ["peer", "name", "eth0", "netns", str(host.pid)]
        self._ip("link", "add", port, "type", "veth", *peer)
        self._ip("link", "set", port, "master", "bridge", "up")
        host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
        host.ip("link", "set", "eth0", "up")
        # Where nobody is: programs ask which interface leads out.
        host.ip("route", "add", "default", "via", f"{NETWORK}.254")
        _wait(lambda: host.path("/tmp/ready").exists())
        return host

    def cut(self, host: Host) -> None:
        """Take the host's link down; its processes live on."""
        self._ip("link", "set", self._port(host), "down")

    def mend(self, host: Host) -> None:
        self._ip("link", "set", self._port(host), "up")

    def _port(self, host: Host) -> str:
        return f"port{host.address.rpartition('.')[2]}"

    def _ip(self, *words: str) -> None:
        _run("nsenter", "-t", str(self._bridge.pid), "--net", "ip", *words)


def _living(command: list[str]) -> subprocess.Popen[bytes]:
    """A process that the kernel kills when this one ends."""
    return subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL)


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"


def _wait(condition, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
