"""Processes forked by tests/preloaded.py behave as started ones do."""

import os
import signal
import subprocess
import sys

import pytest

from tests import preloaded
from tests.conftest import run_python, start_python

pytestmark = pytest.mark.skipif(not preloaded.is_possible(), reason="processes are not forked here")

LOOK = """
import atexit, os, signal, sys, threading
print(__name__, sys.argv[1:], os.getcwd(), os.environ.get("OF_THIS_TEST"), "HOME" in os.environ)
print(threading.current_thread() is threading.main_thread(), os.getsid(0) == os.getpid())
print([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == [signal.SIG_DFL, signal.default_int_handler])
atexit.register(print, "at exit")
threading.Thread(target=lambda: print("thread", flush=True)).start()
sys.exit("an error")
"""


def test_a_forked_process_is_like_a_started_one(tmp_path):
    (tmp_path / "look.py").write_text(LOOK)
    variables = {"OF_THIS_TEST": "1"}
    runs = [
        run_python(tmp_path, *args, "a", "b", check=1, variables=variables, fresh=fresh)
        for args in (("look.py",), ("-c", LOOK))
        for fresh in (False, True)
    ]
    assert len({(run.stdout, run.stderr) for run in runs}) == 1
    assert runs[0].stderr == "an error\n"
    assert "OF_THIS_TEST" not in os.environ


@pytest.mark.parametrize(
    "code", ["import os; os._exit(75)", "1 / 0", "raise KeyboardInterrupt", "import sys; sys.exit()"]
)
def test_exit_codes_and_tracebacks(tmp_path, code):
    forked, started = (run_python(tmp_path, "-c", code, check=None, fresh=fresh) for fresh in (False, True))
    assert forked.returncode == started.returncode
    assert forked.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]


def test_signals_and_timeouts(tmp_path):
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = start_python(tmp_path, "-c", "import time; time.sleep(600)")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(60) == process.poll() == -number
    with pytest.raises(subprocess.TimeoutExpired):
        run_python(tmp_path, "-c", "import time; time.sleep(600)", timeout=0.1)


RANK = """
import os, signal, sys
import torch, torch.distributed as dist
from fcmae import distributed
world = distributed.connect("cpu")
total = world.sum(torch.tensor(world.rank + 1))
if world.rank == 0:
    print(world.size, int(total), os.getppid() == os.getpgid(0))
distributed.disconnect()
if sys.argv[1] == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
    print("ready", flush=True)
    signal.pause()
if world.rank == 1:
    sys.exit(int(sys.argv[1]))
if sys.argv[1] != "0":
    signal.pause()
"""


def test_ranks_meet_and_end_together(tmp_path):
    """When one fails, the others are asked to end; the launcher's exit code is 1, as torchrun's."""
    assert run_python(tmp_path, "-c", RANK, "0", ranks=3).stdout == "3 6 True\n"
    run_python(tmp_path, "-c", RANK, "75", ranks=2, check=1)


def test_a_signal_for_the_launcher_reaches_its_ranks(tmp_path):
    with (tmp_path / "out").open("w") as out:
        process = start_python(tmp_path, "-c", RANK, "wait", ranks=2, stdout=out)
    while (tmp_path / "out").read_text().count("ready") < 2:
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0


def test_a_module_is_main_once(tmp_path):
    code = "import sys; print(__name__, 'shown' in sys.modules, sys.argv[1:])"
    (tmp_path / "shown.py").write_text(code)
    for fresh in (False, True):
        assert run_python(tmp_path, "-m", "shown", "x", fresh=fresh).stdout == "__main__ False ['x']\n"
    assert sys.modules.get("shown") is None
