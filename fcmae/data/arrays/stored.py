"""What an array on disk is, and how one is opened, whatever its format."""

import functools
import itertools
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fcmae.data.arrays.shared_chunks import Place, SharedChunks
from fcmae.data.pixels.scientific import NPY_MAGIC, TIFF_MAGICS
from fcmae.errors import RemoteError, UsageError, reason_of
from fcmae.opening import open_regular
from fcmae.urls import is_url

MAX_CHUNK = 2**28
"""Bytes that a chunk may have when it is decoded: a small file can expand to fill the memory."""
MAX_SAMPLES = 2**27
"""Images of one array; the order of an epoch takes 8 bytes for each."""
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
EXPANDED = 2**16
"""Bytes by which compression may make a chunk longer, beside an eighth."""
Index = tuple[int | slice, ...]
"""Of every axis: a position, or a range without a step, inside the array."""


class Stored(Protocol):
    """An array on disk. Errors of reading are OSError or ValueError."""

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: str | None
    """A letter per axis, as the file's own metadata name them; None if they do not."""
    files: list[str]
    """What changes when the array is written again: the file, or its metadata."""
    chunks: tuple[int, ...] | None
    """The shape of what is decoded at a time; None if it is read in place."""
    shared: SharedChunks | None
    """Where decoded chunks are kept."""

    def read(self, index: Index) -> np.ndarray:
        """A part of the array, copied into memory of its own. Only the chunks or rows that it touches are read."""
        ...


def open_stored(path: str, dataset: str | None = None, limit: float = 0) -> Stored:
    """Opens an array. Raises UsageError if there is none, or if reading it could do harm; RemoteError.

    Args:
        path: on a disk, or the URL of a Zarr folder.
        dataset: the name of the array in an HDF5 file or a Zarr group.
        limit: seconds for which reads from a URL are repeated.
    """
    try:
        return _open(path, dataset, limit)
    except (UsageError, RemoteError):
        raise
    except ImportError as error:
        raise UsageError(f"{path} needs {error.name}: pip install 'fcmae[science]'") from error
    except Exception as error:  # libraries raise all kinds for damaged files
        raise UsageError(f"{path} cannot be read: {reason_of(error)}") from error


def _open(path: str, dataset: str | None, limit: float) -> Stored:
    remote = is_url(path)
    if remote or os.path.isdir(path):
        from fcmae.data.arrays.folders import LocalFolder, RemoteFolder
        from fcmae.data.arrays.zarr_folder import open_zarr

        return open_zarr(RemoteFolder(path, limit) if remote else LocalFolder(Path(path)), dataset)
    with open_regular(path) as file:
        start = file.read(8)
    if start == HDF5_MAGIC:
        from fcmae.data.arrays.hdf5 import HDF5Array

        return HDF5Array(path, dataset)
    if start.startswith(NPY_MAGIC):
        if dataset is not None:
            raise UsageError(f"data.dataset must be null for a .npy file, which has one array; got {dataset!r}")
        return NpyFile(path)
    if start.startswith(TIFF_MAGICS):
        from fcmae.data.arrays.tiff import TiffArray

        return TiffArray(path, dataset)
    raise UsageError(f"{path} must be a Zarr folder, or an HDF5, .npy or TIFF file")


class NpyFile:
    """The array of a .npy file, memory-mapped."""

    axes: str | None = None
    chunks: tuple[int, ...] | None = None
    shared: SharedChunks | None = None

    def __init__(self, path: str) -> None:
        self._array = np.load(path, mmap_mode="r", allow_pickle=False)
        self.shape, self.dtype, self.files = self._array.shape, self._array.dtype, [path]

    def read(self, index: Index) -> np.ndarray:
        return np.array(self._array[index])


def assemble(
    index: Index,
    chunks: Sequence[int],
    chunk: Callable[[Place], np.ndarray | None],
    fill: np.ndarray,
    shared: SharedChunks | None = None,
    each: Callable[[Callable[[Place], np.ndarray | None], Iterable[Place]], Iterator[np.ndarray | None]] = map,
) -> np.ndarray:
    """A part of an array, from the chunks that it touches.

    Args:
        chunk: gives a chunk; None = it is not stored.
        fill: the value of chunks that are not stored, in the type of the result.
        shared: keeps what ``chunk`` gives.
        each: calls ``chunk`` for each place, perhaps several at a time.
    """
    spans = [slice(part, part + 1) if isinstance(part, int) else part for part in index]
    out = np.full([span.stop - span.start for span in spans], fill, fill.dtype)
    numbers = [range(span.start // side, -(-span.stop // side)) for span, side in zip(spans, chunks, strict=True)]
    places = list(itertools.product(*numbers))
    get = chunk if shared is None else functools.partial(shared.get, read=chunk)
    for place, values in zip(places, each(get, places), strict=True):
        if values is None:
            continue
        to, taken = [], []
        for number, side, span in zip(place, chunks, spans, strict=True):
            first, last = max(span.start, number * side), min(span.stop, (number + 1) * side)
            to.append(slice(first - span.start, last - span.start))
            taken.append(slice(first - number * side, last - number * side))
        out[tuple(to)] = values[tuple(taken)]
    return out[tuple(0 if isinstance(part, int) else slice(None) for part in index)]


def check_chunk(shape: Sequence[int], dtype: np.dtype) -> int:
    """The bytes of a chunk. Raises ValueError if they are more than :data:`MAX_CHUNK`."""
    size = math.prod(shape) * dtype.itemsize
    if size > MAX_CHUNK:
        raise ValueError(f"its chunks of {list(shape)} {dtype} have {size} bytes; at most {MAX_CHUNK} are read")
    return size


def check_stored(stored: int, size: int) -> None:
    """Raises ValueError if a chunk of ``size`` bytes takes many more where it is stored."""
    if stored > longest(size):
        raise ValueError(f"a chunk is stored in {stored} bytes, and has {size}")


def longest(size: int) -> int:
    """The bytes in which a chunk may be stored."""
    return size + size // 8 + EXPANDED


def inflate(data: bytes, size: int) -> bytes:
    """Data compressed by zlib or gzip: at most one byte more than ``size``. Raises ValueError if they are damaged."""
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
