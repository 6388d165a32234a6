"""How a source gets at files that are not local: which there are, their copies, and their bytes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from fcmae.config import LoaderConfig
from fcmae.data.remote.cache import Cache
from fcmae.data.remote.commands import Command
from fcmae.data.remote.objects import THREADS, RemoteFile, find
from fcmae.opening import open_regular
from fcmae.urls import expand_braces, is_command

T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """The cache, and the time limit of retries.

    Args:
        limit: seconds.
        again: run commands although their output is in the cache.
    """

    cache: Cache
    limit: float
    again: bool = False

    @classmethod
    def of(cls, loader: LoaderConfig) -> "Access":
        """Raises UsageError."""
        return cls(Cache.of(loader.cache_dir, loader.cache_size), loader.retry_seconds, loader.relist)

    def find(self, pattern: str, ending: str) -> list[RemoteFile | Command]:
        """The files of a URL or command, perhaps with braces, in their order. Raises UsageError, RemoteError."""
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda name: self._find(name, ending), expand_braces(pattern))
            return [file for files in found for file in files]

    def _find(self, name: str, ending: str) -> list[RemoteFile | Command]:
        return [Command(name)] if is_command(name) else [*find(name, ending, self.limit)]

    def copy(self, files: list[RemoteFile | Command], then: Callable[[RemoteFile | Command], T]) -> Iterator[T]:
        """Copies those of the files that have room in the cache, and gives what ``then`` returns of each, in order.

        Raises UsageError, RemoteError, and what ``then`` raises.
        """
        fits = [isinstance(file, RemoteFile) and self.cache.claim(file) for file in files]

        def copied(file: RemoteFile | Command, has_room: bool) -> T:
            if isinstance(file, Command):
                self.cache.fetch_output(file, self.again)
            elif has_room:
                self.cache.fetch(file)
            return then(file)

        with ThreadPoolExecutor(THREADS) as pool:
            yield from pool.map(copied, files, fits)

    def copied(self, file: RemoteFile | Command) -> Path | None:
        """Where the copy of a file is; None without one."""
        if isinstance(file, Command):
            return self.cache.fetch_output(file)
        opened = self.cache.open(file)
        if opened is None:
            return None
        opened.close()
        return self.cache.place_of(file)

    def open(self, file: RemoteFile | Command) -> IO[bytes] | None:
        """The copy of a file. None without one, and then only for what has a URL: a command runs again."""
        if isinstance(file, Command):
            return open_regular(self.cache.fetch_output(file))
        return self.cache.open(file)
