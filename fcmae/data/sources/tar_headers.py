"""Lists the files in a tar file by its headers, whose numbers are checked against the file before use.

Python's ``tarfile`` parses single headers here. It does not protect from hostile files: negative sizes make it loop
forever (CVE-2025-8194), and it reads names, attributes and maps of sparse files of any size.
"""

import os
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

BLOCK = tarfile.BLOCKSIZE
MAX_NAME = 2**16
"""Bytes of a long name or of attributes."""
MAX_SIZE = 2**62
"""Bytes of a file; larger numbers do not fit into the index."""
NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
ATTRIBUTES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


class Member(NamedTuple):
    """A regular file: its name, the position of its content and its bytes. A sparse one is stored without its zeros."""

    name: str
    offset: int
    size: int
    is_sparse: bool = False


class DamagedError(ValueError):
    """Says what is damaged in a tar file."""


def members(file: IO[bytes]) -> Iterator[Member]:
    """The regular files of an archive. The last one may be cut off.

    Raises DamagedError if the headers end before the archive, and tarfile.ReadError without any header.
    """
    end = file.seek(0, os.SEEK_END)
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
    """Bytes in whole blocks."""
    return -(-size // BLOCK) * BLOCK


def _read(file: IO[bytes], start: int, size: int, end: int) -> bytes:
    if size > MAX_NAME:
        raise DamagedError(f"a name or attributes of {size} bytes at byte {start}")
    if start + size > end:
        raise DamagedError("unexpected end of data")
    file.seek(start)
    return file.read(size)


def _attributes(content: bytes, offset: int) -> Iterator[tuple[str, str]]:
    """POSIX's records ``LENGTH KEY=VALUE``, one per line."""
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
    """The position of the content after the maps of a GNU sparse file, which may take several blocks."""
    file.seek(start - BLOCK)
    goes_on = file.read(BLOCK)[482]
    while goes_on and start < end:
        goes_on = file.read(BLOCK).ljust(BLOCK, b"\0")[504]
        start += BLOCK
    return start
