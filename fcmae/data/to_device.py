"""Copies of batches to the GPU while it computes the step before."""

import functools
from collections import deque
from typing import Any

import torch
from torch import Tensor

SMALL = 2**20
"""Bytes below which a copy takes its turn: it is over before anything else could begin."""
AHEAD = 2
"""Copies that the host makes before the work that it had launched before the first of them is done. Without an end a
fast loader would fill the GPU's memory."""


def to_device(part: Any, device: torch.device) -> Tensor:
    """A part of a batch on the device: a tensor, or what becomes one there by its method ``to``.

    The host does not wait for the copy of pinned memory.
    """
    return copied(part, device) if isinstance(part, Tensor) else part.to(device, non_blocking=True)


def copied(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on the device, for work that is launched from now on; on a CPU ``x`` itself."""
    if device.type != "cuda" or x.nbytes < SMALL or not x.is_pinned():
        return x.to(device, non_blocking=True)
    return _copies(device, torch.cuda.current_device())(x)


class _Copies:
    """A stream for copies alone. Each is as long in memory as the work that uses it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.before: deque[torch.cuda.Event] = deque()

    def __call__(self, x: Tensor) -> Tensor:
        current = torch.cuda.current_stream(self.device)
        if len(self.before) == AHEAD:
            self.before.popleft().synchronize()
        self.before.append(current.record_event())
        with torch.cuda.stream(self.stream):
            moved = x.to(self.device, non_blocking=True)
        current.wait_stream(self.stream)
        moved.record_stream(current)
        return moved


@functools.cache
def _copies(device: torch.device, current: int) -> _Copies:
    """One for each GPU; ``current`` is what a device without a number stands for."""
    return _Copies(device)
