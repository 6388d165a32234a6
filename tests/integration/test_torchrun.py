"""launch/torchrun.sh: signals reach the ranks, and their exit code comes back."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_PRETRAIN, run_python
from tests.faults.runs import wait_until
from tests.results import metrics_of

REPOSITORY = Path(__file__).parents[2]


def start(folder, *args):
    """Two ranks on this machine."""
    environment = {**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    environment |= {"RUN_DIR": "run", "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(REPOSITORY)}
    command = ["bash", str(REPOSITORY / "launch" / "torchrun.sh"), *args]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_signal_to_torchrun_stops_its_ranks_and_75_comes_back(tmp_path):
    (tmp_path / "tmp").mkdir()
    args = (*TINY_PRETRAIN, "schedule.epochs=400", "trainer.eval_every_epochs=400")
    run = start(tmp_path, *args, "trainer.checkpoint_every_epochs=400")
    wait_until((tmp_path / "run" / "metrics.jsonl").exists)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate()
    assert run.returncode == 75, said
    assert "(SIGTERM); the same command with hydra.run.dir=" in said
    steps = len(metrics_of(tmp_path / "run"))
    assert 0 < steps < 1200
    assert list((tmp_path / "run" / "checkpoints").glob("step_*.pt"))
    assert not list((tmp_path / "tmp").glob("torchelastic_*"))


@pytest.mark.slow
def test_a_mistake_is_2(tmp_path):
    launcher = ("-m", "fcmae.torchrun", "--nnodes=1", "--nproc-per-node=2", "--standalone")
    done = run_python(tmp_path, *launcher, "-m", "fcmae.cli", *TINY_PRETRAIN, "optim.lrr=1", check=2)
    assert done.stderr.count("optim.lrr: unknown key") == 1
