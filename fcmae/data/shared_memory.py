"""Shared memory in which the workers of a loader hand on their batches, allocated once and never copied.

New memory for each batch, as torch's default collation takes it, costs its pages anew: 120 microseconds for an image of
224 pixels a side, half of what decoding it takes. Here a worker has slots, and fills one again once the training
process has let go of what was in it. A batch travels as the number of its slot; the slot's memory is sent, by several
messages through a socket, only when it is new.
"""

import contextlib
import ctypes
import itertools
import operator
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SLOTS = 64
"""A worker's, at most; while the training process holds on to as many, new memory is taken for each batch."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
KEPT = 64 << 20
"""Bytes."""


class Slot(NamedTuple):
    """A slot's numbers: that of its loader in the training process, of the worker, and its own."""

    loader: int
    worker: int
    number: int


@dataclass
class Placed:
    """A tensor in a slot, on its way to the training process."""

    slot: Slot
    storage: torch.UntypedStorage | None
    """The slot's memory, if it is new."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        """The tensor itself; the slot stays as it is as long as anyone holds it or a part of it."""
        array = _exchanges[self.slot.loader].lend(self)
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return torch.from_numpy(array)[:size].view(self.dtype).as_strided(self.shape, self.stride)

    def pin_memory(self) -> Tensor:
        """A copy in pinned memory. The thread of torch's loader that pins asks for it by this name."""
        pinned = self.tensor().pin_memory()
        _exchanges[self.slot.loader].release()
        return pinned


class Exchange:
    """What the training process and the workers of a loader have in common: which slots are in use."""

    numbers = itertools.count()

    def __init__(self, workers: int) -> None:
        self.number = next(self.numbers)
        self.used = torch.zeros(workers, SLOTS, dtype=torch.uint8).share_memory_()
        """1 from when a worker begins to fill a slot until the training process has let go of it."""
        # The first is never lent: what is referred to as often as it is free. A tensor made of an array refers to it.
        self._memory: dict[Slot | None, np.ndarray] = {None: np.empty(0, np.uint8)}
        self._lent: set[Slot] = set()
        self._lock = threading.Lock()
        _exchanges[self.number] = self

    def lend(self, placed: Placed) -> np.ndarray:
        """A slot's memory. It stays mapped: mapping it again would cost its pages again."""
        with self._lock:
            if placed.storage is not None:
                self._memory[placed.slot] = torch.empty(0, dtype=torch.uint8).set_(placed.storage).numpy()
            self._lent.add(placed.slot)
            return self._memory[placed.slot]

    def release(self) -> None:
        """Gives the slots back that no tensor lies in any more."""
        with self._lock:
            referred = {slot: sys.getrefcount(array) for slot, array in self._memory.items()}
            for slot in [slot for slot in self._lent if referred[slot] == referred[None]]:
                self._lent.remove(slot)
                self.used[slot.worker, slot.number] = 0

    def taken(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Batches whose tensors lie in slots."""
        for batch in batches:
            yield _opened(batch)
            self.release()


_exchanges: weakref.WeakValueDictionary[int, Exchange] = weakref.WeakValueDictionary()
"""Those of the loaders of this process, by their numbers."""


def _opened(part: Any) -> Any:
    if isinstance(part, Placed):
        return part.tensor()
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*map(_opened, part))
    if isinstance(part, list):
        return [_opened(value) for value in part]
    return part


class Slots:
    """A worker's slots."""

    def __init__(self, loader: int, worker: int, used: Tensor) -> None:
        self.loader, self.worker = loader, worker
        self.used = used.numpy()
        self.storages: list[torch.UntypedStorage | None] = [None] * SLOTS
        self.unknown: set[int] = set()
        """Slots whose memory was not sent yet."""

    def place(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Placed, Tensor] | None:
        """An uninitialised tensor in a slot that nobody uses, as it travels and itself; None without such a slot."""
        number = int(self.used.argmin())
        if self.used[number]:
            return None
        self.used[number] = 1
        size = torch.Size(shape).numel() * dtype.itemsize
        storage = self.storages[number]
        if storage is None or storage.nbytes() < size:
            storage = self.storages[number] = torch.UntypedStorage._new_shared(size)
            self.unknown.add(number)
        tensor = torch.empty(0, dtype=torch.uint8).set_(storage)[:size].view(dtype).view(*shape)
        sent = storage if number in self.unknown else None
        self.unknown.discard(number)
        return Placed(Slot(self.loader, self.worker, number), sent, dtype, tuple(shape), tensor.stride()), tensor

    def give_back(self, placed: Placed) -> None:
        """What was placed is not sent: the slot is free again."""
        if placed.storage is not None:
            self.unknown.add(placed.slot.number)
        self.used[placed.slot.number] = 0


class Rows:
    """A batch of uint8 images in the making, each of which is written where the batch will be."""

    def __init__(self, slots: Slots, images: int) -> None:
        self.slots = slots
        self.images = images
        self.found: tuple[Placed, Tensor] | None = None
        self.rows: tuple[Tensor, ...] = ()
        self.handed = 0

    def next(self, crops: int, shape: tuple[int, int, int]) -> Sequence[Tensor | None]:
        """Places for the crops ``[C, H, W]`` of one more image, channels last; None where there are none left."""
        if not self.handed:
            self.found = self.slots.place((self.images * crops, *shape[1:], shape[0]), torch.uint8)
            self.rows = self.found[1].permute(0, 3, 1, 2).unbind() if self.found else ()
        first, self.handed = self.handed, self.handed + crops
        if self.handed > len(self.rows):  # no slot, or an image that could not be read has left its own
            return [None] * crops
        return self.rows[first : self.handed]

    def batch(self, images: Sequence[Tensor]) -> Placed | None:
        """The batch, if it is these images in this order."""
        if self.found is None or not len(images) == len(self.rows) == self.handed:
            return None
        return _channels_first(*self.found) if all(map(operator.is_, images, self.rows)) else None

    def give_back(self) -> None:
        """The batch lies elsewhere."""
        if self.found is not None:
            self.slots.give_back(self.found[0])


_slots: list[Slots] = []
"""This worker's; empty in the training process."""
_rows: list[Rows] = []
"""Of the batch that this worker is making."""


def start_worker(loader: int, used: Tensor, worker: int) -> None:
    """Gives a worker its slots: the number of its loader and what is in use are those of an :class:`Exchange`."""
    _keep_heap()
    _slots[:] = [Slots(loader, worker, used[worker])]


def _keep_heap() -> None:
    """Memory that is given back stays with this process: taking it anew would cost its pages, for each image.

    glibc's allocator does otherwise for pieces as large as images. Elsewhere nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def begin(images: int) -> None:
    """A batch of so many images follows."""
    for rows in _rows:  # of a batch that was not stacked
        rows.give_back()
    _rows[:] = [Rows(slots, images) for slots in _slots]


def places(crops: int, shape: tuple[int, int, int]) -> Sequence[Tensor | None]:
    """Where to write the uint8 crops ``[C, H, W]`` of the batch's next image; None for new memory."""
    return _rows[0].next(crops, shape) if _rows else [None] * crops


def stack(tensors: Sequence[Tensor]) -> Tensor | Placed:
    """``torch.stack``, in the memory order that they come in; in a slot if this is a worker.

    Decoders and the resize put the channels of an image last.
    """
    if tensors[0].ndim != 3 or tensors[0].stride(0) != 1:
        placed, together = _place(len(tensors), tensors[0])
        torch.stack(list(tensors), out=together)
        return placed or together
    rows = _rows.pop() if _rows else None
    if rows is not None and (batch := rows.batch(tensors)) is not None:
        return batch
    last = [tensor.permute(1, 2, 0) for tensor in tensors]
    placed, together = _place(len(last), last[0])
    torch.stack(last, out=together)
    if rows is not None:
        rows.give_back()
    return _channels_first(placed, together) if placed else together.permute(0, 3, 1, 2)


def _place(count: int, like: Tensor) -> tuple[Placed | None, Tensor]:
    """Memory for so many tensors: a slot's, or new one."""
    shape = (count, *like.shape)
    found = _slots[0].place(shape, like.dtype) if _slots else None
    return found or (None, torch.empty(shape, dtype=like.dtype))


def _channels_first(placed: Placed, tensor: Tensor) -> Placed:
    """The same memory, seen as ``[N, C, H, W]``."""
    seen = tensor.permute(0, 3, 1, 2)
    return replace(placed, shape=tuple(seen.shape), stride=seen.stride())
