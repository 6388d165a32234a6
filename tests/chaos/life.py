"""One process of a job, or one launch of ranks, from its start to its end; and what must be true of it."""

import contextlib
import mmap
import os
import random
import re
import signal
import struct
import time
from pathlib import Path

from tests.chaos.jobs import Job
from tests.chaos.network import Network
from tests.conftest import start_python
from tests.faults.runs import Run, processes, steps

CONTROL = struct.Struct("<qii240s")
"""Of disturb.c."""
PACE = "0.02"
PATIENCE = 400.0
"""Seconds until a job that neither ends nor hangs is a failure, on a busy machine as well."""
NOT_ENDS = re.compile(r"stops as soon as it can|waiting for another process")
BAD = re.compile(r"Traceback|Fatal Python error|Exception ignored|terminate called|core dumped")


class Failure(Exception):
    """Something that must hold does not."""


class Life:
    """A started job.

    Args:
        network: of the ranks, if they are several.
    """

    def __init__(self, job: Job, folder: Path, ranks: int, network: Network | None) -> None:
        self.job, self.folder, self.ranks = job, folder, ranks
        self.network = network if ranks > 1 else None
        self.begun = time.monotonic()
        self.steps_before = max(steps(folder / "disk" / "run"), default=0)
        self.log = folder / "stderr.txt"
        self.said_before = self.log.stat().st_size if self.log.exists() else 0
        self.killed_all = False
        """Whether SIGKILL ended it or one of its ranks, about which only a launcher can say something."""
        path = folder / "control"
        path.write_bytes(CONTROL.pack(0, 0, 0, os.fsencode(folder / "disk")))
        with path.open("r+b") as file:
            self._control = mmap.mmap(file.fileno(), CONTROL.size)
        variables = {"DISTURB": str(path), "PACE": PACE, "TMPDIR": str(folder / "tmp")}
        (folder / "tmp").mkdir(exist_ok=True)
        if self.network is not None:
            variables |= self.network.variables()
        with self.log.open("ab") as log:
            program = ("-m", "tests.chaos.rank", *job.args)
            self.run: Run = start_python(folder, *program, ranks=ranks, stderr=log, variables=variables)

    def disturb(self, *, clock: float = 0.0, full: bool = False, delay: float = 0.0) -> None:
        """Seconds that the clock is wrong by, whether the disk is full, and seconds per read or write."""
        values = CONTROL.pack(int(clock * 1e9), int(full), int(delay * 1e6), os.fsencode(self.folder / "disk"))
        self._control[:] = values

    @property
    def is_over(self) -> bool:
        return self.run.poll() is not None

    @property
    def step(self) -> int:
        """Steps that were logged since the start; 0 for a command without."""
        return max(steps(self.folder / "disk" / "run"), default=0) - self.steps_before

    def pids(self) -> list[int]:
        """All processes of this life, the launcher or only process first."""
        found = [pid for pid, _ in processes(self.folder)]
        return sorted(found, key=lambda pid: (pid != self.run.pid, pid))

    def until_struck(self, rng: random.Random) -> bool:
        """Waits for a random moment: some time, some steps, or a file that is being written. False if it ended."""
        kind = rng.choice(("time", "time", "step", "write"))
        aim, late = rng.randint(1, 12), time.monotonic() + rng.uniform(0.05, 3.0)
        while not self.is_over:
            over = time.monotonic() > late + (0 if kind == "time" else 5)
            if over or (kind == "step" and self.step >= aim):
                return True
            if kind == "write" and any((self.folder / "disk").rglob("*.tmp")):
                return True
            time.sleep(0.02)
        return False

    def end(self) -> int:
        """Waits for the end, and returns the exit code."""
        deadline = time.monotonic() + PATIENCE
        while not self.is_over:
            if time.monotonic() > deadline:
                raise Failure(f"still runs after {PATIENCE:g} s")
            time.sleep(0.02)
        code = self.run.wait()
        while left := self.pids():
            if time.monotonic() > deadline:
                raise Failure(f"exit code {code}, and processes are left: {list(processes(self.folder))}")
            time.sleep(0.05 if left else 0)
        self._control.close()
        return code

    def said(self) -> str:
        """What it wrote to stderr."""
        return self.log.read_bytes()[self.said_before :].decode(errors="replace")

    def end_of_said(self) -> str:
        lines = [line for line in self.said().splitlines() if not line.startswith("  File")]
        return "\n".join(line[:300] for line in lines[-12:])

    def check_told(self, code: int) -> list[str]:
        """Raises Failure unless an early end is told in a line. Returns the lines that tell of it."""
        said = self.said()
        found = BAD.search(said) or (
            not self.killed_all and re.search("leaked", said)
        )  # Python's tracker, after SIGKILL
        if found:
            raise Failure(f"exit code {code}; says {found[0]!r}")
        ours = re.compile(rf"(fcmae {self.job.command}|rank \d+): ")
        lines = [line for line in said.splitlines() if ours.match(line) and not NOT_ENDS.search(line)]
        if code == 0:
            return []
        if not lines and not self.killed_all:
            raise Failure(f"exit code {code} without a line that says why")
        return lines

    def kill(self) -> None:
        """Ends what a failure left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.run.pid, signal.SIGKILL)
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
