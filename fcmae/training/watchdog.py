"""Ends a run that hangs, and leaves the Python stacks of every rank."""

import faulthandler
import itertools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from fcmae.files import delete_strays
from fcmae.opening import open_to_append
from fcmae.processes import Process, is_stopped

DUMP = getattr(signal, "SIGURG", None)
"""Asks a rank for its stacks; a process without a handler ignores it."""


KEPT = 4
"""Files of stacks to keep of earlier processes of a rank."""


class Watchdog:
    """Ends the process with exit code 1 if nothing was finished for ``timeout`` seconds, whatever it hangs in.

    Every rank has one, and writes its stacks to ``stacks_rank{R}.txt``; those of earlier processes are kept as
    ``stacks_rank{R}.txt.1`` (the newest of them) and so on. A thread does this; if it cannot run either,
    because something holds the interpreter's lock, a timer of :mod:`faulthandler`, which needs no lock, does so a
    little later. The first one to bite also makes the other ranks of its machine write theirs: its end may end them.

    A rank that was itself stopped (SIGSTOP) can do nothing, and a launcher would wait for it. So the others end it.

    Args:
        siblings: the other ranks of this machine.
    """

    GRACE = 1.0
    """Seconds that the other ranks, and an error already on its way, have before the process ends."""

    def __init__(self, timeout: float, run_dir: Path, rank: int, siblings: Mapping[int, Process] | None = None) -> None:
        self.timeout = timeout
        self.path = run_dir / f"stacks_rank{rank}.txt"
        self.rank = rank
        self.siblings = siblings or {}
        run_dir.mkdir(parents=True, exist_ok=True)
        _keep_earlier(self.path)
        self._file = open_to_append(self.path)
        self._closed = threading.Event()
        self._armed = -math.inf
        if DUMP is not None:
            faulthandler.register(DUMP, self._file)
        self.beat()
        threading.Thread(target=self._watch, name="fcmae-watchdog", daemon=True).start()

    def beat(self) -> None:
        """Call when something was finished: a step, a batch of an evaluation, a part of a save."""
        self._last = time.monotonic()
        if self._last - self._armed > self.GRACE / 2:  # it starts a thread each time, and a save beats for each tensor
            self._armed = self._last
            faulthandler.dump_traceback_later(self.timeout + 2.5 * self.GRACE, exit=True, file=self._file)

    def close(self) -> None:
        """Stops watching; a file without stacks is deleted."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        if DUMP is not None:
            faulthandler.unregister(DUMP)
        self._file.close()
        if self.path.is_file() and self.path.stat().st_size == 0:
            self.path.unlink()

    def _watch(self) -> None:
        while not self._closed.wait(max(0.0, self._last + self.timeout - time.monotonic())):
            if time.monotonic() - self._last >= self.timeout:
                self._bite()

    def _bite(self) -> None:
        try:
            time.sleep(self.GRACE / 10)
            if self._is_empty(self.rank):  # one that was stopped was asked for its stacks, and is awake a moment only
                faulthandler.dump_traceback(self._file)
            stopped = {rank: process for rank, process in self.siblings.items() if is_stopped(process.pid)}
            self._say(stopped)
            for rank in stopped:
                self._ask_for_stacks(rank)
            time.sleep(self.GRACE / 2)
            for rank in self.siblings:
                self._ask_for_stacks(rank)
            time.sleep(self.GRACE / 2)
            for process in stopped.values():
                process.send(signal.SIGKILL)
            delete_strays(self.path.parent, [Process.this(), *stopped.values()])
        finally:  # an error, such as a closed stderr, must not keep it from ending
            os._exit(1)

    def _ask_for_stacks(self, rank: int) -> None:
        """Makes another rank of this machine write its stacks, unless it has: two at once would garble the file."""
        if DUMP is not None and self._is_empty(rank):
            self.siblings[rank].send(DUMP)
        self.siblings[rank].send(signal.SIGCONT)

    def _is_empty(self, rank: int) -> bool:
        path = self.path.with_name(f"stacks_rank{rank}.txt")
        return path.is_file() and path.stat().st_size == 0

    def _say(self, stopped: Mapping[int, Process]) -> None:
        named = "".join(f"; rank {rank} (process {process.pid}) was stopped" for rank, process in stopped.items())
        print(
            f"rank {self.rank}: no step was finished for {self.timeout:g} s (trainer.hang_timeout){named}; "
            f"the stacks are in {self.path}",
            file=sys.stderr,
            flush=True,
        )


def _keep_earlier(path: Path) -> None:
    """Numbers the stacks that an earlier process left, so that a resumed run does not overwrite them."""
    if not path.is_file() or path.stat().st_size == 0:
        return
    names = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, KEPT + 1))]
    for newer, older in reversed(list(itertools.pairwise(names))):
        if newer.exists():
            newer.replace(older)
