"""Row 6: each stop signal at start-up, in a step and in a save, and three at once."""

import os
import signal
import time
from pathlib import Path

import pytest

from fcmae import interrupt
from fcmae.checkpoints import checkpoint
from tests.conftest import TORCHRUN, start_python
from tests.faults.runs import (
    COMMANDS,
    SHORT,
    catches,
    children,
    finish,
    kill_group,
    processes,
    side_by_side,
    start,
    steps,
    wait_until,
)
from tests.pace import limit
from tests.results import weights_sha256

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
        time.sleep(0.5)
    fsync(descriptor)
os.fsync = slow
from fcmae.cli import main
sys.exit(main())
"""


def stopped(folder, command, signals, when, **kwargs):
    """Starts a run and sends the signals when a condition holds: it ends with 75 within a minute."""
    run = start(folder, *COMMANDS[command], "trainer.log_every=1", "hydra.run.dir=run", **kwargs)
    try:
        when(run)
        for number in signals:
            run.send_signal(number)
        assert run.wait(limit(60)) == 75, (folder / "stderr.txt").read_text()
    finally:
        kill_group(run)


def at_start_up(run):
    """Waits until signals are noted, which is before anything else."""
    wait_until(lambda: catches(run.pid, signal.SIGUSR1))


def in_the_imports(run):
    at_start_up(run)
    wait_until(lambda: "libtorch_cpu" in Path(f"/proc/{run.pid}/maps").read_text())


def in_a_step(folder):
    before = max(steps(folder / "run"), default=0)
    return lambda run: wait_until(lambda: max(steps(folder / "run"), default=0) > before + 4)


@pytest.mark.timeout(900)
def test_each_signal_in_a_step_and_at_start_up(tmp_path, undisturbed):
    """In the short form each command gets two of them, and pretraining alone one in the imports."""

    def stop_often(folder, command):
        for number in (SIGNALS[:2] if command == "pretrain" else SIGNALS[2:]) if SHORT else SIGNALS:
            stopped(folder, command, [number], at_start_up)
            stopped(folder, command, [number], in_a_step(folder))
        for number in (SIGNALS[:1] if command == "pretrain" else ()) if SHORT else SIGNALS:
            stopped(folder, command, [number], in_the_imports, fresh=True)
        stopped(folder, command, SIGNALS[1:], in_a_step(folder))
        finish(folder, *COMMANDS[command], "hydra.run.dir=run")
        assert weights_sha256(folder / "run") == undisturbed(command, 1)

    side_by_side(stop_often, [("pretrain",), ("finetune",)], tmp_path)


@pytest.mark.timeout(900)
def test_signals_in_a_save(tmp_path, undisturbed):
    """Three signals while a save is under way, of which it takes no notice."""

    def stop_in_saves(folder, command):
        script = folder / "slow.py"
        script.write_text(SLOW_SAVE)
        for numbers in [SIGNALS[:3]] if SHORT else [SIGNALS[:3], *([number] for number in SIGNALS)]:
            (folder / "saving").unlink(missing_ok=True)
            stopped(folder, command, numbers, lambda _: wait_until((folder / "saving").exists), script=script)
        assert checkpoint.CheckpointDir(folder / "run").load_latest(pytest.fail) is not None
        finish(folder, *COMMANDS[command], "hydra.run.dir=run")
        assert weights_sha256(folder / "run") == undisturbed(command, 1)

    side_by_side(stop_in_saves, [("pretrain",), ("finetune",)], tmp_path)


@pytest.mark.timeout(900)
def test_two_ranks_stop_after_the_same_step(tmp_path, undisturbed):
    """Whether one of them is asked to, or torchrun, in the short form its stand-in: see test_torchrun_itself."""
    args = (*COMMANDS["pretrain"], "hydra.run.dir=run", "trainer.log_every=1")
    for target in ("one rank", "torchrun"):
        begun = in_a_step(tmp_path)
        run = start(tmp_path, *args, ranks=2, fresh=target == "torchrun" and not SHORT)
        try:
            begun(run)
            os.kill(children(run.pid)[1] if target == "one rank" else run.pid, signal.SIGUSR1)
            assert run.wait(limit(60)) == 1, target  # torchrun's exit code, whatever its ranks return
        finally:
            kill_group(run)
        said = (tmp_path / "stderr.txt").read_text()
        assert said.count("fcmae pretrain: stopped after step") == (1 if target == "one rank" else 2)
    finish(tmp_path, *args, ranks=2)
    assert weights_sha256(tmp_path / "run") == undisturbed("pretrain", 2)


RANK = """
import os, sys, time
from pathlib import Path
from fcmae import interrupt
interrupt.install()
Path(f"ready_{os.environ['RANK']}").touch()
while not interrupt.received():
    time.sleep(0.02)
print(interrupt.received(), file=sys.stderr)
sys.exit(75)
"""


def test_torchrun_itself(tmp_path):
    """It passes a signal on to its ranks; after SIGKILL they end with it. What training makes of either is elsewhere.

    Ranks that import no torch start at once.
    """
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    for number, code in ((signal.SIGUSR1, 1), (signal.SIGKILL, -9)):
        with (tmp_path / "stderr.txt").open("wb") as log:
            run = start_python(tmp_path, *TORCHRUN, "--nproc_per_node=2", str(script), stderr=log)
        try:
            wait_until(lambda: len(list(tmp_path.glob("ready_*"))) == 2)
            run.send_signal(number)
            assert run.wait(limit(60)) == code
            wait_until(lambda: not list(processes(tmp_path)), 20)
        finally:
            kill_group(run)
        said = (tmp_path / "stderr.txt").read_text().splitlines()
        assert said.count("SIGUSR1") == (2 if number == signal.SIGUSR1 else 0)
        for file in tmp_path.glob("ready_*"):
            file.unlink()


STUCK = """
import sys, time
from pathlib import Path
def stuck(*args, **kwargs):
    Path("reached").touch()
    time.sleep(3600)
{hook}
from fcmae.cli import main
sys.exit(main())
"""
HOOKS = {
    "imports": """
class Finder:
    find_spec = staticmethod(lambda name, *_: stuck() if name == "torch" else None)
sys.meta_path.insert(0, Finder)
""",
    "listing": "import fcmae.data.sources.listing as listing; listing._walk = stuck",
    "resume": "import fcmae.training.loop as loop; loop.newest_state = stuck",
    "compilation": "import os, torch._inductor.config as c; c.cpp.cxx = (None, os.path.abspath('compiler'))",
    "step": "import fcmae.training.loop as loop; loop.set_lr = stuck",
    "evaluation": "import fcmae.evaluation.classify as classify; classify.batches = stuck",
    "save": """
import os, threading
fsync = os.fsync
os.fsync = lambda file: stuck() if threading.current_thread().name == "fcmae-saver" else fsync(file)
""",
}
PHASES = [
    (command, phase)
    for phase in (("imports", "listing", "compilation") if SHORT else HOOKS)
    for command in (("finetune",) if phase == "evaluation" else ("pretrain",))
]


@pytest.mark.timeout(900)
def test_a_second_signal_ends_a_run_wherever_it_is(tmp_path):
    """The first is noted; without the second, these would stand still for an hour."""

    def end(folder, command, phase):
        script, compiler = folder / "stuck.py", folder / "compiler"
        script.write_text(STUCK.format(hook=HOOKS[phase]))
        compiler.write_text("#!/bin/sh\ntouch reached\nexec sleep 3600\n")
        compiler.chmod(0o755)
        own = {
            "listing": ("data.name=imagefolder", f"data.path={folder}"),
            "compilation": ("trainer.compile=true",),
            "step": ("loader.workers=2",),
        }
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        args = (*COMMANDS[command], "hydra.run.dir=run", *own.get(phase, ()))
        run = start(folder, *args, script=script, variables=variables, fresh=phase == "imports")
        try:
            wait_until((folder / "reached").exists)
            run.send_signal(signal.SIGINT)
            wait_until(lambda: "SIGINT: stops as soon as it can" in (folder / "stderr.txt").read_text())
            time.sleep(1.2 * interrupt.DOUBLED)
            run.send_signal(signal.SIGINT)
            assert run.wait(limit(60)) == 130
        finally:
            kill_group(run)
        said = (folder / "stderr.txt").read_text()
        assert said.endswith(f"fcmae {command}: ended at once by a second SIGINT; nothing more was saved\n")
        assert "Traceback" not in said
        for path in folder.rglob("*.tmp"):  # of the save; the next run deletes it
            assert phase == "save"
            path.unlink()

    side_by_side(end, PHASES, tmp_path)
