"""Ranks, addresses and ports out of the environments that launchers make."""

import os

import pytest

from fcmae.ranks import Launch, detect, first_node, port_of, tasks_per_node

CORES = len(os.sched_getaffinity(0))
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
STEP = {
    **JOB,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_srun():
    port = port_of(4711, 0)
    assert detect(STEP) == Launch(3, 4, 1, 2, f"tcp://gpu07:{port}?rank=3&world_size=4", one_gpu_each=True)
    assert 15_000 <= port < 30_000
    assert port != port_of(4711, 1)


def test_a_task_bound_to_its_cores_shares_them_with_nobody():
    assert detect({**STEP, "SLURM_CPUS_PER_TASK": str(CORES)}).sharing == 1
    assert detect({**STEP, "SLURM_CPUS_PER_TASK": str(CORES - 1)}).sharing == 2


def test_an_address_that_is_given_comes_first():
    given = detect({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert given.meeting == "tcp://10.0.0.1:1234?rank=3&world_size=4"


def test_torchrun_comes_before_slurm():
    assert detect({**STEP, **TORCHRUN}) == detect(TORCHRUN) == Launch(5, 8, 1, 4, "env://")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        JOB,  # the shell that salloc starts where it was called
        {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"},  # a batch script
        {**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty
        {**STEP, "SLURM_STEP_ID": "4294967290"},  # the shell of salloc on the first node
    ],
    ids=["nothing", "salloc", "sbatch", "srun --pty", "interactive step"],
)
def test_a_single_process_is_alone(environment):
    assert detect(environment) == Launch()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-010,12],login", "gpu007"),
        ("gpu[3,5]", "gpu3"),
        ("rack[2-3]n[01-04]-ib", "rack2n01-ib"),
        ("node-a.cluster.org,node-b", "node-a.cluster.org"),
    ],
)
def test_first_node(nodes, first):
    assert first_node(nodes) == first


def test_tasks_per_node():
    assert tasks_per_node("8(x2),4,1(x3)") == [8, 8, 4, 1, 1, 1]
    with pytest.raises(ValueError, match="no node in SLURM's node list ''"):
        first_node("")
