"""A run on one GPU, killed at random moments and resumed, ends with the bits of an undisturbed one."""

import random
import signal
import time

import pytest

from tests.faults.runs import finish, kill_group, start, steps, wait_until
from tests.results import weights_sha256

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

STEPS = 240
RUN = (
    "pretrain",
    "model=convnextv2_atto",
    "model.decoder_embed_dim=64",
    "data=synthetic",
    "data.image_size=96",
    "data.length=96",
    "loader.workers=2",
    "optim.lr=3e-4",
    f"schedule.epochs={STEPS // 3}",
    "schedule.warmup_epochs=4",
    "optim.global_batch_size=32",
    "precision=bf16",
    "trainer.device=cuda",
    "trainer.deterministic=true",
    "trainer.log_every=1",
    "trainer.checkpoint_every_epochs=2",
    "trainer.eval_every_epochs=1000",
    "logger=quiet",
    "logger.progress=false",
)
KILLS = 3


@pytest.mark.parametrize("compiled", [False, True])
def test_killed_and_resumed_equals_undisturbed(tmp_path, compiled):
    """Three SIGKILLs some steps and a moment after the last; the weights' SHA-256 are compared."""
    args = (*RUN, f"trainer.compile={str(compiled).lower()}")
    whole = tmp_path / "whole"
    whole.mkdir()
    finish(whole, *args, "hydra.run.dir=run")
    rng = random.Random(compiled)
    reached = 0
    for kill in range(KILLS):
        run = start(tmp_path, *args, "hydra.run.dir=run")
        try:
            aim = reached + rng.randint(10, (STEPS - 30) // KILLS)
            wait_until(lambda aim=aim: max(steps(tmp_path / "run"), default=0) >= aim or run.poll() is not None)  # noqa: B023
            time.sleep(0.02 * rng.random())
            run.kill()
            assert run.wait(30) == -signal.SIGKILL, (tmp_path / "stderr.txt").read_text()
        finally:
            kill_group(run)
        reached = max(steps(tmp_path / "run"))
        assert kill < KILLS - 1 or reached < STEPS
    said = finish(tmp_path, *args, "hydra.run.dir=run")
    assert "resumed at step" in said
    assert weights_sha256(tmp_path / "run") == weights_sha256(whole / "run")
