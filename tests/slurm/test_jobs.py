"""Real jobs on a real SLURM: two nodes, a rank on each, gloo between them."""

import time

import pytest

from tests.conftest import start_python
from tests.results import weights_sha256
from tests.slurm.conftest import REPOSITORY, RUN, Job, last_step, wait_until
from tests.slurm.lab import NODES

STEPS = 180
"""A minute and the start-up at the pace of the job that waits for its time limit."""


@pytest.fixture(scope="module")
def undisturbed(undisturbed_job) -> str:
    """The SHA-256 of the weights of a run that nothing disturbed."""
    return weights_sha256(undisturbed_job.run_dir)


def test_torchrun_gives_the_weights_of_srun(lab, tmp_path, undisturbed):
    job = Job(lab, tmp_path / "job", *RUN, script="torchrun")
    assert job.finish() == undisturbed
    assert job.restarts == 0
    print(f"\ntorchrun: {undisturbed[:16]}")


def test_requeued_at_time_limits_and_after_a_lost_node(lab, tmp_path, undisturbed):
    job = Job(lab, tmp_path / "job", *RUN, paced=3, pace=0.35, options=("--time=1", "--signal=USR1@30"))
    job.wait_for(lambda job: job.restarts == 1)
    steps = [job.step]
    lab.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    job.wait_for(lambda job: job.step >= steps[-1] + 10)
    lab.run("scancel", "--signal=USR1", job.id)  # what SLURM does some time before a limit
    job.wait_for(lambda job: job.restarts == 2)
    steps.append(job.step)
    job.wait_for(lambda job: job.step >= steps[-1] + 10)
    lab.power_off("n2")
    steps.append(job.step)
    job.wait_for(lambda job: job.restarts == 3)
    lab.power_on("n2")
    assert job.finish() == undisturbed
    assert job.restarts == 3
    assert steps[-1] < STEPS
    print(f"\ntime limit at step {steps[0]}, the next at {steps[1]}, a node lost at {steps[2]}: {undisturbed[:16]}")


def test_pre_empted_and_resumed(lab, tmp_path, undisturbed):
    job = Job(lab, tmp_path / "job", *RUN, paced=1)
    job.wait_for(lambda job: job.step >= 20)
    urgent = lab.run("sbatch", "--parsable", "--partition=high", "--exclusive", "--nodes=2", "--output=/dev/null",
                     "--wrap=sleep 1").strip()  # fmt: skip
    job.wait_for(lambda job: job.restarts == 1)
    step = job.step
    assert job.finish() == undisturbed
    assert "JobState=COMPLETED" in lab.run("scontrol", "show", "job", urgent)
    print(f"\npre-empted at step {step}: {undisturbed[:16]}")


@pytest.mark.parametrize("script", ["srun", "torchrun"])
def test_scancel_leaves_nothing_behind(lab, tmp_path, script):
    job = Job(lab, tmp_path / "job", *RUN, "schedule.epochs=20000", script=script)
    job.wait_for(lambda job: job.step >= 20)
    assert all(lab.processes(node) for node in NODES)
    lab.run("scancel", job.id)
    wait_until(lambda: not any(lab.processes(node) for node in NODES))
    assert not any(lab.shared_memory(node) for node in NODES)
    assert not list(job.temporary.iterdir())
    assert not list(job.run_dir.rglob("*.tmp"))
    time.sleep(3)
    assert job.show()["JobState"] == "CANCELLED"


def test_a_run_that_stops_on_purpose_is_not_requeued(lab, tmp_path):
    job = Job(lab, tmp_path / "job", *RUN, "trainer.max_steps=2")
    job.wait_for(lambda job: job.show()["ExitCode"] == "75:0")
    assert job.restarts == 0


def test_a_sweep_of_three_one_of_them_requeued(lab, tmp_path):
    """Each ends with the weights that the same run has on the login node."""
    options = [f"hydra.launcher.{option}" for option in ("gpus_per_node=1", "cpus_per_task=1", "timeout_min=60")]
    sweep = ["hydra/launcher=slurm", *options, "hydra.sweep.dir=sweep", "seed=0,1,2", "--multirun"]
    # Python imports this module at its start: the jobs of submitit are paced so.
    (tmp_path / "paced").mkdir()
    (tmp_path / "paced" / "sitecustomize.py").write_text(
        "import os\nif 'SLURM_JOB_ID' in os.environ:\n    import tests.paced\n    tests.paced.install()\n"
    )
    path = {"PYTHONPATH": f"{tmp_path}/paced:{REPOSITORY}", "PACE": "0.4"}
    run = (*RUN, "schedule.epochs=30")
    runs = [login_node(lab, tmp_path, *run, *sweep, fresh=True, **path)]
    folders = [tmp_path / "sweep" / str(seed) for seed in range(3)]
    try:
        wait_until(lambda: last_step(folders[1]) >= 5 or runs[0].poll() is not None)
        job = lab.run("squeue", "--noheader", "--array", "--format=%i %K").split("\n")
        [job] = [line.split()[0] for line in job if line.endswith(" 1")]
        step = last_step(folders[1])
        lab.run("scancel", "--signal=USR2", job)
        wait_until(lambda: "Restarts=1" in lab.run("scontrol", "show", "job", job))
        runs += [login_node(lab, tmp_path, *run, f"seed={seed}", f"hydra.run.dir=alone_{seed}") for seed in range(3)]
        assert [run.wait() for run in runs] == [0] * 4, (tmp_path / "stderr.txt").read_text()
    finally:
        for run in runs:
            run.kill()
            run.wait()
    hashes = [weights_sha256(folder) for folder in folders]
    assert hashes == [weights_sha256(tmp_path / f"alone_{seed}") for seed in range(3)]
    print(f"\nsweep, the second requeued at step {step}: {' '.join(name[:16] for name in hashes)}")


def login_node(lab, folder, *args, fresh=False, **variables):
    """``fcmae ARGS`` outside of the nodes."""
    with (folder / "stderr.txt").open("a") as errors:
        variables = {"SLURM_CONF": lab.environment()["SLURM_CONF"], **variables}
        return start_python(folder, "-m", "fcmae.cli", *args, fresh=fresh, variables=variables, stderr=errors)
