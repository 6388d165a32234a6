"""Arrays kept in a file: what was found out about a million files once, at hand for every process at no cost.

A file is memory-mapped, so all processes of a machine share its pages, however many loader workers there are, and
opening it reads only a header. The format is safetensors. A file that others wrote or may write is not believed.
"""

import contextlib
import hashlib
import json
import os
import struct
import sys
import threading
from array import array
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from fcmae.files import replacing
from fcmae.messages import print_once_rank0
from fcmae.opening import cache_folder, open_to_change, open_trusted

HOME = Path("~/.cache/fcmae/index")
"""Where files are kept whose place beside the data cannot be written to."""

PATIENCE = 10.0
"""Seconds after which a process says that it waits for another."""

MAX_HEADER = 2**20
"""Bytes."""
CHUNK = 2**20
"""Bytes of strings that are looked through at once."""
_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}


class Arrays:
    """Named arrays and a ``meta`` dict, from a file (memory-mapped, pickled as its path) or in memory."""

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        meta: dict[str, Any],
        path: Path | None = None,
        owners: Collection[int] = (),
    ) -> None:
        self.arrays = arrays
        self.meta = meta
        self.path = path
        self.owners = owners

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __reduce__(self) -> tuple[Callable, tuple]:
        if self.path is not None:
            return Arrays.open, (self.path, self.owners)
        return Arrays, (self.arrays, self.meta)

    @classmethod
    def open(cls, path: Path, owners: Collection[int] = ()) -> "Arrays":
        """Maps a file of this user, root or one of ``owners``. Raises OSError, or ValueError for a damaged one."""
        with open_trusted(path, owners) as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(MAX_HEADER, size - 8):
                raise ValueError("it is cut off or not a safetensors file")
            header = json.loads(file.read(length))
            mapped = np.asarray(np.memmap(file, np.uint8, "r"))  # of a plain array single values cost a third
        try:
            meta = json.loads(header.pop("__metadata__")["meta"])
            arrays = {name: _array(mapped[8 + length :], **entry) for name, entry in header.items()}
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"its header is damaged ({error})") from error
        return cls(arrays, meta, path, owners)

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all. Raises OSError."""
        with replacing(path, 0o644) as file:
            file.write(save(self.arrays, {"meta": json.dumps(self.meta)}))


def _array(data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    first, last = data_offsets
    if not 0 <= first <= last <= len(data):
        raise ValueError("it is cut off")
    return data[first:last].view(_DTYPES[dtype]).reshape(shape)


class Strings:
    """Many byte strings in two arrays: one after another in ``data``, string i from ``offsets[i]`` on."""

    def __init__(self, arrays: Arrays, name: str) -> None:
        self.data = arrays[name]
        self.offsets = arrays[f"{name}_offsets"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))

    def check(self, paths: bool = False) -> None:
        """Raises ValueError if the offsets do not fit the data, or ``paths`` are not relative or leave their folder."""
        if self.data.dtype != np.uint8 or self.offsets.dtype != np.int64 or self.data.ndim != 1 != self.offsets.ndim:
            raise ValueError("its strings have other types")
        lengths = np.diff(self.offsets)
        if not len(self.offsets) or self.offsets[0] != 0 or self.offsets[-1] != len(self.data) or (lengths < 0).any():
            raise ValueError("its strings have other lengths")
        if paths and (self.data[self.offsets[:-1][lengths > 0]] == ord("/")).any():
            raise ValueError("it names files by absolute paths")
        for first in range(0, len(self.data) if paths else 0, CHUNK):
            chunk = self.data[first : first + CHUNK + 1]
            if not chunk.min():
                raise ValueError("it has a name with a zero byte")
            dots = chunk == ord(".")
            found = np.searchsorted(self.offsets, np.flatnonzero(dots[:-1] & dots[1:]) + first, "right") - 1
            if any(b".." in self[i].split(b"/") for i in np.unique(found)):
                raise ValueError("it names files outside of its folder")


class StringsBuilder:
    """Collects what :class:`Strings` reads, without an object for each string."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.offsets = array("q", [0])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def append(self, string: bytes) -> None:
        self.data += string
        self.offsets.append(len(self.data))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        return {name: np.frombuffer(self.data, np.uint8), f"{name}_offsets": np.frombuffer(self.offsets, np.int64)}


def find_kept(target: Path, suffix: str, is_current: Callable[[Arrays], bool]) -> Arrays | None:
    """What :func:`keep` kept about ``target``, if it is there, is to be believed, whole and still valid.

    Args:
        is_current: whether it is still valid; raises ValueError if it holds what it cannot.
    """
    problems = []
    for path in _places(target, suffix):
        try:
            kept = Arrays.open(path, _owners(target))
            if is_current(kept):
                return kept
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            problems.append(f"{path} is not used: {reason}; {target} is read again")
    if problems:
        print_once_rank0(problems[0])
    return None


def keep(arrays: Arrays, target: Path, suffix: str) -> Arrays:
    """Keeps arrays about ``target`` beside it, or where that cannot be written in :data:`HOME`; opened from there.

    Where neither can be written they stay in memory. Another user's file is left alone.
    """
    for path in _places(target, suffix):
        with contextlib.suppress(OSError, ValueError):
            if hasattr(os, "geteuid") and os.path.lexists(path) and os.lstat(path).st_uid != os.geteuid():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays.save(path)
            return Arrays.open(path, _owners(target))
    return arrays


def _owners(target: Path) -> list[int]:
    """Who is believed about ``target`` besides this user and root: its owner may change it as well."""
    return [target.stat().st_uid]


def _places(target: Path, suffix: str) -> list[Path]:
    real = target.resolve()
    named = hashlib.blake2b(os.fsencode(real), digest_size=8).hexdigest()
    return [real.with_name(f".{real.name}{suffix}"), HOME.expanduser() / f"{real.name}-{named}{suffix}"]


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """In this block the processes of this user that work on ``folder`` wait for each other, where that is possible.

    The lock is a file in the user's own cache: whoever may read a folder could hold a lock on the folder itself. Who
    waits longer than :data:`PATIENCE` prints a line that says for what.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):  # not on Windows, nor on every network file system
            _lock(folder, stack)
        yield


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    import fcntl

    digest = hashlib.blake2b(os.fsencode(folder.resolve()), digest_size=16).hexdigest()
    path = cache_folder("locks") / f"{digest}.lock"
    while True:
        file = open_to_change(path, 0o600)
        timer = threading.Timer(PATIENCE, _say_waiting, [folder, path])
        timer.daemon = True
        timer.start()
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except BaseException:
            file.close()
            raise
        finally:
            timer.cancel()
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                stack.enter_context(file)
                stack.callback(path.unlink, missing_ok=True)  # before the lock is released
                return
        file.close()  # its holder deleted it after we opened it


def _say_waiting(folder: Path, path: Path) -> None:
    print(f"waiting for another process that reads {folder} (it holds {path})", file=sys.stderr, flush=True)
