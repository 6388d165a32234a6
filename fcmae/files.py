"""Files that are written whole or not at all, and what is said where that cannot be."""

import contextlib
import errno
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO

STRAY = re.compile(r"\.(\d+)\.tmp$")
"""Ending of the temporary files of :func:`replacing`."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write; at the end of the block it takes the place of ``path``.

    ``path`` is either the old file or the whole new one, also after a power cut.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a failed write does not know what it wrote to
        raise
    sync_folder(path.parent)


def delete_strays(run_dir: Path, pids: Collection[int] | None = None) -> None:
    """Deletes the temporary files of :func:`replacing` in a run directory: all, or those of some processes."""
    for stray in (*run_dir.glob("*.tmp"), *run_dir.glob("*/*.tmp")):
        found = STRAY.search(stray.name)
        if found is not None and (pids is None or int(found[1]) in pids):
            stray.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot do this, such as some in user space
            raise
    finally:
        os.close(descriptor)
