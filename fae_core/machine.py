"""The cores and the memory that this process may use: a container's or a job's, not the host's.

`os.cpu_count` and the size of the memory are the host's also where Docker, Kubernetes or Slurm
allow less. The limits are those of cgroups(7), version 1 or 2, and of the process's affinity.
Trainings and actors take their threads from here, and `--dry-run` and `--probe` their counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def num_cpus() -> int:
    """Whole cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = [len(os.sched_getaffinity(0))]
    else:
        cores = [os.cpu_count() or 1]
    # Version 2 has quota and period [us] in one file. Without a limit the quota is -1 or max.
    for words in (*_words("cpu.max"), *_words("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        if len(words) == 2 and words[0].isdigit():
            cores.append(int(words[0]) // int(words[1]))
    return max(1, min(cores))


def memory_bytes() -> int:
    """Bytes of memory that this process may use."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for words in (*_words("memory.max"), *_words("memory.limit_in_bytes")):
        limits += [int(word) for word in words if word.isdigit()]
    return min(limits)


def _words(*names: str) -> Iterator[list[str]]:
    """Words of the files `names` in each control group of this process and in those above it.

    A container sees its own group as the root, and may read its path on the host.
    """
    own = OWN_CGROUPS.read_text().splitlines() if OWN_CGROUPS.exists() else []
    for line in own:
        _, controllers, path = line.split(":", 2)
        # Version 2 names no controllers: CGROUPS itself. Version 1 has a folder for those that are
        # mounted together, in an order of its own, with a link for each.
        for folder_name in {controllers, *controllers.split(",")}:
            root = CGROUPS / folder_name
            group = root / path.strip("/")
            for folder in (group, *group.parents):
                files = [folder / name for name in names]
                if folder.is_relative_to(root) and all(file.is_file() for file in files):
                    yield " ".join(file.read_text() for file in files).split()
