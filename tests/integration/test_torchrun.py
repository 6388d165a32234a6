"""launch/torchrun.sh: signals reach the ranks, and their exit code comes back."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.conftest import TINY_PRETRAIN
from tests.integration.test_commands import metrics
from tests.integration.test_stopping import wait_for

REPOSITORY = Path(__file__).parents[2]


def start(folder, *args):
    """Two ranks on this machine."""
    environment = {**os.environ, "PYTHON": sys.executable, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    environment |= {"RUN_DIR": "run", "TMPDIR": str(folder / "tmp"), "PYTHONPATH": str(REPOSITORY)}
    command = ["bash", str(REPOSITORY / "launch" / "torchrun.sh"), *args]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_signal_to_torchrun_stops_its_ranks_and_75_comes_back(tmp_path):
    (tmp_path / "tmp").mkdir()
    args = (*TINY_PRETRAIN, "schedule.epochs=400", "trainer.eval_every_epochs=400")
    run = start(tmp_path, *args, "trainer.checkpoint_every_epochs=400")
    wait_for(tmp_path / "run" / "metrics.jsonl")
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 75, said
    assert "(SIGTERM); the same command with hydra.run.dir=" in said
    steps = len(metrics(tmp_path / "run"))
    assert 0 < steps < 1200
    assert list((tmp_path / "run" / "checkpoints").glob("step_*.pt"))
    assert not list((tmp_path / "tmp").glob("torchelastic_*"))


def test_a_mistake_is_2(tmp_path):
    (tmp_path / "tmp").mkdir()
    run = start(tmp_path, *TINY_PRETRAIN, "trainer.global_batch_size=25")
    _, said = run.communicate(timeout=120)
    assert run.returncode == 2, said
    assert "trainer.global_batch_size is 25; allowed with 24 training images is at most 24" in said
