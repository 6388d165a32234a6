"""One run directory, one run."""

import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from fcmae.errors import UsageError

try:
    import fcntl
except ImportError:  # not a POSIX system: a run directory is not guarded
    fcntl = None  # type: ignore[assignment]


class RunLock:
    """``run.lock`` in a run directory, locked by the run's first rank and naming it: host, process, start.

    The kernel releases the lock with its holder, however that ends, so a dead holder's lock is free. It is a POSIX
    record lock: data workers do not inherit it, and it works over NFS.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "run.lock"
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Takes the lock. Raises UsageError naming the holder if another process has it."""
        if fcntl is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while self._file is None:
            file = self.path.open("a+")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = _holder(file)
                file.close()
                raise UsageError(f"{self.path.parent} is in use by another run ({holder})") from error
            if _is_at(file, self.path):
                self._file = file
            else:  # its holder ended, and deleted it, after we opened it
                file.close()
        self._file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        json.dump({"host": socket.gethostname(), "pid": os.getpid(), "started": started}, self._file)
        self._file.flush()

    def close(self) -> None:
        """Deletes the file and gives the lock back, if this process has it."""
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        told = json.load(file)
        return f"host {told['host']}, process {told['pid']}, started {told['started']}"
    except (ValueError, KeyError):
        return "it has not said which"


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
