"""The files in a tar file, by its headers, of which no number is believed before it was compared with the file.

Python's ``tarfile`` reads a single header here. By itself it follows hostile ones: sizes below zero bring it back for
ever (CVE-2025-8194), and names, attributes and maps of sparse files are read whatever their size.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
MAX_NAME = 2**16
"""Bytes of a long name, or of what is said about a file beyond its header."""
MAX_SIZE = 2**62
"""Bytes of a file: larger numbers do not fit into the index."""
NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
ATTRIBUTES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


class Member(NamedTuple):
    """A regular file: its name, where its content begins, its bytes; whether it is stored without its zeros."""

    name: str
    offset: int
    size: int
    is_sparse: bool = False


class DamagedError(ValueError):
    """What is wrong with a tar file from some byte on."""


def members(file: IO[bytes]) -> Iterator[Member]:
    """The regular files of an archive, the last of which may be cut off.

    Raises DamagedError where the headers end before the archive's end, and tarfile.ReadError if there are none.
    """
    end = os.fstat(file.fileno()).st_size
    shared: dict[str, str] = {}
    offset = 0
    name, own = "", dict[str, str]()
    while offset < end:
        file.seek(offset)
        try:
            header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # not in typeshed
            return
        except tarfile.HeaderError as error:
            if offset == 0:
                raise tarfile.ReadError(str(error)) from error
            raise DamagedError(f"no header at byte {offset}") from error
        if header.size < 0:
            raise DamagedError(f"no header at byte {offset}")
        start = offset + BLOCK
        if header.type in NAMES + ATTRIBUTES:
            content = _read(file, start, header.size, end)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                name = tarfile.nts(content, "utf-8", "surrogateescape")  # type: ignore[attr-defined]
            elif header.type in ATTRIBUTES:
                found = dict(_attributes(content, offset))
                shared, own = (shared | found, own) if header.type == tarfile.XGLTYPE else (shared, own | found)
            offset = start + _whole(header.size)
            continue
        if header.type == tarfile.GNUTYPE_SPARSE:
            start = _after_map(file, start, end)
        said, name, own = {**shared, **({"path": name} if name else {}), **own}, "", {}
        size = _size(said["size"], offset) if "size" in said else header.size
        if header.isreg():
            is_sparse = header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in said)
            called = said.get("GNU.sparse.name", said.get("path", header.name))
            yield Member(called.rstrip("/"), start, min(size, MAX_SIZE), is_sparse)
        has_content = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        offset = start + (_whole(size) if has_content else 0)
        if offset > end:
            raise DamagedError("unexpected end of data")
    if not end:
        raise tarfile.ReadError("empty file")
    raise DamagedError("no mark of the archive's end")


def _whole(size: int) -> int:
    """Bytes that a content takes."""
    return -(-size // BLOCK) * BLOCK


def _read(file: IO[bytes], start: int, size: int, end: int) -> bytes:
    if size > MAX_NAME:
        raise DamagedError(f"a name or attributes of {size} bytes at byte {start}")
    if start + size > end:
        raise DamagedError("unexpected end of data")
    file.seek(start)
    return file.read(size)


def _attributes(content: bytes, offset: int) -> Iterator[tuple[str, str]]:
    """POSIX's records "LENGTH KEY=VALUE", each of which ends a line."""
    while content:
        length, _, _ = content[:20].partition(b" ")
        if not length.isdigit() or not len(length) + 2 < int(length) <= len(content):
            raise DamagedError(f"no attributes at byte {offset}")
        record, content = content[len(length) + 1 : int(length) - 1], content[int(length) :]
        key, _, value = record.decode("utf-8", "surrogateescape").partition("=")
        yield key, value


def _size(text: str, offset: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise DamagedError(f"no header at byte {offset}")
    return int(text)


def _after_map(file: IO[bytes], start: int, end: int) -> int:
    """Where the content begins after GNU's maps of a sparse file, which may go on in further blocks."""
    file.seek(start - BLOCK)
    goes_on = file.read(BLOCK)[482]
    while goes_on and start < end:
        goes_on = file.read(BLOCK).ljust(BLOCK, b"\0")[504]
        start += BLOCK
    return start
