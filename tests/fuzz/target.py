"""What is fuzzed: sound files, how they are changed, what reads them; and what counts as wrong."""

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fcmae import errors
from fcmae.opening import cache_folder
from tests.fuzz.mutate import Files, mutated, write_folder
from tests.hostile import MIB, Case, Read, Taken, measure

REFUSED = tuple(
    f"{name}: " for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.FCMAEError)
)
"""How errors begin that a user can understand."""
LENGTH = 2500
"""Characters that a message may have."""
BATCH = 500
"""Cases of one child process."""
WAIT = 600
"""Seconds of wall time for a case."""
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pty.spawn")
"""Events of Python that no file may cause."""


@dataclass(frozen=True)
class Target:
    """``read`` gets the folder with the changed files. It returns a text, or raises an error that says what is wrong.

    Args:
        files: sound files.
        cases: in the full form; the short form runs some of them.
        memory: MiB that reading may take besides twice the size of the files.
        seconds: of CPU time.
    """

    files: Callable[[], Files]
    read: Callable[[Path], Any]
    cases: int = 5000
    change: Callable[[Files, np.random.Generator], Files] = mutated
    memory: int = 96
    seconds: float = 10
    needs: Callable[[], Files] | None = None
    """Other files that ``read`` compares with, which are made before processes fork."""

    def prepare(self, seed: int, numbers: Sequence[int]) -> None:
        """What these cases need, before processes fork."""
        self.files()
        if self.needs is not None:
            self.needs()

    def changed(self, name: str, seed: int, number: int) -> Files:
        """The files of case ``number``; 0 = the sound ones."""
        rng = np.random.default_rng([seed, number, *name.encode()])
        return self.change(self.files(), rng) if number else self.files()

    def case(self, files: Callable[[], Files]) -> Case:
        def make(folder: Path) -> Read:
            write_folder(folder, files())
            return lambda: watched(self.read, folder)

        return Case(make, "", self.memory)

    def wrong(self, taken: Taken) -> str:
        """What is wrong with what reading came to; empty if nothing is."""
        refused = taken.said.startswith(REFUSED)
        if not refused and not taken.said.startswith("read"):
            return f"no clear error: {taken.said[:300]}"
        lines = taken.said.split("\n") if taken.said.startswith("ConfigError") else [taken.said]
        if not all(line.isprintable() and len(line) <= LENGTH for line in lines):
            return f"an error that is not one short line: {taken.said[:300]!r}"
        if "Traceback" in taken.printed or "Warning" in taken.printed:
            return f"printed {taken.printed[-300:]!r}"
        if taken.memory > self.memory + 2 * taken.size / MIB:
            return f"{taken.memory} MiB of memory for {taken.size} bytes"
        return f"{taken.seconds:.1f} s of CPU time" if taken.seconds > self.seconds else ""


class Text(str):
    """Told as it is."""

    def __repr__(self) -> str:
        return str(self)


_caused: list[str] = []
_watching: list[Path] = []


def watched(read: Callable[[Path], Any], folder: Path) -> Text:
    """What ``read`` returns. Raises PermissionError where it ran a program, or wrote outside of temporary folders."""
    if not _watching:
        sys.addaudithook(_audit)
    _watching[:] = [folder]
    _caused.clear()
    try:
        said = read(folder)
    finally:
        if _caused:
            raise PermissionError(_caused[0])
    return Text(f"read {said}")


@functools.cache
def _allowed() -> tuple[str, ...]:
    return (tempfile.gettempdir(), "/dev/", "/proc/", str(cache_folder("locks").parents[1]))


def _audit(event: str, args: tuple) -> None:
    if event in FORBIDDEN:
        _caused.append(f"{event} {args!r:.200}")
    elif event == "open" and isinstance(args[0], (str, bytes)) and args[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.path.abspath(os.fsdecode(args[0]))
        _caused.extend([] if path.startswith(_allowed()) else [f"wrote {path}"])


def run(name: str, target: Target, cases: int, seed: int) -> Iterator[tuple[int, Taken]]:
    """The number and result of each case; the first one is of sound files."""
    for first in range(0, cases + 1, BATCH):
        numbers = range(first, min(first + BATCH, cases + 1))
        target.prepare(seed, numbers)
        batch = {str(i): target.case(functools.partial(target.changed, name, seed, i)) for i in numbers}
        for number, taken in measure(batch, WAIT).items():
            yield int(number), taken
