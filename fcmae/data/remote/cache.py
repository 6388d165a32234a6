"""A folder with copies of remote files, of bounded size: the least recently used ones make room for new ones."""

import contextlib
import hashlib
import os
import re
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fcmae.data.remote.commands import Command
from fcmae.data.remote.objects import RemoteFile
from fcmae.errors import UsageError
from fcmae.files import STRAY, one_at_a_time, replacing
from fcmae.messages import print_once
from fcmae.opening import cache_folder, open_trusted

SUFFIX = ".data"
STALE = 3600.0
"""Seconds after which a temporary file that nobody writes to is of a process that was killed."""
GIB = 2**30
_claimed: defaultdict[Path, dict[Path, int]] = defaultdict(dict)
"""The copies in each folder that sources of this process want to use, and their bytes."""


@dataclass(frozen=True)
class Cache:
    """Copies of remote files, named by URL, size and ETag. Only this user can change them.

    Args:
        folder: made if missing.
        size: bytes of all copies.
    """

    folder: Path
    size: int

    @classmethod
    def of(cls, folder: str | None, gib: float) -> "Cache":
        """The cache in a folder; None = one in the user's home. Raises UsageError."""
        try:
            path = cache_folder("remote") if folder is None else Path(folder).expanduser().absolute()
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"loader.cache_dir={folder} cannot be created: {error.strerror}") from error
        return cls(path, int(gib * GIB))

    def claim(self, file: RemoteFile) -> bool:
        """Whether a file has room beside the others that this process has claimed."""
        claimed, place = _claimed[self.folder], self.place_of(file)
        if sum(claimed.values()) - claimed.get(place, 0) + file.size > self.size:
            return False
        claimed[place] = file.size
        return True

    def place(self, url: str, size: int = 0, etag: str = "") -> Path:
        """Where the copy of a file is, or would be."""
        digest = hashlib.sha256(f"{url}\0{size}\0{etag}".encode(errors="surrogateescape")).hexdigest()[:24]
        name = re.sub(r"[^\w.-]+", "_", url.partition("?")[0].rpartition("/")[2])[-60:]
        return self.folder / f"{digest}-{name}{SUFFIX}"

    def place_of(self, file: RemoteFile) -> Path:
        return self.place(file.url, file.size, file.etag)

    def open(self, file: RemoteFile) -> IO[bytes] | None:
        """The copy of a file, None without one. Marks it as used."""
        path = self.place_of(file)
        try:
            opened = open_trusted(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            print_once(f"{path} is not used: {error.strerror}")
            return None
        if os.fstat(opened.fileno()).st_size != file.size:
            opened.close()
            return None
        _touch(path)
        return opened

    def fetch(self, file: RemoteFile) -> Path | None:
        """Makes a copy of a file unless there is one, while other processes that want it wait. None if none fits."""
        path = self.place_of(file)
        with one_at_a_time(path):
            if self._is_there(path, file.size):
                return path
            with contextlib.ExitStack() as stack:
                with one_at_a_time(self.folder):
                    if not self._make_room(file.size):
                        return None
                    to = stack.enter_context(replacing(path, 0o600))
                    to.truncate(file.size)  # others count it
                for block in file.blocks():
                    to.write(block)
        return path

    def fetch_output(self, command: Command, again: bool = False) -> Path:
        """Runs a command and keeps what it writes, unless that is here already. Raises UsageError if it has no room."""
        path = self.place(command.text)
        with one_at_a_time(path):
            if again or not self._is_there(path):
                with replacing(path, 0o600) as to:
                    for block in command.blocks():
                        with one_at_a_time(self.folder):
                            if not self._make_room(len(block)):
                                raise UsageError(f"{command}: its output must fit into loader.cache_size")
                        to.write(block)
        return path

    def _is_there(self, path: Path, size: int | None = None) -> bool:
        try:
            with open_trusted(path) as file:
                found = os.fstat(file.fileno()).st_size
        except OSError:
            return False
        _touch(path)
        return size in (None, found)

    def _make_room(self, size: int) -> bool:
        """Deletes the copies that were used least recently until ``size`` bytes more fit; False if they cannot."""
        copies, being_written = self._copies()
        total = being_written + sum(length for _, length, _ in copies)
        free = shutil.disk_usage(self.folder).free
        if being_written + size > self.size or size > free + total - being_written:
            print_once(f"{self.folder} (loader.cache_dir) has no room for {size:,} bytes more of remote files")
            return False
        for _, length, path in sorted(copies):
            if total + size <= self.size and size <= free:
                break
            path.unlink(missing_ok=True)
            total, free = total - length, free + length
        return True

    def _copies(self) -> tuple[list[tuple[int, int, Path]], int]:
        """The time of use, the size and the path of each copy; and the bytes of those that are being written."""
        copies, being_written = [], 0
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if entry.name.endswith(SUFFIX):
                    copies.append((status.st_atime_ns, status.st_size, Path(entry.path)))
                elif STRAY.search(entry.name) and time.time() - status.st_mtime < STALE:
                    being_written += status.st_size
                elif STRAY.search(entry.name):
                    os.unlink(entry.path)
        return copies, being_written


def _touch(path: Path) -> None:
    """Marks a copy as used now. The time of its last change stays, by which its index is known."""
    with contextlib.suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
