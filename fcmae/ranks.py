"""Rank, world size and rendezvous address of this process, from the environment of torchrun or srun.

The only place that reads a launcher's environment. Imports nothing slow.
"""

import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

SPECIAL_STEPS = 0xFFFFFFF0
"""SLURM's steps from here on are its own: an interactive salloc's shell, a batch script, ..."""


START_FORMAT = "%Y-%m-%d_%H-%M-%S"


def now() -> str:
    """The time as year-month-day_hour-minute-second, by the clock of this process."""
    return time.strftime(START_FORMAT)


@dataclass(frozen=True)
class Launch:
    """A process among the ranks that a launcher started."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among the ranks of this machine."""
    sharing: int = 1
    """Ranks that share the cores this process may use."""
    meeting: str = "env://"
    """Where the ranks find each other, for :func:`torch.distributed.rendezvous`."""
    one_gpu_each: bool = False
    """The launcher may show every rank only its own GPU."""


def detect(environment: Mapping[str, str] = os.environ) -> Launch:
    """What the environment says: torchrun's variables count first, then srun's, else the process is alone.

    A single process inside a SLURM job is alone, whatever the job asked for: in a batch script, in the shell of an
    interactive salloc, in ``srun --pty``.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Launch(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            int(environment.get("LOCAL_RANK", "0")),
            int(environment.get("LOCAL_WORLD_SIZE", "1")),
        )
    size = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if size > 1 and "SLURM_PROCID" in environment and int(environment["SLURM_STEP_ID"]) < SPECIAL_STEPS:
        return _srun(environment, size)
    return Launch()


def _srun(environment: Mapping[str, str], size: int) -> Launch:
    rank = int(environment["SLURM_PROCID"])
    on_nodes = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
    # Where SLURM binds tasks to cores, a task's cores are its own.
    bound = cores() <= int(environment.get("SLURM_CPUS_PER_TASK", "0"))
    return Launch(
        rank,
        size,
        int(environment["SLURM_LOCALID"]),
        1 if bound else on_nodes[int(environment.get("SLURM_NODEID", "0"))],
        f"tcp://{step_address(environment)}?rank={rank}&world_size={size}",
        one_gpu_each=True,
    )


def step_address(environment: Mapping[str, str]) -> str:
    """``host:port`` where the tasks of a SLURM step can meet; MASTER_ADDR and MASTER_PORT come first."""
    host = environment.get("MASTER_ADDR") or first_node(environment["SLURM_STEP_NODELIST"])
    port = port_of(int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"]))
    return f"{host}:{environment.get('MASTER_PORT') or port}"


def first_node(nodes: str) -> str:
    """The first of a SLURM node list, where rank 0 runs: ``gpu[007-010,12],login`` gives ``gpu007``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"no node in SLURM's node list {nodes!r}")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0])


def tasks_per_node(counts: str) -> list[int]:
    """SLURM's short form written out: ``8(x2),4`` gives ``[8, 8, 4]``."""
    tasks = []
    for part in counts.split(","):
        number, _, times = part.partition("(x")
        tasks += [int(number)] * int(times.rstrip(")") or 1)
    return tasks


def port_of(job: int, step: int) -> int:
    """A port for a step of a job, below those that the kernel gives to outgoing connections."""
    return 15_000 + (job + 7919 * step) % 15_000


def cores() -> int:
    """Those that this process may use by its affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":  # for launch/torchrun.sh: number of nodes, where they meet, and the run's name
    print(os.environ["SLURM_STEP_NUM_NODES"], step_address(os.environ), os.environ["SLURM_JOB_ID"])
