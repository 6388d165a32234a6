"""A run's directory: what it may hold already, its config, and the lock that keeps a second run out."""

import json
import os
import socket
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from fcmae.checkpoints.checkpoint import CheckpointDir
from fcmae.checkpoints.encoder import ENCODER_FILE
from fcmae.config import RunConfig
from fcmae.config.checks import as_list
from fcmae.data.sheet import SHEET_FILE
from fcmae.errors import UsageError
from fcmae.files import replacing, set_aside
from fcmae.loggers.logger import EVENTS_FILE
from fcmae.loggers.wandb import ID_FILE
from fcmae.messages import say
from fcmae.opening import open_regular, open_to_append, open_to_change
from fcmae.processes import Process
from fcmae.status import HELD, own_locks, read_config
from fcmae.training import profile

try:
    import fcntl
except ImportError:  # not a POSIX system: a run directory is not guarded
    fcntl = None  # type: ignore[assignment]

CONFIG_FILE = "config.yaml"
RESULTS = (CONFIG_FILE, "metrics.jsonl", EVENTS_FILE, SHEET_FILE, ENCODER_FILE, "reconstructions", profile.FOLDER)
"""What a run that starts again would overwrite; checkpoints are numbered."""
MAX_LOCK = 4096
"""Bytes of a lock file."""
STARTED = time.strftime("%Y-%m-%d %H:%M:%S")


def check_folder(cfg: RunConfig, run_dir: Path) -> None:
    """Raises UsageError for a folder with other files, and for one among the images, whose pictures would be read."""
    found = [name for name in RESULTS if (run_dir / name).exists()]
    if found and not _is_ours(run_dir):
        give = "give a new folder, an empty one, or a run"
        raise UsageError(f"hydra.run.dir={run_dir} has {found[0]}, which fcmae did not write; {give}")
    if cfg.data.name != "imagefolder" or cfg.data.source is not None:
        return
    for key in ("path", "val_path"):
        for path in as_list(getattr(cfg.data, key) or []):
            if run_dir.resolve().is_relative_to(Path(path).resolve()):
                why = "where its pictures would count as images"
                raise UsageError(f"hydra.run.dir={run_dir} must not be in data.{key}={path}, {why}")


def _is_ours(run_dir: Path) -> bool:
    """Whether a run wrote the folder: it writes its config first, but the user may have deleted that."""
    if CheckpointDir(run_dir).paths():
        return True
    return {"data", "model", "schedule", "trainer"} <= read_config(run_dir / CONFIG_FILE).keys()


def set_results_aside(run_dir: Path) -> None:
    """Renames the results of a run that starts again."""
    for name in (*RESULTS, ID_FILE):
        if (run_dir / name).exists():
            set_aside(run_dir / name, say)


def write_config(run_dir: Path, config: dict[str, Any]) -> None:
    """Writes ``config.yaml``, whole. Raises OSError."""
    from omegaconf import OmegaConf

    run_dir.mkdir(parents=True, exist_ok=True)
    with replacing(run_dir / CONFIG_FILE) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(config)).encode())


def write_event(run_dir: Path, event: dict[str, Any]) -> None:
    """Adds a line to ``events.jsonl``. Raises OSError."""
    with open_to_append(run_dir / EVENTS_FILE) as file:
        file.write(json.dumps({"time": time.time(), "host": socket.gethostname(), **event}) + "\n")


class RunLock:
    """``run.lock`` in a run directory, locked by the run's first rank; it names the host, the process and its start.

    The kernel releases the lock when its holder ends, however that happens. It is a POSIX record lock: data workers do
    not inherit it, and it works over NFS. On a file system without locks the holder writes a counter into the file;
    once the counter stops, the file is free.
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
        own_locks.add(_identity(self._file))

    def close(self) -> None:
        """Deletes the file and releases the lock, if this process has it."""
        self._closed.set()
        if self._file is not None:
            own_locks.discard(_identity(self._file))
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
            holder = Process.parse(told)
            if holder.is_alive() if holder.is_here() else self._is_counted_in(told):
                self._refuse(file)
        _write(file, _this())
        time.sleep(min(1.0, self.BEAT))  # if two processes found it free, both have written by now: the last one has it
        told = self._read_again()
        if told is None or told["pid"] != os.getpid() or told["place"] != _this()["place"]:
            self._refuse(file)

    def _is_counted_in(self, told: dict[str, Any]) -> bool:
        deadline = time.monotonic() + 3 * self.BEAT
        while time.monotonic() < deadline:
            time.sleep(self.BEAT / 5)
            if self._read_again() != told:
                return True
        return False

    def _read_again(self) -> dict[str, Any] | None:
        """NFS shows what others wrote only to those who open a file after that."""
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
                continue  # the disk may be full; another run waits for three counts


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
        told = json.loads(file.read(MAX_LOCK))
        Process.parse(told)
        named = isinstance(told.get("host"), str) and isinstance(told.get("started"), str)
        return told if named and (told["host"] + told["started"]).isprintable() else None
    except (ValueError, RecursionError):
        return None


def _identity(file: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
