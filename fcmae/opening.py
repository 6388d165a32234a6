"""Opens files safely: reads only regular files, and follows no link to write in place or to read trusted content.

So a pipe or device cannot block a reader. New files have random names and are created exclusively, so a link planted by
another user is never followed. Images may be links.

Every error is an OSError with ``filename`` and a ``strerror`` of a few words.
"""

import errno
import functools
import os
import secrets
import stat
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import IO

_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_CLOSE = getattr(os, "O_CLOEXEC", 0)
_ALWAYS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | _CLOSE
WRITTEN_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
ROOT = 0
MAX_LINKS = 40


def open_regular(path: str | os.PathLike, links: bool = True) -> IO[bytes]:
    """A regular file to read. Opening never blocks, as opening a pipe would.

    Args:
        links: follow a link at the end of ``path``.

    Raises OSError, e.g. for a folder, a pipe, a device, or a link if ``links`` is false.
    """
    return os.fdopen(_open(path, os.O_RDONLY | (0 if links else _NO_LINK)), "rb")


def read_regular(path: str | os.PathLike, most: int, links: bool = True) -> bytes:
    """The content of a regular file of at most ``most`` bytes. Raises OSError."""
    with open_regular(path, links) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes", os.fspath(path))
    return content


def is_inside(path: str, folder: str) -> bool:
    """Whether a path is in a folder, or the folder; both without links, as ``os.path.realpath`` gives them."""
    return os.path.commonpath([path, folder]) == folder


def open_trusted(path: str | os.PathLike, owners: Collection[int] = ()) -> IO[bytes]:
    """A file to read whose content is trusted, such as a cache: regular, not a link, and not writable by others.

    Args:
        owners: user ids that are trusted besides this user and root, such as the owner of the data.

    Raises OSError, a PermissionError if others own the file or may write it.
    """
    file = open_regular(path, links=False)
    problem = _distrust(os.fstat(file.fileno()), owners)
    if problem:
        file.close()
        raise PermissionError(errno.EPERM, problem, os.fspath(path))
    return file


def open_to_change(path: str | os.PathLike, permissions: int = 0o666) -> IO[bytes]:
    """A file to read and write in place, created if missing, unbuffered.

    Raises OSError for a link, a hard link, and anything but a regular file.
    """
    return os.fdopen(_open_in_place(path, os.O_RDWR, permissions), "r+b", buffering=0)


def open_to_append(path: str | os.PathLike) -> IO[str]:
    """A text file to append to, created if missing. Raises OSError as :func:`open_to_change` does."""
    return os.fdopen(_open_in_place(path, os.O_WRONLY | os.O_APPEND), "a")


def _open_in_place(path: str | os.PathLike, flags: int, permissions: int = 0o666) -> int:
    descriptor = _open(path, flags | os.O_CREAT | _NO_LINK, permissions)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EMLINK, "it has several names (hard links)", os.fspath(path))
    return descriptor


def create(path: str | os.PathLike, permissions: int = 0o666) -> IO[bytes]:
    """A new file to write. Raises FileExistsError if ``path`` exists, even as a link.

    Args:
        permissions: of the file, less those of the umask; 0o644 for files that are trusted later.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_LINK | _CLOSE
    return os.fdopen(os.open(path, flags, permissions), "w+b")


def random_token() -> str:
    """16 random hexadecimal digits for the name of a temporary file."""
    return secrets.token_hex(8)


def own_folder(path: Path) -> Path:
    """Creates a folder for files of this user. It may be a link that this user or root made. Raises OSError."""
    path.mkdir(parents=True, exist_ok=True)
    return check_link(path)


def check_link(path: Path) -> Path:
    """``path``. Raises OSError if it is, or leads to, a link that another user made."""
    link = path
    for _ in range(MAX_LINKS):
        if not os.path.islink(link):
            return path
        if os.lstat(link).st_uid not in (_user(), ROOT):
            raise PermissionError(errno.EPERM, f"{link} is a link of another user", str(path))
        link = link.parent / os.readlink(link)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))


def private_folder(*candidates: Path) -> Path:
    """The first of some folders that this user owns and nobody else can write, created if missing.

    If there is none, a new temporary folder. For files that are run or trusted later.
    """
    for path in candidates:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path):
                path.mkdir(mode=0o700)
            status = os.lstat(path)
        except OSError:
            continue
        if stat.S_ISDIR(status.st_mode) and not _distrust(status, ()) and os.access(path, os.W_OK):
            return path
    return Path(tempfile.mkdtemp(prefix="fcmae-"))


@functools.cache
def cache_folder(kind: str) -> Path:
    """A private folder of this user for files of one kind: ``~/.cache/fcmae/KIND``, or one for temporary files."""
    home = Path(os.path.expanduser("~/.cache/fcmae"))
    temporary = Path(tempfile.gettempdir(), f"fcmae-{_user()}-{kind}")
    return private_folder(*([home / kind] if home.is_absolute() else []), temporary)


def _open(path: str | os.PathLike, flags: int, permissions: int = 0o666) -> int:
    try:
        descriptor = os.open(path, flags | _ALWAYS, permissions)
    except OSError as error:
        if flags & _NO_LINK and os.path.islink(path):
            raise OSError(errno.ELOOP, "it is a link", os.fspath(path)) from error
        if error.errno == errno.ENXIO:  # a socket, or a pipe to write that nobody reads
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path)) from error
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        os.set_blocking(descriptor, True)
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))


def _distrust(status: os.stat_result, owners: Collection[int]) -> str:
    """Why a file or folder is not trusted; empty if it is."""
    if status.st_uid not in (_user(), ROOT, *owners):
        return f"it belongs to another user ({status.st_uid})"
    if status.st_mode & WRITTEN_BY_OTHERS:
        return "others may write it"
    return ""


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else ROOT
