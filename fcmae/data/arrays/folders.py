"""The folders in which Zarr keeps its files: on a disk, or at a URL."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from fcmae.data.remote.objects import THREADS, filesystem
from fcmae.data.remote.retries import MissingFile, retried
from fcmae.errors import shown
from fcmae.opening import is_inside, open_regular, read_regular
from fcmae.urls import check_url


class Folder(Protocol):
    """A folder of a Zarr array or group. Errors are OSError, for a missing file FileNotFoundError."""

    def read(self, key: str, most: int) -> bytes:
        """A whole file, of at most ``most`` bytes."""
        ...

    def part(self, key: str, start: int, length: int) -> bytes:
        """Some bytes of a file, or fewer at its end; a negative ``start`` counts from its end."""
        ...

    def each(self, read: Callable[[Any], Any], places: Iterable[Any]) -> Iterator[Any]:
        """What ``read`` gives for each place, in order."""
        ...

    def below(self, name: str) -> "Folder":
        """A folder in this one. Raises ValueError if it is outside."""
        ...

    def names(self) -> Iterator[str]:
        """The folders in this one."""
        ...


class LocalFolder:
    """On a disk. No link leads out of ``top``."""

    def __init__(self, path: Path, top: str | None = None) -> None:
        self.path, self.top = path, os.path.realpath(path) if top is None else top
        self._checked: set[str] = set()

    def __str__(self) -> str:
        return str(self.path)

    def read(self, key: str, most: int) -> bytes:
        return read_regular(self._file(key), most, links=False)

    def part(self, key: str, start: int, length: int) -> bytes:
        with open_regular(self._file(key), links=False) as file:
            start += os.fstat(file.fileno()).st_size if start < 0 else 0
            return os.pread(file.fileno(), length, start) if 0 <= start < 2**63 else b""

    def each(self, read: Callable[[Any], Any], places: Iterable[Any]) -> Iterator[Any]:
        return map(read, places)

    def below(self, name: str) -> "LocalFolder":
        path = Path(os.path.normpath(self.path / name))
        if os.path.isabs(name) or not is_inside(os.path.realpath(path), self.top):
            raise ValueError(f"{shown(name)} is outside of it")
        return LocalFolder(path, self.top)

    def names(self) -> Iterator[str]:
        return (path.name for path in sorted(self.path.iterdir()) if path.is_dir() and not path.is_symlink())

    def _file(self, key: str) -> str:
        """The file of a key. Raises ValueError if a link in the folder leads out of it."""
        path = os.path.join(self.path, key)
        parent = os.path.dirname(path)
        if parent not in self._checked:
            if not is_inside(os.path.realpath(parent), self.top):
                raise ValueError(f"{parent} is outside of {self.top}")
            self._checked.add(parent)
        return path


class RemoteFolder:
    """At a URL; reads are repeated for ``limit`` seconds. Raises RemoteError, and UsageError for what stays wrong."""

    def __init__(self, url: str, limit: float) -> None:
        check_url(url)
        self.url, self.limit = url.rstrip("/"), limit
        self._process = 0
        self._system: Any = None

    def __str__(self) -> str:
        return self.url

    def read(self, key: str, most: int) -> bytes:
        data = self._get(key, 0, most + 1)
        if len(data) > most:
            raise OSError(f"{self.url}/{key} has more than {most} bytes")
        return data

    def part(self, key: str, start: int, length: int) -> bytes:
        return self._get(key, start, None if start < 0 else start + length)[:length]

    def _get(self, key: str, start: int, end: int | None) -> bytes:
        url = f"{self.url}/{key}"
        try:
            return retried(lambda: self._connected().cat_file(url, start=start, end=end), url, self.limit)
        except MissingFile as error:
            # What one may not read is an error: its pixels would become the fill value.
            if isinstance(error.__cause__, FileNotFoundError) or getattr(error.__cause__, "status", 0) in (404, 410):
                raise FileNotFoundError(url) from error
            raise

    def each(self, read: Callable[[Any], Any], places: Iterable[Any]) -> Iterator[Any]:
        """Several at a time."""
        places = list(places)
        if len(places) < 2:
            yield from map(read, places)
            return
        self._connected()
        with ThreadPoolExecutor(min(THREADS, len(places))) as pool:
            yield from pool.map(read, places)

    def _connected(self) -> Any:
        """fsspec's object of this process. fsspec itself would make one per thread, with a session of its own."""
        if self._process != os.getpid():
            self._process, self._system = os.getpid(), filesystem(self.url)
        return self._system

    def below(self, name: str) -> "RemoteFolder":
        parts = name.split("/")
        if "" in parts or ".." in parts or "." in parts:
            raise ValueError(f"{shown(name)} is outside of it")
        return RemoteFolder(f"{self.url}/{name}", self.limit)

    def names(self) -> Iterator[str]:
        return iter(())  # web servers list no files
