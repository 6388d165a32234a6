"""torchrun elastic: three agents on this host; one is killed, another takes its place; then all are asked to stop."""

import contextlib
import json
import signal
import socket
from pathlib import Path

import pytest

from tests.conftest import start_python
from tests.faults.runs import COMMANDS, FULL_FORM, finish, kill_group, steps, wait_until
from tests.pace import limit
from tests.results import metrics_of

ELASTIC = ("--nnodes=1:3", "--nproc-per-node=1", "--max-restarts=10", "--rdzv-backend=c10d", "--rdzv-id=run")
QUICK = "--rdzv-conf=last_call_timeout=30,keep_alive_interval=1,keep_alive_max_attempt=3"
"""Seconds until those who are there start without others, as by default; and until one is given up, 15 by default."""


def agent(folder, port, *args):
    launcher = ("-m", "fcmae.torchrun", *ELASTIC, QUICK, f"--rdzv-endpoint=127.0.0.1:{port}")
    variables = {"PACE": "0.2", "PYTHONPATH": str(Path(__file__).parents[2])}
    with (folder / "stderr.txt").open("ab") as log:
        return start_python(folder, *launcher, "-m", "tests.paced", *args, fresh=True, stderr=log, variables=variables)


def listens(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def ranks(folder):
    """Of each start of the run, in order."""
    events = folder / "run" / "events.jsonl"
    lines = map(json.loads, events.read_text().splitlines()) if events.exists() else ()
    return [line["ranks"] for line in lines if "ranks" in line]


@FULL_FORM
@pytest.mark.timeout(900)
def test_an_agent_is_killed_and_another_joins(tmp_path, reference):
    """Losses are those of one rank, to 1e-6 relative, and so are the samples that they come from."""
    args = (*COMMANDS["pretrain"], "hydra.run.dir=run", "trainer.log_every=1", "trainer.device=cpu")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    agents = [agent(tmp_path, port, *args)]
    try:
        wait_until(lambda: listens(port), 300)  # where they meet; without it the others would end
        agents += [agent(tmp_path, port, *args) for _ in range(2)]
        wait_until(lambda: ranks(tmp_path) == [3] and max(steps(tmp_path / "run"), default=0) >= 5, 300)
        agents[2].kill()
        agents[2].wait()
        wait_until(lambda: ranks(tmp_path)[-1] == 2, 300)
        before = max(steps(tmp_path / "run"))
        wait_until(lambda: max(steps(tmp_path / "run")) >= before + 5, 300)
        agents[2] = agent(tmp_path, port, *args)
        wait_until(lambda: ranks(tmp_path)[-1] == 3, 300)
        before = max(steps(tmp_path / "run"))
        wait_until(lambda: max(steps(tmp_path / "run")) >= before + 5, 300)
        for one in agents:
            one.send_signal(signal.SIGTERM)
        assert [one.wait(limit(120)) for one in agents] == [75] * 3, (tmp_path / "stderr.txt").read_text()
    finally:
        for one in agents:
            kill_group(one)
    finish(tmp_path, *args)
    losses = [{}, {}]
    for found, run_dir in zip(losses, (tmp_path / "run", reference("pretrain", 1)), strict=True):
        for line in metrics_of(run_dir):
            if "loss" in line:
                found[line["step"]] = line["loss"]
    assert len(losses[0]) == 120
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
