"""Decoded chunks in memory that the loader workers of a rank share: a chunk is decoded once, for all its windows.

Only where the chunks of all arrays fit, so that each has its own place and none has to make room. Two workers may then
decode the same chunk at the same time: they write the same bytes.
"""

import math
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fcmae import ranks
from fcmae.memory import available_memory

MOST = 2**30
"""Bytes of a source's decoded chunks; those of larger arrays are not kept."""
SHARE = 1 / 8
"""Of the memory that is available, the ranks of a machine may take this much."""
ALIGN = 64
"""The chunks of an array begin at a multiple of so many bytes."""
UNKNOWN, STORED, MISSING = b"\0\1\2"
"""What is known of a chunk: nothing; its values; that it is not stored."""

Place = tuple[int, ...]
"""The number of a chunk along every axis."""


class Layout(NamedTuple):
    """How an array is cut into chunks."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype

    @property
    def grid(self) -> tuple[int, ...]:
        """How many chunks there are along every axis."""
        return tuple(-(-side // chunk) for side, chunk in zip(self.shape, self.chunks, strict=True))

    @property
    def size(self) -> int:
        """Bytes of all chunks."""
        return -(-math.prod(self.grid) * math.prod(self.chunks) * self.dtype.itemsize // ALIGN) * ALIGN


class SharedChunks:
    """The decoded chunks of an array, those that a process has asked for so far.

    Args:
        known: a file in memory with a byte for each chunk, from ``first`` on.
        values: the memory of the chunks, uint8.
    """

    def __init__(self, layout: Layout, known: int, first: int, values: np.ndarray) -> None:
        self._grid, self._known, self._first = layout.grid, known, first
        count = math.prod(self._grid)
        size = count * math.prod(layout.chunks) * layout.dtype.itemsize
        self._values = values[:size].view(layout.dtype).reshape(count, *layout.chunks)

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()  # another process than a fork has no such memory

    def get(self, place: Place, read: Callable[[Place], np.ndarray | None]) -> np.ndarray | None:
        """The chunk of a number as ``read`` gives it, None if it is not stored. Raises what ``read`` raises."""
        number = int(np.ravel_multi_index(place, self._grid))
        # By system calls, which come after the values in the order of every processor.
        known = os.pread(self._known, 1, self._first + number)[0]
        if known == UNKNOWN:
            values = read(place)
            if values is not None:
                self._values[number][tuple(map(slice, values.shape))] = values
            os.pwrite(self._known, bytes([MISSING if values is None else STORED]), self._first + number)
            return values
        return None if known == MISSING else self._values[number]


def shared_chunks(layouts: Sequence[Layout | None]) -> list[SharedChunks | None]:
    """Those of each array, if all fit; None for an array that is read in place. To be called before workers start."""
    chunked = [layout for layout in layouts if layout is not None]
    counts = [math.prod(layout.grid) for layout in chunked]
    total = sum(layout.size for layout in chunked)
    most = min(MOST, SHARE * available_memory() / ranks.detect().sharing)
    if not chunked or total + sum(counts) > most or not hasattr(os, "memfd_create"):
        return [None] * len(layouts)
    known = os.memfd_create("fcmae")
    os.ftruncate(known, sum(counts))
    values = np.frombuffer(mmap.mmap(-1, total), np.uint8)
    weakref.finalize(values, os.close, known)  # every array's chunks are a view of it
    made, first, begin = [], 0, 0
    for layout, count in zip(chunked, counts, strict=True):
        made.append(SharedChunks(layout, known, first, values[begin:]))
        first, begin = first + count, begin + layout.size
    rest = iter(made)
    return [None if layout is None else next(rest) for layout in layouts]
