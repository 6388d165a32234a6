"""Shared memory in which a loader worker hands on its batches, allocated once.

A new piece for each batch, as torch's default collation takes it, costs its pages anew: 120 microseconds for an image
of 224 pixels a side, a quarter of what decoding it takes. Here a worker has a slot for each batch that may be under
way, and one more, which it fills in turn. A slot is filled again only after the training process has taken the next
batch of the same worker, so whoever takes a batch copies it before taking another (:func:`taken`), as pinning does.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info


class Slots:
    """A worker's slots."""

    def __init__(self, count: int) -> None:
        self.storages: list[torch.UntypedStorage | None] = [None] * count
        self.turn = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in the next slot."""
        size = torch.Size(shape).numel() * dtype.itemsize
        storage = self.storages[self.turn]
        if storage is None or storage.nbytes() < size:
            storage = self.storages[self.turn] = torch.UntypedStorage._new_shared(size)
        self.turn = (self.turn + 1) % len(self.storages)
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape, torch.empty(shape, device="meta").stride())


_slots: list[Slots] = []
"""This worker's; empty in the training process."""


def start_worker(prefetch: int) -> None:
    """Gives this worker a slot for each batch that it may be ahead, and one more."""
    _slots[:] = [Slots(prefetch + 1)]


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.stack``, in a slot where this is a worker."""
    if not _slots or get_worker_info() is None:
        return torch.stack(list(tensors))
    out = _slots[0].empty((len(tensors), *tensors[0].shape), tensors[0].dtype)
    return torch.stack(list(tensors), out=out)


class Memory:
    """Memory of the training process for batches, used again once nobody holds a tensor in it.

    New memory for each batch would cost its pages anew, as much as it does in the workers.
    """

    def __init__(self) -> None:
        # The first is never lent: what is referred to as often as it is free. A tensor made of an array refers to it.
        self.arrays = [np.empty(0, np.uint8)]

    def copy(self, part: Tensor) -> Tensor:
        """A copy of a tensor, laid out as it is."""
        size = part.untyped_storage().nbytes()
        out = torch.from_numpy(self._free(size))[:size].view(part.dtype).as_strided(part.shape, part.stride())
        return out.copy_(part)

    def _free(self, size: int) -> np.ndarray:
        referred = [sys.getrefcount(array) for array in self.arrays]
        for place in range(1, len(self.arrays)):
            if referred[place] == referred[0] and self.arrays[place].nbytes >= size:
                return self.arrays[place]
        self.arrays.append(np.empty(size, np.uint8))
        return self.arrays[-1]


def taken(batches: Iterable[Any], workers: int, pinned: bool) -> Iterator[Any]:
    """Batches that stay what they are: those in slots are copied, but where pinning has done so.

    Slots stay mapped as long as this iterator lives: mapping one again would cost its pages again.
    """
    mapped: dict[int, torch.UntypedStorage] = {}
    memory = Memory()
    for batch in batches:
        yield _copy(batch, mapped, memory) if workers and not pinned else batch


def _copy(part: Any, mapped: dict[int, torch.UntypedStorage], memory: Memory) -> Any:
    if isinstance(part, Tensor):
        storage = part.untyped_storage()
        mapped.setdefault(storage.data_ptr(), storage)
        return memory.copy(part)
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(_copy(value, mapped, memory) for value in part))
    if isinstance(part, list):
        return [_copy(value, mapped, memory) for value in part]
    return part
