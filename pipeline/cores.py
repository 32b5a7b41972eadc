"""How many cores a process may use: fewer than the machine has where it is pinned, or its container limited."""

import contextlib
import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # of a container, its own


def usable_cores(cgroup: Path = CGROUP) -> int:
    """The whole cores of this process, 1 at least: those it may run on, and no more than its container's CPU limit."""
    pinned = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(pinned, _container_limit(cgroup))))


def _container_limit(cgroup: Path) -> float:
    """Cores by the quota of cgroups, version 2 or 1; infinite without one."""
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        quota, period = (cgroup / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota_us = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text())
        if quota_us > 0:  # -1: none
            return quota_us / int((cgroup / "cpu" / "cpu.cfs_period_us").read_text())
    return math.inf
