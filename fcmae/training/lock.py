"""One run directory, one run."""

import errno
import json
import os
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from fcmae.errors import UsageError
from fcmae.opening import open_regular, open_to_change
from fcmae.processes import Process

try:
    import fcntl
except ImportError:  # not a POSIX system: a run directory is not guarded
    fcntl = None  # type: ignore[assignment]

HELD = (errno.EACCES, errno.EAGAIN)
"""What locking fails with if another process has the lock. Anything else: this file system has no locks."""
MAX_BYTES = 4096
STARTED = time.strftime("%Y-%m-%d %H:%M:%S")


class RunLock:
    """``run.lock`` in a run directory, locked by the run's first rank and naming it: host, process, start.

    The kernel releases the lock with its holder, however that ends, so a dead holder's lock is free. It is a POSIX
    record lock: data workers do not inherit it, and it works over NFS. On a file system without locks the holder counts
    in the file; a file in which nobody counts any more is free.
    """

    BEAT = 5.0
    """Seconds between two counts. A holder on another machine is taken for dead after three without one."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "run.lock"
        self._file: IO[bytes] | None = None
        self._closed = threading.Event()

    def acquire(self) -> None:
        """Takes the lock. Raises UsageError naming the holder if another process has it."""
        if fcntl is None:
            return
        while self._file is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                file = open_to_change(self.path)
            except OSError as error:
                raise UsageError(f"{self.path} cannot be written: {error.strerror}") from error
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in HELD:
                    self._refuse(file)
                self._wait_for_a_free_file(file)
                self._file = file
                threading.Thread(target=self._keep_counting, name="fcmae-lock", daemon=True).start()
                continue
            if _is_at(file, self.path):
                self._file = file
            else:  # its holder ended, and deleted it, after we opened it
                file.close()
        _write(self._file, _this())

    def close(self) -> None:
        """Deletes the file and gives the lock back, if this process has it."""
        self._closed.set()
        if self._file is not None:
            self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _refuse(self, file: IO[bytes]) -> None:
        told = _read(file)
        holder = f"host {told['host']}, process {told['pid']}, started {told['started']}" if told else "not yet named"
        file.close()
        raise UsageError(f"{self.path.parent} is in use by another run ({holder})")

    def _wait_for_a_free_file(self, file: IO[bytes]) -> None:
        """Without locks: raises UsageError if the holder that the file names is alive."""
        told = _read(file)
        if told is not None:
            holder = Process.told(told)
            if holder.is_here():
                if holder.is_alive():
                    self._refuse(file)
            elif self._is_counted_in(told):
                self._refuse(file)
        _write(file, _this())
        time.sleep(min(1.0, self.BEAT))  # two that found it free have both written by now, and one of them last
        told = self._read_anew()
        if told is None or told["pid"] != os.getpid() or told["place"] != _this()["place"]:
            self._refuse(file)

    def _is_counted_in(self, told: dict[str, Any]) -> bool:
        deadline = time.monotonic() + 3 * self.BEAT
        while time.monotonic() < deadline:
            time.sleep(self.BEAT / 5)
            if self._read_anew() != told:
                return True
        return False

    def _read_anew(self) -> dict[str, Any] | None:
        """NFS shows what others wrote to whoever opens a file after that."""
        with open_regular(self.path, links=False) as file:
            return _read(file)

    def _keep_counting(self) -> None:
        count = 0
        while not self._closed.wait(self.BEAT):
            count += 1
            try:
                with open_to_change(self.path) as file:
                    _write(file, {**_this(), "count": count})
            except OSError:
                continue  # the disk may be full; whoever wants this directory waits for three counts


def _this() -> dict[str, Any]:
    return {"host": socket.gethostname(), "started": STARTED, **asdict(Process.this())}


def _write(file: IO[bytes], holder: dict[str, Any]) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps(holder).encode())


def _read(file: IO[bytes]) -> dict[str, Any] | None:
    """The holder that a lock file names, if it does."""
    file.seek(0)
    try:
        told = json.loads(file.read(MAX_BYTES))
        Process.told(told)
        named = isinstance(told.get("host"), str) and isinstance(told.get("started"), str)
        return told if named and (told["host"] + told["started"]).isprintable() else None
    except (ValueError, RecursionError):
        return None


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
