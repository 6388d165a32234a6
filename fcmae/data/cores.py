"""The number of cores that this process may use, and the default number of loader workers."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from fcmae import ranks

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
MOST_WORKERS = 32
"""Per rank, for any number of cores: each takes memory, and one training process receives from all."""


def default_workers(device: torch.device, local_world_size: int) -> int:
    """Loader workers per rank: its cores less one. On a CPU, which trains on the cores, 1, or 0 for a single core."""
    cores = cores_per_rank(local_world_size)
    if device.type == "cpu":
        return min(1, cores - 1)
    return max(1, min(MOST_WORKERS, cores - 1))


def cores_per_rank(local_world_size: int, environment: Mapping[str, str] = os.environ) -> int:
    """A rank's share, at least 1, of the cores that its process may use by affinity, cgroup quota and SLURM.

    The ranks of one torchrun share the cores of its SLURM task; a rank that is a task has them for itself.
    """
    cores = min(ranks.cores(), _quota() or ranks.cores())
    per_task = environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE")
    is_task = "SLURM_PROCID" in environment and "TORCHELASTIC_RUN_ID" not in environment
    if is_task and "SLURM_CPUS_PER_TASK" in environment:
        return max(1, min(cores, int(environment["SLURM_CPUS_PER_TASK"])))
    if per_task is not None:
        cores = min(cores, int(per_task))
    return max(1, cores // local_world_size)


def _quota() -> int | None:
    """The smallest CPU quota over this process in whole cores, at least 1; None without one."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:  # not Linux
        return None
    quotas = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        root = CGROUPS if not controllers else CGROUPS / "cpu"  # version 2 or 1
        if controllers and "cpu" not in controllers.split(","):
            continue
        group = root / own.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                quotas.append(_cores(folder))
    found = [quota for quota in quotas if quota is not None]
    return max(1, int(min(found))) if found else None


def _cores(group: Path) -> float | None:
    """The quota of a cgroup in cores, of version 2 or 1."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
