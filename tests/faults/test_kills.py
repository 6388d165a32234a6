"""Rows 1 and 2: SIGKILL at any time, and at every operation of a save."""

import os
import random
import signal

import pytest

from fcmae.checkpoints import checkpoint
from tests.conftest import run_python
from tests.faults.runs import (
    COMMANDS,
    SHORT,
    STEPS,
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
from tests.results import weights_sha256 as sha256


def kill_one(folder, args, rng, what, aim):
    """Starts or resumes a run of two ranks, and kills one of its processes when it has done ``aim`` steps."""
    run = start(folder, *args, ranks=2, fresh=what == "torchrun")
    try:
        wait_until(lambda: max(steps(folder / "run"), default=0) >= aim or run.poll() is not None)
        assert run.poll() is None, (folder / "stderr.txt").read_text()
        ranks = children(run.pid)
        victims = {"rank": ranks, "worker": children(rng.choice(ranks))}
        os.kill(rng.choice(victims.get(what, [run.pid])), signal.SIGKILL)
        run.wait(limit(60))
        wait_until(lambda: not list(processes(folder)), 20)
    finally:
        kill_group(run)


RUNS_AND_KILLS = {"pretrain": 5, "finetune": 3} if SHORT else {"pretrain": 13, "pretrain again": 13, "finetune": 9}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "kills"), RUNS_AND_KILLS.items())
def test_killed_at_random_and_resumed_equals_undisturbed(tmp_path, undisturbed, name, kills):
    """Launcher, rank or data worker by turns, each kill some steps after the last checkpoint.

    The first launcher is torchrun itself, which takes seconds to start: in the short form in test_torchrun_itself.
    """
    command, rng = name.split()[0], random.Random(name)
    run_dir = tmp_path / "run"
    args = (*COMMANDS[command], "hydra.run.dir=run", "loader.workers=1", "trainer.log_every=1")
    reached = 0
    for kill in range(kills):
        aim = min(reached + rng.randint(1, STEPS // kills), STEPS - 2)
        what = ("launcher", "rank", "worker")[kill % 3]
        if kill == 0 and not SHORT:
            what = "torchrun"
        kill_one(tmp_path, args, rng, what, aim)
        reached = max(steps(run_dir))
        saved = checkpoint.step_of(checkpoint.CheckpointDir(run_dir).paths()[-1]) if reached > 6 else 0
        assert reached - saved <= 6, "more than a checkpoint interval and the save under way is lost"
    finish(tmp_path, *args, ranks=2)
    assert sha256(run_dir) == undisturbed(command, 2)


SAVE_AND_DIE = """
import gc, os, signal, sys
from pathlib import Path
import torch
from fcmae.checkpoints import checkpoint

def deadly(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def save_four_times(name):
    checkpoints = checkpoint.CheckpointDir(Path(sys.argv[1], name), keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save({"step": step, "model": {f"w{i}": torch.full((3000,), float(step)) for i in range(3)}})

checkpoint.HashingWriter.write = deadly(checkpoint.HashingWriter.write)
os.fsync = deadly(os.fsync)
Path.replace = deadly(Path.replace)
Path.unlink = deadly(Path.unlink)
fatal, calls = 0, 0
save_four_times("0")  # imports everything, for the processes that are forked
codes, points = [], calls
gc.freeze()
for fatal in range(1, points + 1):
    calls = 0
    child = os.fork()
    if not child:
        save_four_times(str(fatal))
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(*codes)
"""


@pytest.mark.timeout(1800)
def test_killed_at_each_operation_of_a_save(tmp_path):
    """Four saves, of which the last two also delete; one SIGKILL before each operation in turn."""
    codes = run_python(tmp_path, "-c", SAVE_AND_DIE, str(tmp_path)).stdout.split()
    calls = len(codes)
    assert calls >= 50
    assert set(map(int, codes)) == {-signal.SIGKILL}
    for fatal in range(1, calls + 1):
        checkpoints = checkpoint.CheckpointDir(tmp_path / str(fatal))
        checkpoints.sweep()
        state = checkpoints.load_latest(pytest.fail)  # none is damaged, so none is reported
        if fatal > calls // 4:
            assert state is not None
        if state is not None:
            assert all(value.eq(state["step"]).all() for value in state["model"].values())


DIE_IN_A_SAVE = """
import os, signal, sys
from pathlib import Path
from fcmae import interrupt
interrupt.install()
from fcmae.checkpoints import checkpoint

fatal, calls, saves = float(os.environ["FATAL"]), 0, 0

def deadly(owner, name):
    function = getattr(owner, name)
    def call(*args, **kwargs):
        global calls
        if saves == 2:
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(owner, name, call)

def counted(self, state, *args, save=checkpoint.CheckpointDir.save, **kwargs):
    global saves
    saves += 1
    path = save(self, state, *args, **kwargs)
    if saves == 2:
        Path("calls").write_text(str(calls))
    return path

checkpoint.CheckpointDir.save = counted
for owner, name in ((checkpoint.HashingWriter, "write"), (os, "fsync"), (Path, "replace"), (Path, "unlink")):
    deadly(owner, name)
from fcmae.cli import main
sys.exit(main())
"""


@pytest.mark.timeout(1800)
def test_the_real_command_killed_in_its_saves(tmp_path, undisturbed):
    """The second save of each process is its last, killed before another operation each time; the rest is resumed.

    The weights of the end are those of an undisturbed run.
    """
    points = 4 if SHORT else 25

    def kill_at_each_point(folder, command):
        script = folder / "dies.py"
        script.write_text(DIE_IN_A_SAVE)
        args = (*COMMANDS[command], "hydra.run.dir=run", "trainer.checkpoint_every_epochs=0.3")
        finish(folder, *args, "trainer.max_steps=5", script=script, variables={"FATAL": "nan"}, expect=75)
        calls = int((folder / "calls").read_text())
        last = 6  # fsync of the file, rename, fsync of the folder, deletions
        assert calls > points + last
        checkpoints = checkpoint.CheckpointDir(folder / "run")
        before = checkpoint.step_of(checkpoints.paths()[-1])
        writes = range(1, calls - last, (calls - last) // (points - last)) if points > last else ()
        fatal = [*writes, *range(calls - last, calls + 1)][-points:]
        for number in fatal:
            finish(folder, *args, script=script, variables={"FATAL": str(number)}, expect=-signal.SIGKILL)
            state = checkpoints.load_latest(pytest.fail)
            assert state is not None
            assert before + 1 <= state["step"] <= before + 2
            before = state["step"]
        finish(folder, *args)
        assert sha256(folder / "run") == undisturbed(command, 1)

    side_by_side(kill_at_each_point, [("pretrain",), ("finetune",)], tmp_path)
