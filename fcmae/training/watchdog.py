"""A run that stands still ends, and leaves the Python stacks of every rank."""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path


class Watchdog:
    """Ends the process with exit code 1 if nothing was finished for ``timeout`` seconds, whatever it hangs in.

    Every rank has one. They stand still together, so each writes its stacks to ``stacks_rank{R}.txt`` before one that
    ended can take the others along. A thread does this; if it cannot run either, because something holds the
    interpreter's lock, a timer of :mod:`faulthandler`, which needs no lock, does so a little later.
    """

    GRACE = 1.0
    """Seconds that the other ranks, and an error already on its way, have before the process ends."""

    def __init__(self, timeout: float, run_dir: Path, rank: int) -> None:
        self.timeout = timeout
        self.path = run_dir / f"stacks_rank{rank}.txt"
        self.rank = rank
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w")
        self._closed = threading.Event()
        self.beat()
        threading.Thread(target=self._watch, name="fcmae-watchdog", daemon=True).start()

    def beat(self) -> None:
        """Something was finished: a step, an evaluation, a save."""
        self._last = time.monotonic()
        faulthandler.dump_traceback_later(self.timeout + 2 * self.GRACE, exit=True, file=self._file)

    def close(self) -> None:
        """Stops watching; a file without stacks is deleted."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self.path.is_file() and self.path.stat().st_size == 0:
            self.path.unlink()

    def _watch(self) -> None:
        while not self._closed.wait(max(0.0, self._last + self.timeout - time.monotonic())):
            if time.monotonic() - self._last >= self.timeout:
                self._bite()

    def _bite(self) -> None:
        faulthandler.dump_traceback(self._file)
        self._file.flush()
        print(
            f"rank {self.rank}: no step was finished for {self.timeout:g} s (trainer.hang_timeout); "
            f"the stacks are in {self.path}",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(self.GRACE)
        os._exit(1)
