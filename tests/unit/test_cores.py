import os

import pytest
import torch

from fcmae.data import cores
from fcmae.data.cores import cores_per_rank, default_workers

V1 = {"cpu/a/cpu.cfs_period_us": "100000"}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """16 cores and cgroups that limit nothing."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(cores, "CGROUPS", tmp_path)
    monkeypatch.setattr(cores, "OWN_CGROUP", tmp_path / "own")
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_workers_are_the_cores_but_one(machine, monkeypatch):
    assert default_workers(torch.device("cuda"), 1) == 15
    assert default_workers(torch.device("cuda"), 4) == 3
    assert default_workers(torch.device("cuda"), 16) == 1
    assert default_workers(torch.device("cpu"), 1) == 1
    assert default_workers(torch.device("cpu"), 16) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(200)))
    assert default_workers(torch.device("cuda"), 1) == 32
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert default_workers(torch.device("cpu"), 1) == 0
    assert default_workers(torch.device("cuda"), 8) == 1


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "600000 100000\n"}, 6),
        ("0::/a/b\n", {"a/cpu.max": "250000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2),
        ("0::/a\n", {"a/cpu.max": "50000 100000\n"}, 1),
        ("0::/a\n", {"a/cpu.max": "max 100000\n"}, 16),
        ("0::/elsewhere\n", {}, 16),
        (
            "4:memory:/a\n2:cpu,cpuacct:/a\n",
            {**V1, "cpu/a/cpu.cfs_quota_us": "400000"},
            4,
        ),
        ("2:cpuacct,cpu:/a\n", {**V1, "cpu/a/cpu.cfs_quota_us": "-1"}, 16),
        ("2:cpuset:/a\n", {**V1, "cpu/a/cpu.cfs_quota_us": "100000"}, 16),
    ],
)
def test_a_quota_of_the_cgroup_counts(machine, own, files, expected):
    write(machine / "own", own)
    for name, text in files.items():
        write(machine / name, text)
    assert cores_per_rank(1) == expected
    assert cores_per_rank(2) == max(1, expected // 2)


@pytest.mark.parametrize(
    ("environment", "ranks", "expected"),
    [
        ({}, 4, 4),
        ({"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "6"}, 2, 6),  # each rank is a task
        ({"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "12", "TORCHELASTIC_RUN_ID": "x"}, 2, 6),  # torchrun is the task
        ({"SLURM_CPUS_ON_NODE": "8"}, 2, 4),
        ({"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "64"}, 2, 16),
        ({"SLURM_PROCID": "0", "SLURM_CPUS_ON_NODE": "8"}, 4, 2),
    ],
)
def test_what_slurm_gave_counts(machine, environment, ranks, expected):
    assert cores_per_rank(ranks, environment) == expected


def test_there_is_a_core_at_least(machine):
    assert cores_per_rank(100) == 1
