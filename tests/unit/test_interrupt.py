"""What signals do to a process. The processes that a second one ends are in tests/faults/test_signals.py."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from fcmae import cli, interrupt
from fcmae.training import loop, run
from tests.conftest import TINY_PRETRAIN


class Ended:
    """Stands in for os._exit."""

    def __init__(self, monkeypatch):
        self.code = None
        self.event = threading.Event()
        monkeypatch.setattr(interrupt.os, "_exit", self)

    def __call__(self, code):
        self.code = code
        self.event.set()


@pytest.fixture
def said(monkeypatch):
    """Lines, and an event for the first."""
    lines: list[str] = []
    first = threading.Event()
    interrupt.install(lambda line: (lines.append(line), first.set()))
    yield lines, first
    interrupt.uninstall()


@pytest.mark.parametrize("number", interrupt.ENDING)
def test_a_second_signal_ends_the_process(monkeypatch, said, number):
    monkeypatch.setattr(interrupt, "DOUBLED", 0.0)
    ended = Ended(monkeypatch)
    lines, first = said
    signal.raise_signal(number)
    assert first.wait(60)
    signal.raise_signal(signal.SIGTERM)
    assert ended.event.wait(60)
    assert ended.code == 128 + signal.SIGTERM
    assert interrupt.received() == number.name
    assert lines == [
        f"{number.name}: stops as soon as it can, and saves; another {number.name} ends it at once",
        "ended at once by a second SIGTERM; nothing more was saved",
    ]


def test_a_doubled_signal_is_one_and_a_request_is_no_first(monkeypatch, said):
    """torchrun and srun send each signal twice; SLURM sends SIGTERM after the SIGUSR1 that announces it."""
    ended = Ended(monkeypatch)
    monkeypatch.setattr(interrupt, "DOUBLED", 0.0)
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGTERM)
    assert said[1].wait(60)
    monkeypatch.setattr(interrupt, "DOUBLED", 1e9)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGUSR2)
    interrupt.uninstall()  # joins the thread, which has read all of them then
    assert not ended.event.is_set()
    assert len(said[0]) == 1


def test_a_postponed_signal_counts_once(monkeypatch, said):
    ended = Ended(monkeypatch)
    monkeypatch.setattr(interrupt, "DOUBLED", 0.0)
    with interrupt.postponed():
        os.kill(os.getpid(), signal.SIGTERM)
        assert said[1].wait(60)
    assert interrupt.received() == "SIGTERM"
    interrupt.uninstall()
    assert not ended.event.is_set()


def test_a_forked_process_does_not_write_to_the_watcher(said):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, str(signal.set_wakeup_fd(-1)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(read, 8) == b"-1"
    os.close(read)
    os.close(write)


def test_what_was_there_before_is_there_again():
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    interrupt.install()
    interrupt.install()
    interrupt.uninstall()
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before


@pytest.mark.parametrize(
    ("phase", "not_reached"),
    [("connect", "_pretraining"), ("_pretraining", "RunLock"), ("RunLock", "newest_state"), ("newest_state", "_read")],
)
def test_a_signal_in_the_set_up_is_acted_on_before_the_next_phase(monkeypatch, tmp_path, capfd, phase, not_reached):
    """At most one phase continues to its end: connecting, building and listing, taking the directory, resuming."""
    places = {"connect": run.distributed, "newest_state": loop, "_read": loop._Training}
    original = getattr(places.get(phase, run), phase)

    def signalled(*args, **kwargs):
        result = original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    def must_not(*args, **kwargs):
        raise AssertionError(f"{not_reached} was reached")

    monkeypatch.setattr(places.get(phase, run), phase, signalled)
    monkeypatch.setattr(places.get(not_reached, run), not_reached, must_not)
    assert cli.main([*TINY_PRETRAIN, f"hydra.run.dir={tmp_path}/run"]) == 75
    error = capfd.readouterr().err
    assert f"before the first step (SIGTERM); the same command with hydra.run.dir={tmp_path}/run continues" in error


def test_a_signal_that_ends_a_compilation_stops_the_run_as_if_before_it(monkeypatch, tmp_path, capfd):
    """Ctrl-C reaches every process of the terminal: torch.compile loses the assembler and raises."""

    def compiles(self, batches):
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("`ptxas` failed with error code -2")

    monkeypatch.setattr(loop.TrainingStep, "__call__", compiles)
    assert cli.main([*TINY_PRETRAIN, f"hydra.run.dir={tmp_path}/run"]) == 75
    error = capfd.readouterr().err
    assert "before the first step (SIGINT); the same command" in error
    assert "Traceback" not in error


WITHOUT_POSIX_SIGNALS = """
import signal, sys
for name in dir(signal):
    if name.startswith(("SIG", "pthread", "sig")) and name not in ("SIGINT", "SIGTERM", "SIG_DFL", "SIG_IGN", "signal"):
        delattr(signal, name)
sys.modules["fcntl"] = sys.modules["resource"] = None
import fcmae.cli
print(fcmae.cli.interrupt.SIGNALS)
"""


def test_the_command_line_imports_where_posix_signals_are_missing():
    """As on Windows, where fcmae does not run, but says so itself."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX_SIGNALS], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{(signal.SIGTERM, signal.SIGINT)}\n"


HANGING_AT_ITS_END = """
import atexit, sys, threading
from fcmae import cli, interrupt

def interrupted(args):
    raise KeyboardInterrupt

atexit.register(threading.Event().wait, 600)
interrupt.PATIENCE = 0.1
cli._TOOLS["doctor"] = interrupted
sys.exit(cli.main())
"""


def test_an_interrupted_command_ends_although_something_waits_at_its_end():
    command = [sys.executable, "-c", HANGING_AT_ITS_END, "doctor"]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "fcmae doctor: interrupted\n")
