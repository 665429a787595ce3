"""The cores and the memory of a process whose container, pod or job has less than its host."""

from __future__ import annotations

import os

import pytest

from fae_core import machine

GIB = 1 << 30
V1, V2 = "3:cpu,cpuacct:{0}\n2:memory:{0}\n1:name=systemd:/\n0::/\n", "0::{0}\n"


@pytest.fixture
def host(tmp_path, monkeypatch):
    """The folder of the control groups of a host of 64 cores and 256 GiB."""
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 64 << 20}.get)
    return tmp_path


@pytest.mark.parametrize(
    ("own", "files", "cpus", "memory"),
    [
        (V2.format("/"), {}, 64, 256 * GIB),
        (V2.format("/"), {"cpu.max": "max 100000", "memory.max": "max"}, 64, 256 * GIB),
        (V2.format("/"), {"cpu.max": "250000 100000", "memory.max": f"{4 * GIB}"}, 2, 4 * GIB),
        (V2.format("/"), {"cpu.max": "50000 100000"}, 1, 256 * GIB),
        # A job of Slurm: the limit is in a group above the process's own.
        (
            V2.format("/slurm/job_7/step_0"),
            {"slurm/job_7/memory.max": f"{8 * GIB}", "slurm/job_7/step_0/cpu.max": "max 100000"},
            64,
            8 * GIB,
        ),
        # Docker with version 1: the path is the host's, the group is the root of what is seen.
        (
            V1.format("/docker/a1b2"),
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": f"{2 * GIB}",
            },
            3,
            2 * GIB,
        ),
        # Some kernels name the controllers in another order than the folder, which has links.
        (
            V1.format("/"),
            {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"},
            3,
            256 * GIB,
        ),
        (
            V1.format("/"),
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            64,
            256 * GIB,
        ),
    ],
    ids=[
        "no limit",
        "v2 max",
        "v2",
        "half a core",
        "v2 nested",
        "v1 docker",
        "v1 links",
        "v1 no limit",
    ],
)
def test_a_limit_of_the_control_group_counts_and_not_the_host(host, own, files, cpus, memory):
    (host / "own").write_text(own)
    for name, text in files.items():
        (host / name).parent.mkdir(parents=True, exist_ok=True)
        (host / name).write_text(f"{text}\n")
    assert (machine.num_cpus(), machine.memory_bytes()) == (cpus, memory)


def test_a_process_that_is_bound_to_some_cores_has_these(host, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert (machine.num_cpus(), machine.memory_bytes()) == (2, 256 * GIB)
