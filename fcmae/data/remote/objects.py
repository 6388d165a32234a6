"""Files at URLs: what is there, and parts of their bytes. fsspec speaks to the servers."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fcmae.data.remote.retries import MissingFile, retried
from fcmae.errors import UsageError
from fcmae.urls import SCHEMES, check_url, join

BLOCK = 4 * 2**20
"""Bytes that are asked for at once where a file is read from its beginning. After an error one block is read again."""
THREADS = 8
"""Requests at a time."""
CONNECT, READ = 20, 60
"""Seconds to wait for a connection, and for the next bytes."""


@dataclass(frozen=True)
class RemoteFile:
    """A file at a URL, as it was when it was listed.

    Args:
        size: bytes.
        etag: changes with the content: the server's ETag, or a time of change; empty if the server gives none.
        limit: seconds of retries.
    """

    url: str
    size: int
    etag: str
    limit: float

    def __str__(self) -> str:
        return self.url

    @property
    def stamp(self) -> str:
        """Changes with the content."""
        return f"{self.url} {self.size} {self.etag}"

    def read(self, start: int, length: int) -> bytes:
        """Some bytes. Raises RemoteError, and UsageError if they are not there."""
        length = max(0, min(length, self.size - start))
        data = retried(lambda: self._part(start, length), self.url, self.limit) if length else b""
        if len(data) != length:
            raise UsageError(f"{self.url} must answer requests of {length} bytes (HTTP Range); it sent {len(data)}")
        return data

    def _part(self, start: int, length: int) -> bytes:
        return filesystem(self.url).cat_file(self.url, start=start, end=start + length)

    def blocks(self) -> Iterator[bytes]:
        """The whole content, in parts. A failed part is read again, not what came before."""
        for start in range(0, self.size, BLOCK):
            yield self.read(start, BLOCK)

    def check(self) -> None:
        """Raises UsageError if the file is another one than when it was listed."""
        now = stat(self.url, self.limit)
        if (now.size, now.etag) != (self.size, self.etag):
            raise UsageError(f"{self.url} has changed since the command began; start it again")


class RemoteReader(io.RawIOBase):
    """A file at a URL to read and seek in; wrap it in ``io.BufferedReader(reader, BLOCK)``."""

    def __init__(self, file: RemoteFile) -> None:
        self.file, self.position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.file.size}[whence]
        self.position = start + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(self.position, len(buffer))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def filesystem(url: str) -> Any:
    """fsspec's object for a URL, one per process and kind. Raises UsageError if a package is missing."""
    scheme = check_url(url)
    try:
        import fsspec

        return fsspec.filesystem(scheme, **_options(scheme))
    except ImportError as error:
        needs = "hf" if scheme == "hf" else "cloud"
        package = "gcsfs" if scheme == "gs" else f"'fcmae[{needs}]'"
        raise UsageError(f"{url} needs the package {SCHEMES[scheme]}: pip install {package}") from error


def _options(scheme: str) -> dict[str, Any]:
    """Time limits, without which a silent server would stop a reader forever. We retry ourselves."""
    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=READ)
        return {"client_kwargs": {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}}
    if scheme == "s3":
        tries = {"total_max_attempts": 1}
        return {"config_kwargs": {"connect_timeout": CONNECT, "read_timeout": READ, "retries": tries}}
    return {}


def stat(url: str, limit: float) -> RemoteFile:
    """The file at a URL. Raises UsageError if there is none, RemoteError if the server does not answer."""
    return _described(url, retried(lambda: _asked(url).info(url), url, limit), limit)


def _asked(url: str) -> Any:
    """fsspec's object for a URL, which asks the server again."""
    system = filesystem(url)
    system.invalidate_cache()
    return system


def _described(url: str, info: dict[str, Any], limit: float) -> RemoteFile:
    if info.get("type") == "directory":
        raise UsageError(f"{url} must be a file; it is a folder")
    if info.get("size") is None:
        raise UsageError(f"{url} cannot be read in parts: the server does not say how long it is")
    known = (info.get(name) for name in ("ETag", "etag", "blob_id", "generation", "Last-Modified", "LastModified"))
    return RemoteFile(url, int(info["size"]), str(next(filter(None, known), "")), limit)


def find(url: str, ending: str, limit: float) -> list[RemoteFile]:
    """The file at a URL, those of a pattern, or of a folder those with an ending. Raises UsageError, RemoteError."""
    scheme = check_url(url)
    if "*" in url or (scheme not in ("http", "https") and not url.endswith(ending)):
        if scheme in ("http", "https"):
            raise UsageError(f"{url} must name each file, such as x-{{000..012}}{ending}: web servers list no files")
        pattern = url if "*" in url else f"{url.rstrip('/')}/*{ending}"
        found = retried(lambda: _glob(pattern), url, limit)
        if not found:
            raise UsageError(f"{url} has no files that end in {ending}")
        return [_described(f"{scheme}://{name}", info, limit) for name, info in sorted(found.items())]
    return [stat(url, limit)]


def find_folders(url: str, limit: float) -> list[str]:
    """The folder at a URL, or all folders that match a pattern. Raises UsageError, RemoteError."""
    scheme = check_url(url)
    if "*" not in url:
        return [url]
    if scheme in ("http", "https"):
        raise UsageError(f"{url} must name each folder: web servers list no files")
    found = retried(lambda: filesystem(url).glob(url), url, limit)
    if not found:
        raise UsageError(f"{url} has no folders")
    return [f"{scheme}://{name}" for name in sorted(found)]


def _glob(pattern: str) -> dict[str, dict[str, Any]]:
    found = _asked(pattern).glob(pattern, detail=True)
    return {name: info for name, info in found.items() if info.get("type") != "directory"}


def read_beside(file: RemoteFile, name: str, most: int) -> bytes:
    """A small file beside another one. Raises FileNotFoundError, UsageError, RemoteError."""
    url = join(file.url, name)
    try:
        found = stat(url, file.limit)
    except MissingFile as error:
        raise FileNotFoundError(url) from error
    if found.size > most:
        raise UsageError(f"{url} has more than {most} bytes")
    return found.read(0, found.size)
