"""Identifies processes: whether they run, are suspended, and signals that cannot reach another process."""

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Process:
    """A process by its id and start time, since ids are reused. Known on Linux only."""

    pid: int
    born: str
    """Clock ticks from boot to the start of the process; empty if unknown."""
    place: str
    """The boot of the machine and the container in which the id is valid."""

    @classmethod
    def this(cls) -> "Process":
        """The calling process."""
        return cls(os.getpid(), _born(os.getpid()), _place())

    @classmethod
    def parse(cls, values: Any) -> "Process":
        """A process from a file or another machine. Raises ValueError for values of other types."""
        pid, born, place = (
            (values.get(name) for name in ("pid", "born", "place")) if isinstance(values, dict) else 3 * [0]
        )
        if type(pid) is not int or pid <= 0 or not isinstance(born, str) or not isinstance(place, str):
            raise ValueError("it names no process")
        return cls(pid, born, place)

    def is_here(self) -> bool:
        """Whether the process belongs to the caller's machine and container."""
        return bool(self.place) and self.place == _place()

    def is_alive(self) -> bool:
        """Whether it is here, and runs or is suspended."""
        return self.is_here() and _born(self.pid) == self.born != ""

    def send(self, number: signal.Signals) -> None:
        """Signals the process if it is here and alive."""
        if self.is_alive():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def is_stopped(pid: int | None) -> bool:
    """Whether a process is suspended (SIGSTOP); known on Linux only."""
    fields = stat_fields(pid)
    return bool(fields) and fields[0] == "T"


def _born(pid: int) -> str:
    fields = stat_fields(pid)
    return fields[19] if fields and fields[0] not in "ZX" else ""


def stat_fields(pid: int | None) -> list[str]:
    """The fields of /proc/PID/stat from the state on; the name before it may contain anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _place() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
