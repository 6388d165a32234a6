"""Real runs in processes of their own, to be disturbed; and what must be true of them afterwards."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN

SHORT = os.environ.get("FAULTS", "full") == "short"
FULL_FORM = pytest.mark.skipif(SHORT, reason="only in the full form, make faults")
LONGER = ("schedule.epochs=40", "trainer.eval_every_epochs=40", "trainer.log_every=5")
"""120 steps of pretraining, a checkpoint every three: about two seconds after the start-up."""
TINY = {"pretrain": TINY_PRETRAIN, "finetune": TINY_FINETUNE}
COMMANDS = {command: (*tiny, *LONGER) for command, tiny in TINY.items()}
MARK = "FCMAE_FAULT_TEST"
"""Environment variable that marks every process of a test."""


def side_by_side(test: Callable[..., None], cases: Sequence[tuple[str, ...]], folder: Path) -> None:
    """``test(OWN_FOLDER, *case)`` for every case, two at a time: a run of one rank keeps one core busy."""

    def one(case: tuple[str, ...]) -> None:
        own = folder / "-".join(case).replace(" ", "_")
        own.mkdir()
        test(own, *case)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, cases))


def start(
    folder: Path, *args: str, ranks: int = 1, script: Path | None = None, variables: dict[str, str] | None = None
) -> subprocess.Popen:
    """Starts ``fcmae ARGS`` (or a script that ends up there) under torchrun for several ranks; stderr goes to a file.

    The process leads a group of its own.
    """
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launcher += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"]
    program = [str(script)] if script else ["-m", "fcmae.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", MARK: str(folder), **(variables or {})}
    with (folder / "stderr.txt").open("ab") as log:
        return subprocess.Popen(
            [*launcher, *program, *args],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )


def finish(folder: Path, *args: str, expect: int | None = 0, timeout: float = 240, **kwargs) -> str:
    """Runs ``fcmae ARGS`` to its end and returns what it wrote to stderr."""
    (folder / "stderr.txt").unlink(missing_ok=True)
    run = start(folder, *args, **kwargs)
    code = run.wait(timeout)
    said = (folder / "stderr.txt").read_text()
    assert expect is None or code == expect, f"exit code {code}\n{said}"
    return said


def processes(folder: Path) -> Iterator[tuple[int, str]]:
    """Process id and command line of every living process started in a folder or below."""
    mark = f"{MARK}={folder}/".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                variables = (entry / "environ").read_bytes().split(b"\0") if alive else []
                if any((variable + b"/").startswith(mark) for variable in variables):
                    yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue


def ranks_of(folder: Path) -> list[int]:
    """The training processes that torchrun started, rank 0 first. Their data workers have a rank's environment too."""
    ranks = {pid: _rank(pid) for pid, _ in processes(folder)}
    started = [pid for pid, rank in ranks.items() if rank is not None and ranks.get(parent(pid)) is None]
    return sorted(started, key=lambda pid: ranks[pid] or 0)


def _rank(pid: int) -> int | None:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(v[5:]) for v in variables if v.startswith(b"RANK=")), None)


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def children(pid: int, folder: Path) -> list[int]:
    """Living child processes."""
    return [child for child, _ in processes(folder) if parent(child) == pid]


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> float:
    """Waits, and returns for how long."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "waited in vain"
        time.sleep(0.02)
    return time.monotonic() - begin


def steps(run_dir: Path) -> list[int]:
    """Steps of the whole lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line)["step"])
        except ValueError:
            continue
    return found


def weights_sha256(run_dir: Path) -> str:
    """Of the weights in the newest checkpoint, name by name."""
    state = torch.load(sorted((run_dir / "checkpoints").iterdir())[-1], weights_only=True)
    digest = hashlib.sha256()
    for name, value in sorted(state["model"].items()):
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def kill_group(run: subprocess.Popen) -> None:
    """Ends what a failed test left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
