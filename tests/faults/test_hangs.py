"""Rows 7 to 10: numbers that are not, data workers and ranks that die or stop, a busy port."""

import json
import os
import re
import signal
import socket
import time

import pytest

from fcmae.checkpoints.checkpoint import CheckpointDir
from tests.conftest import run_python
from tests.faults.runs import (
    COMMANDS,
    SHORT,
    TINY,
    children,
    finish,
    kill_group,
    start,
    steps,
    wait_until,
)
from tests.pace import limit


@pytest.fixture(scope="module")
def timeout() -> int:
    """Seconds after which a run counts as hanging; its steps take hundredths of one."""
    return limit(6)


POISON = {
    "input": """
import fcmae.data.sources as s
read = s.Synthetic.__getitem__
def poisoned(self, i):
    sample = read(self, i)
    return s.Sample(sample.image.float() / (0 if i == 5 and RANK == 1 else 1), sample.label)
s.Synthetic.__getitem__ = poisoned
""",
    "activation": """
from fcmae.tasks.finetuning import Finetuning
from fcmae.tasks.pretraining import Pretraining
for task in (Pretraining, Finetuning):
    def poisoned(self, model, batch, weight=None, loss=task.loss):
        global calls
        calls += 1
        value, parts = loss(self, model, batch, weight)
        return value * (float("nan") if calls == 8 and RANK == 1 else 1), parts
    task.loss = poisoned
""",
    "gradient": """
import torch, fcmae.training.loop as loop
exchange = loop.create_exchange
def poisoned(kind, model, size):
    def hook(grad):
        global calls
        calls += 1
        return grad * float("nan") if calls == 8 and RANK == 1 else grad
    next(p for p in model.parameters() if p.ndim == 4).register_hook(hook)
    return exchange(kind, model, size)
loop.create_exchange = poisoned
""",
}


def poisoned(folder, kind):
    script = folder / "poisoned.py"
    script.write_text(
        "import os, sys\nRANK, calls = int(os.environ['RANK']), 0\n"
        f"{POISON[kind]}\nfrom fcmae.cli import main\nsys.exit(main())\n"
    )
    return script


@pytest.mark.parametrize("command", ["pretrain"] if SHORT else ["pretrain", "finetune"])
@pytest.mark.parametrize("kind", list(POISON))
def test_not_a_number_on_one_rank(tmp_path, command, kind):
    args = (*COMMANDS[command], "hydra.run.dir=run", "trainer.log_every=1000")
    if kind == "input":
        args = (*args, "optim.global_batch_size=24")  # sample 5 is in every step, half the time on rank 1
    said = finish(tmp_path, *args, ranks=2, script=poisoned(tmp_path, kind), expect=1)
    assert "is not finite; the weights are those before it" in said
    run_dir = tmp_path / "run"
    (listed,) = run_dir.glob("nonfinite_step_*.json")
    step = json.loads(listed.read_text())["step"]
    assert {p.name for p in run_dir.glob("nonfinite_*.pt")} == {f"{listed.stem}_rank_{rank}.pt" for rank in (0, 1)}
    latest = CheckpointDir(run_dir).load_latest(pytest.fail)
    if latest is not None:
        assert latest["step"] <= step
        assert all(value.isfinite().all() for value in latest["model"].values())


def test_a_skipped_step(tmp_path):
    args = (*TINY["pretrain"], "hydra.run.dir=run", "trainer.on_nonfinite=skip")
    said = finish(tmp_path, *args, ranks=2, script=poisoned(tmp_path, "gradient"))
    assert "is not finite: skipped (1 so far)" in said
    assert '"skipped_steps": 1.0' in (tmp_path / "run" / "metrics.jsonl").read_text()
    refused = finish(
        tmp_path,
        *args[:-2],
        "hydra.run.dir=other",
        args[-1],
        "trainer.max_skipped=0",
        ranks=2,
        script=poisoned(tmp_path, "gradient"),
        expect=1,
    )
    assert "1 step skipped so far, trainer.max_skipped is 0" in refused


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("command", ["pretrain"] if SHORT else ["pretrain", "finetune"])
def test_a_data_worker_dies_or_stops(tmp_path, timeout, command, number):
    args = (*COMMANDS[command], "hydra.run.dir=run", "loader.workers=1", f"trainer.hang_timeout={timeout}")
    run = start(tmp_path, *args, "schedule.epochs=400")
    try:
        wait_until(lambda: max(steps(tmp_path / "run"), default=0) >= 5)
        (worker,) = children(run.pid)
        os.kill(worker, number)
        assert wait_until(lambda: run.poll() is not None) <= limit(5) + (timeout if number == signal.SIGSTOP else 0)
        assert run.returncode == 1
    finally:
        kill_group(run)
    said = (tmp_path / "stderr.txt").read_text()
    assert "Traceback" not in said
    if number == signal.SIGKILL:
        # torch notices it by a signal, by asking, or by what is missing, whichever comes first
        named = rf"DataLoader worker \(pid(\(s\))? {worker}\) (is killed by signal: Killed|exited unexpectedly)"
        assert re.search(rf"fcmae {command}: ({named}|a data worker died while it sent a batch)", said), said
    else:
        assert f"no step was finished for {timeout} s" in said
        assert "in train" in (tmp_path / "run" / "stacks_rank0.txt").read_text()


@pytest.mark.parametrize("command", ["pretrain"] if SHORT else ["pretrain", "finetune"])
def test_a_rank_stops(tmp_path, timeout, command):
    args = (*COMMANDS[command], "hydra.run.dir=run", f"trainer.hang_timeout={timeout}", "schedule.epochs=400")
    run = start(tmp_path, *args, ranks=2)
    try:
        wait_until(lambda: max(steps(tmp_path / "run"), default=0) >= 5)
        stopped = children(run.pid)[1]
        os.kill(stopped, signal.SIGSTOP)
        assert wait_until(lambda: run.poll() is not None) <= timeout + limit(35)
    finally:
        kill_group(run)
    said = (tmp_path / "stderr.txt").read_text()
    assert f"rank 0: no step was finished for {timeout} s" in said
    assert f"rank 1 (process {stopped}) was stopped" in said
    for rank in (0, 1):
        assert "in train" in (tmp_path / "run" / f"stacks_rank{rank}.txt").read_text()


LONELY = """
import os, sys
import fcmae.training.agree_to_stop as stop
import torch, torch.distributed as dist
after_step, calls = stop.StopAgreement.after_step, 0
def lonely(self, failed):
    global calls
    calls += 1
    if calls == 8 and self.world.rank == 1:
        dist.barrier()
    return after_step(self, failed)
stop.StopAgreement.after_step = lonely
from fcmae.cli import main
sys.exit(main())
"""


def test_a_collective_that_only_one_rank_enters(tmp_path, timeout):
    script = tmp_path / "lonely.py"
    script.write_text(LONELY)
    args = (*COMMANDS["pretrain"], "hydra.run.dir=run", f"trainer.hang_timeout={timeout}")
    began = time.monotonic()
    finish(tmp_path, *args, ranks=2, script=script, expect=1)
    assert time.monotonic() - began < timeout + limit(65)  # the start-up included
    for rank in (0, 1):
        assert "in train" in (tmp_path / "run" / f"stacks_rank{rank}.txt").read_text()


def test_a_busy_rendezvous_port(tmp_path):
    """A port that is given and busy is a clear error; without one, a free port is found (all other tests)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", port)
        began = time.monotonic()
        done = run_python(tmp_path, *launcher, "-m", "fcmae.cli", *COMMANDS["pretrain"], check=1)
    assert time.monotonic() - began <= limit(10)
    assert "address already in use" in done.stderr
