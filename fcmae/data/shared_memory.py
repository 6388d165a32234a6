"""Shared memory in which a loader's workers hand on their batches: allocated once, filled again and again.

torch's own collation takes new memory for each batch, whose pages both processes have to map: 120 microseconds for an
image of 224 px, half of what decoding it takes. Here each worker has slots, and a batch travels as the number of its
slot. The worker fills it again when no tensor in the training process lies in it any more.
"""

import contextlib
import ctypes
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SLOTS = 64
"""Per worker. While the training process holds on to as many, new memory is taken for each batch."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
KEPT = 64 << 20
"""Bytes."""


@dataclass
class Placed:
    """A tensor in a slot, on its way to the training process."""

    loader: int
    worker: int
    number: int
    memory: Tensor | None
    """The slot's bytes, if they are new."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The tensor itself. The slot is free again when nobody holds it or a view of it."""
        return _exchanges[self.loader].open(self)

    def pin_memory(self) -> Tensor:
        """A copy in pinned memory; torch's loader calls this method."""
        return self.tensor().pin_memory()


class Exchange:
    """The training process's side of a loader's slots."""

    numbers = itertools.count()

    def __init__(self, workers: int) -> None:
        self.number = next(self.numbers)
        self.used = torch.zeros(workers, SLOTS, dtype=torch.uint8).share_memory_()
        """1 from when a worker begins to fill a slot until the training process has let go of it."""
        self._memory: dict[tuple[int, int], np.ndarray] = {}
        _exchanges[self.number] = self

    def open(self, placed: Placed) -> Tensor:
        """The tensor in a slot, whose memory stays mapped for the next one."""
        slot = placed.worker, placed.number
        if placed.memory is not None:
            self._memory[slot] = placed.memory.numpy()
        array = self._memory[slot][:]  # of its own: it lives as long as tensors that share its memory
        weakref.finalize(array, self.used.__setitem__, slot, 0).atexit = False
        size = torch.Size(placed.shape).numel() * placed.dtype.itemsize
        return torch.from_numpy(array)[:size].view(placed.dtype).as_strided(placed.shape, placed.stride)


_exchanges: weakref.WeakValueDictionary[int, Exchange] = weakref.WeakValueDictionary()
"""Of the loaders of this process, by their numbers."""


class Slots:
    """A worker's slots."""

    def __init__(self, loader: int, worker: int, used: Tensor) -> None:
        self.loader, self.worker = loader, worker
        self.used = used.numpy()
        self.memory = [torch.empty(0, dtype=torch.uint8)] * SLOTS

    def stack(self, tensors: Sequence[Tensor], channels_last: bool) -> Placed | None:
        """Tensors stacked in a slot that nobody uses; None without such a slot."""
        number = int(self.used.argmin())
        if self.used[number]:
            return None
        self.used[number] = 1
        size = sum(tensor.nbytes for tensor in tensors)
        is_new = len(self.memory[number]) < size
        if is_new:
            # Without the copy of share_memory_.
            self.memory[number] = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
        memory = self.memory[number]
        out = _stack(tensors, memory[:size].view(tensors[0].dtype), channels_last)
        sent = memory if is_new else None
        return Placed(self.loader, self.worker, number, sent, out.dtype, tuple(out.shape), out.stride())


_slots: list[Slots] = []
"""This worker's; empty in the training process."""


def start_worker(loader: int, used: Tensor, worker: int) -> None:
    """Gives a worker its slots: the number and ``used`` of its loader's :class:`Exchange`."""
    with contextlib.suppress(OSError, AttributeError):  # without glibc
        # Freed memory stays with this process: otherwise each image would have to get its pages again.
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
    _slots[:] = [Slots(loader, worker, used[worker])]


def stack(tensors: Sequence[Tensor]) -> Tensor | Placed:
    """``torch.stack``, in a slot if this is a worker. Images keep the memory order in which decoders give them."""
    channels_last = tensors[0].ndim == 3 and tensors[0].stride(0) == 1
    placed = _slots[0].stack(tensors, channels_last) if _slots else None
    if placed is not None:
        return placed
    count = sum(tensor.numel() for tensor in tensors)
    return _stack(tensors, torch.empty(count, dtype=tensors[0].dtype), channels_last)


def _stack(tensors: Sequence[Tensor], memory: Tensor, channels_last: bool) -> Tensor:
    """Tensors ``[...]`` or images ``[C, H, W]`` stacked in ``memory``."""
    if not channels_last:
        return torch.stack(list(tensors), out=memory.view(len(tensors), *tensors[0].shape))
    rows = [tensor.permute(1, 2, 0) for tensor in tensors]
    return torch.stack(rows, out=memory.view(len(rows), *rows[0].shape)).permute(0, 3, 1, 2)
