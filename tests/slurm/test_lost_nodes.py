"""A job that loses a node goes on with those that are left, and takes the node back at its next start."""

import json
import os
import sys

import pytest

from tests.slurm.conftest import RUN, Job, wait_until
from tests.slurm.lab import NODES, SPARE

SHORT = os.environ.get("LOST_NODES", "short") == "short"


def lines(run_dir, name):
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def losses(run_dir):
    """By step; lines of evaluation have none."""
    return {line["step"]: line["loss"] for line in lines(run_dir, "metrics.jsonl") if "loss" in line}


@pytest.fixture
def nodes(lab):
    """Two nodes, or three with LOST_NODES=full."""
    if SHORT:
        yield NODES
        return
    lab.power_on(SPARE)
    lab.wait_for_nodes(partition="spare")
    yield (*NODES, SPARE)
    lab.power_off(SPARE)


def test_goes_on_with_a_node_less_and_takes_it_back(lab, tmp_path, nodes, undisturbed_job):
    """One rank a node; the losses are those of an undisturbed run, and so are the samples that they come from."""
    options = ("--partition=spare", f"--nodes=1-{len(nodes)}")
    fcmae = f"{sys.executable} -m tests.paced"
    job = Job(lab, tmp_path / "job", *RUN, script="torchrun", paced=2, tasks=False, options=options, FCMAE=fcmae)
    job.wait_for(lambda job: job.step >= 10)
    lost, first = nodes[-1], job.step
    lab.power_off(lost)
    job.wait_for(lambda job: job.restarts >= 1 and job.step > first)
    restarts, second = job.restarts, job.step
    lab.power_on(lost)
    lab.wait_for_nodes(partition="main" if SHORT else "spare")
    job.wait_for(lambda job: job.step >= second + 5)
    lab.run("scancel", "--signal=USR1", job.id)
    job.wait_for(lambda job: job.restarts > restarts)
    job.finish()
    ranks = [line["ranks"] for line in lines(job.run_dir, "events.jsonl") if "ranks" in line]
    assert ranks[0] == ranks[-1] == len(nodes)
    assert len(nodes) - 1 in ranks
    expected = losses(undisturbed_job.run_dir)
    assert losses(job.run_dir) == pytest.approx(expected, rel=1e-6)
    assert len(expected) == 180
    wait_until(lambda: not lab.run("squeue", "--noheader"))
    print(f"\nranks of each start: {ranks}; node {lost} lost at step {first}, back at {second}")
