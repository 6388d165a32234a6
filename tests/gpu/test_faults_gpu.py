"""What happens to two GPUs over NCCL, where steps are replayed, when a rank dies, stops, or has no number."""

import os
import signal

import pytest
import torch

from tests.faults.runs import (
    COMMANDS,
    children,
    finish,
    kill_group,
    processes,
    start,
    steps,
    wait_until,
)
from tests.faults.test_hangs import poisoned
from tests.results import weights_sha256

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
ARGS = (*COMMANDS["pretrain"], "hydra.run.dir=run", "trainer.compile=false", "trainer.log_every=1")
ARGS += ("schedule.epochs=120", "trainer.eval_every_epochs=120")
"""360 steps, a checkpoint every three."""
TIMEOUT = 20


def disturb(folder, number, aim):
    """Starts or resumes a run and sends its second rank a signal at step ``aim``; returns its id and what was said."""
    (folder / "stderr.txt").unlink(missing_ok=True)
    run = start(folder, *ARGS, f"trainer.hang_timeout={TIMEOUT}", ranks=2)
    try:
        wait_until(lambda: max(steps(folder / "run"), default=0) >= aim or run.poll() is not None)
        assert run.poll() is None, (folder / "stderr.txt").read_text()
        rank = children(run.pid)[1]
        os.kill(rank, number)
        run.wait(TIMEOUT + 60)
        wait_until(lambda: not list(processes(folder)), 20)
    finally:
        kill_group(run)
    return rank, (folder / "stderr.txt").read_text()


def test_a_rank_dies_and_one_stops(tmp_path):
    """Resumed after both, the run ends with the bits of an undisturbed one."""
    whole = tmp_path / "whole"
    whole.mkdir()
    finish(whole, *ARGS, ranks=2)
    disturb(tmp_path, signal.SIGKILL, 60)
    stopped, said = disturb(tmp_path, signal.SIGSTOP, 180)
    assert f"rank 0: no step was finished for {TIMEOUT} s" in said
    assert f"rank 1 (process {stopped}) was stopped" in said
    assert "resumed at step" in finish(tmp_path, *ARGS, ranks=2)
    assert weights_sha256(tmp_path / "run") == weights_sha256(whole / "run")


def test_not_a_number_on_one_rank(tmp_path):
    args = (*ARGS, "optim.global_batch_size=24")  # sample 5 is in every step, half the time on rank 1
    said = finish(tmp_path, *args, ranks=2, script=poisoned(tmp_path, "input"), expect=1)
    assert "is not finite; the weights are those before it" in said
    assert len(list((tmp_path / "run").glob("nonfinite_*_rank_*.pt"))) == 2
