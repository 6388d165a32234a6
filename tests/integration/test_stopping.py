"""Stopping early: signals, time limits, and checkpoints that cannot be written."""

import signal

import pytest

from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN, run_python, start_python
from tests.faults.runs import catches, steps, wait_until
from tests.results import assert_same, metrics_of, newest


def stopped(folder, args, numbers, when, **kwargs):
    """Starts ``python ARGS``, sends the signals when the process is as ``when`` says, and returns what it told."""
    with (folder / "stderr.txt").open("w") as stderr:
        run = start_python(folder, *args, stderr=stderr, **kwargs)
    wait_until(lambda: when(run) or run.poll() is not None)
    for number in numbers:
        run.send_signal(number)
    code = run.wait()
    error = (folder / "stderr.txt").read_text()
    assert code == 75, error
    return error


def test_signals_stop_a_run_that_resumes_bit_exactly(fcmae, tmp_path):
    args = (*TINY_PRETRAIN, "schedule.epochs=9", "trainer.checkpoint_every_epochs=5", "trainer.eval_every_epochs=9")
    fcmae(*args, "hydra.run.dir=whole")
    done, paced = 0, ("-m", "tests.paced", *args, "hydra.run.dir=parts")

    def last_step():
        return max(steps(tmp_path / "parts"), default=0)

    for numbers in ((signal.SIGTERM,), (signal.SIGUSR1, signal.SIGINT, signal.SIGUSR2)):
        error = stopped(tmp_path, paced, numbers, lambda _, n=done: last_step() > n, variables={"PACE": "0.5"})
        assert any(f"({number.name}); the same command with hydra.run.dir=" in error for number in numbers)
        done = last_step()
        assert 0 < done < 27
    fcmae(*args, "hydra.run.dir=parts")
    whole, parts = (newest(tmp_path / name) for name in ("whole", "parts"))
    assert_same(whole["model"], parts["model"])
    assert [m["step"] for m in metrics_of(tmp_path / "parts")] == list(range(1, 28))


@pytest.mark.slow
def test_a_signal_at_start_up_is_not_lost(tmp_path):
    """Before torch is imported."""
    args = ("-m", "fcmae.cli", *TINY_PRETRAIN, "hydra.run.dir=run")
    error = stopped(tmp_path, args, [signal.SIGUSR1], lambda run: catches(run.pid, signal.SIGUSR1), fresh=True)
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
        stopped = newest(tmp_path / "parts")
        assert (stopped["step"], stopped["evaluation_due"]) == (3, True)
        assert not any("top1" in line for line in metrics_of(tmp_path / "parts")), epoch
    fcmae(*args, "hydra.run.dir=parts")
    whole, parts = (newest(tmp_path / name) for name in ("whole", "parts"))
    assert_same(whole["model"], parts["model"])
    assert whole["best"] == parts["best"]
    evaluated = [[(m["step"], m["top1"]) for m in metrics_of(tmp_path / d) if "top1" in m] for d in ("whole", "parts")]
    assert evaluated[0] == evaluated[1]


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_checkpoint_that_cannot_be_written(fcmae, tmp_path, policy):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    args = (*TINY_PRETRAIN, f"trainer.on_save_error={policy}", "hydra.run.dir=run")
    done = fcmae(*args, check=1)
    assert "step_00000003.pt was not saved: File exists" in done.stderr
    assert "Traceback" not in done.stderr
    steps = [m["step"] for m in metrics_of(tmp_path / "run")]
    assert steps[-1] == 9 if policy == "continue" else steps[-1] < 9


STUCK = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which tests may run, ignores it
import fcmae.evaluation.embed as embed
from fcmae.files import output
def stuck(*args, out, **kwargs):
    with output("--out", out):
        Path("reached").touch()
        time.sleep(3600)
embed.embed = stuck
from fcmae.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_another_command_leaves_no_temporary_file(tmp_path, number):
    (tmp_path / "stuck.py").write_text(STUCK)
    (tmp_path / "run").touch()
    with (tmp_path / "stderr.txt").open("w") as stderr:
        run = start_python(tmp_path, "stuck.py", "embed", "run", "images", "--out", "out.npz", stderr=stderr)
    wait_until(lambda: (tmp_path / "reached").exists() or run.poll() is not None)
    run.send_signal(number)
    assert run.wait(60) == 1
    assert (tmp_path / "stderr.txt").read_text() == "fcmae embed: interrupted\n"
    assert not list(tmp_path.glob("out*"))


ENDING = """
import atexit, os, signal, sys
from fcmae.cli import main
atexit.register(lambda: [os.kill(os.getpid(), number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)])
sys.exit(main())
"""


def test_a_signal_while_another_command_ends_changes_nothing(tmp_path):
    (tmp_path / "ending.py").write_text(ENDING)
    done = run_python(tmp_path, "ending.py", "ls", ".", check=2)
    assert done.stderr == "fcmae ls: . holds no runs and no studies\n"


FULL = """
import errno, sys
import fcmae.training.loop as loop
def full(run_dir, _):
    raise OSError(errno.ENOSPC, "No space left on device", f"{run_dir}/config.yaml")
loop.write_config = full
from fcmae.cli import main
sys.exit(main())
"""


def test_a_full_disk_at_the_start_is_told_once(tmp_path):
    """The other ranks learn of it, and do not only find their connection closed."""
    (tmp_path / "full.py").write_text(FULL)
    done = run_python(tmp_path, "full.py", *TINY_PRETRAIN, "hydra.run.dir=run", ranks=2, check=1)
    told = [line for line in done.stderr.splitlines() if line.startswith(("fcmae", "Traceback", "RuntimeError"))]
    assert len(told) == 1, done.stderr
    assert told[0].endswith("config.yaml cannot be written: No space left on device")
