"""Row 6: each stop signal at start-up, in a step and in a save, and three at once."""

import os
import signal
import time

import pytest

from fcmae.training import checkpoint
from tests.faults.runs import COMMANDS, SHORT, finish, kill_group, ranks_of, start, steps, wait_until, weights_sha256

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

SLOW_SAVE = """
import os, sys, threading, time
from pathlib import Path
from fcmae import interrupt
interrupt.install()
fsync = os.fsync
def slow(descriptor):
    if threading.current_thread().name == "fcmae-saver":  # other files are written with care, too
        Path("saving").touch()
        time.sleep(1)
    fsync(descriptor)
os.fsync = slow
from fcmae.cli import main
sys.exit(main())
"""


def stopped(folder, command, signals, when, script=None):
    """Starts a run, sends the signals when a condition holds, and returns how long it took to end with 75."""
    run = start(folder, *COMMANDS[command], "hydra.run.dir=run", script=script)
    try:
        when(run)
        for number in signals:
            run.send_signal(number)
        sent = time.monotonic()
        assert run.wait(60) == 75, (folder / "stderr.txt").read_text()
        return time.monotonic() - sent
    finally:
        kill_group(run)


def in_a_step(folder):
    before = max(steps(folder / "run"), default=0)
    return lambda run: wait_until(lambda: max(steps(folder / "run"), default=0) > before + 4)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_each_signal_in_a_step_and_at_start_up(tmp_path, undisturbed, command):
    for number in SIGNALS[:: 3 if SHORT else 1]:
        assert stopped(tmp_path, command, [number], lambda _: time.sleep(0.4)) < 60
        assert stopped(tmp_path, command, [number], in_a_step(tmp_path)) < 60
    assert stopped(tmp_path, command, SIGNALS[1:], in_a_step(tmp_path)) < 60
    finish(tmp_path, *COMMANDS[command], "hydra.run.dir=run")
    assert weights_sha256(tmp_path / "run") == undisturbed(command, 1)


@pytest.mark.timeout(900)
def test_signals_in_a_save(tmp_path, undisturbed):
    """Three signals while a save is under way, of which it takes no notice."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW_SAVE)
    for numbers in [SIGNALS[:3]] if SHORT else [SIGNALS[:3], *([number] for number in SIGNALS)]:
        (tmp_path / "saving").unlink(missing_ok=True)
        stopped(tmp_path, "pretrain", numbers, lambda _: wait_until((tmp_path / "saving").exists), script)
    assert checkpoint.CheckpointDir(tmp_path / "run").load_latest(pytest.fail) is not None
    finish(tmp_path, *COMMANDS["pretrain"], "hydra.run.dir=run")
    assert weights_sha256(tmp_path / "run") == undisturbed("pretrain", 1)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["one rank", "torchrun"])
def test_two_ranks_stop_after_the_same_step(tmp_path, undisturbed, target):
    args = (*COMMANDS["pretrain"], "hydra.run.dir=run")
    run = start(tmp_path, *args, ranks=2)
    try:
        wait_until(lambda: max(steps(tmp_path / "run"), default=0) >= 10)
        os.kill(ranks_of(tmp_path)[1] if target == "one rank" else run.pid, signal.SIGUSR1)
        assert run.wait(60) == 1  # torchrun's exit code, whatever its ranks return
    finally:
        kill_group(run)
    said = (tmp_path / "stderr.txt").read_text()
    assert "fcmae pretrain: stopped after step" in said
    finish(tmp_path, *args, ranks=2)
    assert weights_sha256(tmp_path / "run") == undisturbed("pretrain", 2)
