"""Real runs in processes of their own, to be disturbed; and what must be true of them afterwards."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import preloaded
from tests.conftest import TINY_FINETUNE, TINY_PRETRAIN, start_python
from tests.pace import limit

Run = subprocess.Popen | preloaded.Process

SHORT = os.environ.get("FAULTS", "full") == "short"
FULL_FORM = pytest.mark.skipif(SHORT, reason="only in the full form, make faults")
EPOCHS = 24 if SHORT else 40
STEPS = 3 * EPOCHS
LONGER = (f"schedule.epochs={EPOCHS}", f"trainer.eval_every_epochs={EPOCHS}", "trainer.log_every=5")
"""A checkpoint every three steps: one to two seconds after the start-up."""
TINY = {"pretrain": TINY_PRETRAIN, "finetune": TINY_FINETUNE}
COMMANDS = {command: (*tiny, *LONGER) for command, tiny in TINY.items()}


def side_by_side(test: Callable[..., None], cases: Sequence[tuple[str, ...]], folder: Path) -> None:
    """``test(OWN_FOLDER, *case)`` for every case, two at a time: a run of one rank keeps one core busy."""

    def one(case: tuple[str, ...]) -> None:
        own = folder / "-".join(case).replace(" ", "_")
        own.mkdir()
        test(own, *case)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, cases))


def start(folder: Path, *args: str, script: Path | None = None, **kwargs) -> Run:
    """Starts ``fcmae ARGS`` (or a script that ends up there) as ``start_python`` does; stderr goes to a file."""
    program = [str(script)] if script else ["-m", "fcmae.cli"]
    with (folder / "stderr.txt").open("ab") as log:
        return start_python(folder, *program, *args, stderr=log, **kwargs)


def finish(folder: Path, *args: str, expect: int | None = 0, **kwargs) -> str:
    """Runs ``fcmae ARGS`` to its end and returns what it wrote to stderr."""
    (folder / "stderr.txt").unlink(missing_ok=True)
    code = start(folder, *args, **kwargs).wait(limit(240))
    said = (folder / "stderr.txt").read_text()
    assert expect is None or code == expect, f"exit code {code}\n{said}"
    return said


def processes(folder: Path) -> Iterator[tuple[int, str]]:
    """Process id and command line of every living process that works in a folder or below."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                if alive and Path(os.readlink(entry / "cwd")).is_relative_to(folder):
                    yield int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue


def children(pid: int) -> list[int]:
    """Living child processes, the oldest first. Those of a launcher are its ranks, rank 0 first."""
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in lists for child in file.read_text().split()]


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    (caught,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (number - 1) & 1)


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> float:
    """Waits, on a slow machine longer, and returns for how long."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds or time.monotonic() - begin < limit(seconds), "waited in vain"
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


def kill_group(run: Run) -> None:
    """Ends what a failed test left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
