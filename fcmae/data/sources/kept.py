"""Arrays kept in a file: facts about a million files that are found out once and cost a process nothing.

Such a file is memory-mapped, so all processes of a machine share its pages, and opening it reads only its header. Its
format is safetensors. A file that other users own or may write is not used.
"""

import contextlib
import hashlib
import json
import os
import struct
from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from fcmae.errors import reason_of
from fcmae.files import delete_remains, replacing
from fcmae.messages import print_once_rank0
from fcmae.opening import open_trusted

HOME = Path("~/.cache/fcmae/index")
"""Where files are kept if the place beside the data cannot be written."""
MAX_HEADER = 2**20
"""Bytes."""
CHUNK = 2**20
"""Bytes of strings that are checked at once."""
_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}


@dataclass(eq=False)
class Arrays:
    """Named arrays and a ``meta`` dict, from a file (memory-mapped, pickled as its path) or in memory."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    path: Path | None = None
    owners: Collection[int] = ()

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __reduce__(self) -> tuple[Callable, tuple]:
        return (Arrays, (self.arrays, self.meta)) if self.path is None else (Arrays.open, (self.path, self.owners))

    @classmethod
    def open(cls, path: Path, owners: Collection[int] = ()) -> "Arrays":
        """Maps a file that this user, root or one of ``owners`` owns. Raises OSError; ValueError if it is damaged."""
        with open_trusted(path, owners) as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(MAX_HEADER, size - 8):
                raise ValueError("it is cut off or not a safetensors file")
            header = json.loads(file.read(length))
            mapped = np.asarray(np.memmap(file, np.uint8, "r"))  # single values of np.memmap cost three times as much
        try:
            meta = json.loads(header.pop("__metadata__")["meta"])
            arrays = {name: _array(mapped[8 + length :], **entry) for name, entry in header.items()}
        except (AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"its header is damaged ({error})") from error
        return cls(arrays, meta, path, owners)

    def save(self, path: Path) -> None:
        """Writes the whole file or nothing. Raises OSError."""
        delete_remains(path, of_all=True)
        with replacing(path, 0o644) as file:
            file.write(save(self.arrays, {"meta": json.dumps(self.meta)}))


def _array(data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    first, last = data_offsets
    if not 0 <= first <= last <= len(data):
        raise ValueError("it is cut off")
    return data[first:last].view(_DTYPES[dtype]).reshape(shape)


class Strings:
    """Byte strings in two arrays: string i is ``data[offsets[i]:offsets[i + 1]]``."""

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
    """Collects the arrays of a :class:`Strings`."""

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
    """What :func:`keep` stored about ``target``, if it is there, trusted, undamaged and up to date.

    Args:
        is_current: whether the arrays are up to date; raises ValueError if they contradict themselves.
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
            problems.append(f"{path} is not used: {reason_of(error)}; {target} is read again")
    if problems:
        print_once_rank0(problems[0])
    return None


def keep(arrays: Arrays, target: Path, suffix: str) -> Arrays:
    """Stores arrays about ``target`` beside it, or else in :data:`HOME`, and opens them from there.

    They stay in memory if neither place can be written. Files of other users are not replaced.
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
    """Users who may keep arrays about ``target`` besides this user and root: its owner, who may change it as well."""
    return [target.stat().st_uid] if target.exists() else []


def _places(target: Path, suffix: str) -> list[Path]:
    real = target.resolve()
    named = hashlib.blake2b(os.fsencode(real), digest_size=8).hexdigest()
    return [real.with_name(f".{real.name}{suffix}"), HOME.expanduser() / f"{real.name}-{named}{suffix}"]
