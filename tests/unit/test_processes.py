"""One run a directory, and the watchdog over it."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fcmae.distributed import World
from fcmae.errors import UsageError
from fcmae.processes import Process, is_stopped
from fcmae.training import run_dir as run_dir_module
from fcmae.training.run_dir import RunLock
from fcmae.training.watchdog import KEPT, Watchdog
from tests.conftest import run_python, start_python
from tests.unit.holder import held

CPU = World(0, 1, 0, 1, torch.device("cpu"))


HANGING = """
import sys, time
from pathlib import Path
from fcmae.training.state import TrainState
from fcmae.training.watchdog import Watchdog
watchdog = Watchdog(2, Path(sys.argv[1]), rank=3)
for _ in range(5):
    time.sleep(0.5)
    watchdog.beat()
def stuck():
    time.sleep(3600)
stuck()
"""


def test_the_watchdog_ends_what_stands_still_and_leaves_the_stacks(tmp_path):
    done = run_python(tmp_path, "-c", HANGING, str(tmp_path), check=1)
    assert "rank 3: no step was finished for 2 s (trainer.hang_timeout); the stacks are in" in done.stderr
    assert "in stuck" in (tmp_path / "stacks_rank3.txt").read_text()


def test_stacks_of_earlier_processes_are_kept(tmp_path):
    """So many of them; what a killed process left empty is no evidence."""
    path = tmp_path / "stacks_rank3.txt"
    for number in range(KEPT + 3):
        Watchdog(3600, tmp_path, rank=3).close()
        assert not path.exists()
        path.write_text(f"stacks of process {number}")
    path.write_text("")
    Watchdog(3600, tmp_path, rank=3).close()
    left = [(tmp_path / f"stacks_rank3.txt.{number}").read_text() for number in range(1, KEPT + 1)]
    assert left == [f"stacks of process {number}" for number in range(KEPT + 1, 1, -1)]
    assert len(list(tmp_path.iterdir())) == KEPT


STOPPED = """
import os, signal, sys
from pathlib import Path
from fcmae.processes import Process
from fcmae.training.state import TrainState
from fcmae.training.watchdog import Watchdog
Watchdog(3600, Path(sys.argv[1]), rank=1)
def stands():
    Path("born").write_text(f"{os.getpid()} {Process.this().born}")
    os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        pass
stands()
"""


def test_the_watchdog_of_one_rank_ends_a_stopped_one_and_gets_its_stacks(tmp_path):
    stopped = start_python(tmp_path, "-c", STOPPED, str(tmp_path))
    try:
        while not is_stopped(stopped.pid):
            time.sleep(0.01)
        pid, born = (tmp_path / "born").read_text().split()
        biting = HANGING.replace("rank=3", f"rank=0, siblings={{1: Process({pid}, {born!r}, Process.this().place)}}")
        biting = f"from fcmae.processes import Process\n{biting}"
        done = run_python(tmp_path, "-c", biting, str(tmp_path), check=1)
        assert f"rank 1 (process {pid}) was stopped" in done.stderr
        assert stopped.wait(60) == -signal.SIGKILL
    finally:
        stopped.kill()
    assert "in stands" in (tmp_path / "stacks_rank1.txt").read_text()


def test_a_process_with_the_number_of_a_dead_one_is_not_signalled():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        this = Process.this()
        Process(other.pid, "1", this.place).send(signal.SIGKILL)
        other.communicate(b"\n")
        assert other.returncode == 0
    assert this.is_alive()
    assert not Process(this.pid, this.born, "elsewhere").is_alive()


def test_the_watchdog_leaves_nothing_behind(tmp_path):
    Watchdog(60, tmp_path, rank=0).close()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_names_its_holder_and_a_dead_holders_lock_is_taken_over(tmp_path):
    in_use = r"in use by another run \(host .*, process {}, started 2"
    with held(tmp_path) as holder, pytest.raises(UsageError, match=in_use.format(holder.pid)):
        RunLock(tmp_path).acquire()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.close()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_holder_counts_in_the_file(tmp_path, monkeypatch):
    """As on a file system that knows no locks, by two that believe to be on different machines, or on the same."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_dir_module.fcntl, "lockf", no_locks)
    monkeypatch.setattr(RunLock, "BEAT", 0.05)
    first = RunLock(tmp_path)
    first.acquire()
    with pytest.raises(UsageError, match=f"in use by another run .*, process {os.getpid()}, "):
        RunLock(tmp_path).acquire()
    told = json.loads(first.path.read_text())
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(Process, "is_here", lambda _: False)
        with pytest.raises(UsageError, match="in use by another run"):
            RunLock(tmp_path).acquire()
        first.close()
        for dead in ({**told, "place": "elsewhere"}, {**told, "host": "gone", "pid": 1}):
            first.path.write_text(json.dumps(dead))
            taken = RunLock(tmp_path)
            taken.acquire()
            taken.close()
    first.path.write_text(json.dumps({**told, "born": "1"}))
    RunLock(tmp_path).acquire()
    assert json.loads(first.path.read_text())["pid"] == os.getpid()
