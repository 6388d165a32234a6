"""Stopping early: signals, time limits, and checkpoints that cannot be written."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN, run_python
from tests.integration.test_commands import assert_same_weights, last_checkpoint, metrics

SLOW_STEPS = ("schedule.epochs=60", "trainer.checkpoint_every_epochs=5", "trainer.eval_every_epochs=60")


def start(folder, *args):
    """Starts ``fcmae ARGS``, to be signalled."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fcmae.cli", *args]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(path, seconds=60):
    limit = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < limit, f"no {path}"
        time.sleep(0.02)


def test_signals_stop_a_run_that_resumes_bit_exactly(fcmae, tmp_path):
    args = (*TINY_PRETRAIN, *SLOW_STEPS)
    fcmae(*args, "hydra.run.dir=whole")
    for numbers in ((signal.SIGTERM,), (signal.SIGUSR1, signal.SIGINT, signal.SIGUSR2)):
        run = start(tmp_path, *args, "hydra.run.dir=parts")
        wait_for(tmp_path / "parts" / "config.yaml")
        time.sleep(0.3)
        for number in numbers:
            run.send_signal(number)
        _, error = run.communicate(timeout=60)
        assert run.returncode == 75, error
        assert any(f"({number.name}); the same command with hydra.run.dir=" in error for number in numbers)
        (tmp_path / "parts" / "config.yaml").unlink()
    fcmae(*args, "hydra.run.dir=parts")
    whole, parts = (last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert_same_weights(whole["model"], parts["model"])
    assert [m["step"] for m in metrics(tmp_path / "parts")] == list(range(1, 181))


def test_a_signal_at_start_up_is_not_lost(tmp_path):
    run = start(tmp_path, *TINY_PRETRAIN, "hydra.run.dir=run")
    time.sleep(0.5)  # torch is being imported
    run.send_signal(signal.SIGUSR1)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 75, error
    assert "(SIGUSR1)" in error


def test_max_hours(fcmae, tmp_path):
    done = fcmae(*TINY_FINETUNE, "trainer.max_hours=1e-9", "hydra.run.dir=run", ranks=1, check=75)
    assert "(trainer.max_hours)" in done.stderr


LATE_SIGNAL = """
import atexit, os, signal, sys
from fcmae.cli import main
code = main()
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    atexit.register(os.kill, os.getpid(), number)
sys.exit(code)
"""


def test_a_signal_after_the_save_does_not_change_the_exit_code(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(LATE_SIGNAL)
    run_python(tmp_path, str(script), *TINY_PRETRAIN, "trainer.max_hours=1e-9", "hydra.run.dir=run", check=75)


SIGNAL_IN_EVALUATION = """
import os, signal, sys
import fcmae.evaluation.classify as classify
batches = classify.batches
def interrupted(*args, **kwargs):
    for number, batch in enumerate(batches(*args, **kwargs)):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield batch
classify.batches = interrupted
from fcmae.cli import main
sys.exit(main())
"""


def test_a_stop_does_not_wait_for_an_evaluation_which_the_next_process_begins_with(fcmae, tmp_path):
    args = (*TINY_FINETUNE, "trainer.micro_batch_size=2")
    fcmae(*args, "hydra.run.dir=whole")
    script = tmp_path / "interrupted.py"
    script.write_text(SIGNAL_IN_EVALUATION)
    for epoch in (1, 2):
        run_python(tmp_path, str(script), *args, "hydra.run.dir=parts", check=75)
        stopped = last_checkpoint(tmp_path / "parts")
        assert (stopped["step"], stopped["evaluation_due"]) == (3, True)
        assert not any("top1" in line for line in metrics(tmp_path / "parts")), epoch
    fcmae(*args, "hydra.run.dir=parts")
    whole, parts = (last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert_same_weights(whole["model"], parts["model"])
    assert whole["best"] == parts["best"]
    evaluated = [[(m["step"], m["top1"]) for m in metrics(tmp_path / d) if "top1" in m] for d in ("whole", "parts")]
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_checkpoint_that_cannot_be_written(fcmae, tmp_path, policy):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    args = (*TINY_PRETRAIN, f"trainer.on_save_error={policy}", "hydra.run.dir=run")
    done = fcmae(*args, check=1)
    assert "step_00000003.pt was not saved: File exists" in done.stderr
    assert "Traceback" not in done.stderr
    steps = [m["step"] for m in metrics(tmp_path / "run")]
    assert steps[-1] == 9 if policy == "continue" else steps[-1] < 9
