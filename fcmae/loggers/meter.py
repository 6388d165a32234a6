"""Means of the training metrics, read without making every step wait for the device."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fcmae import memory
from fcmae.distributed import World


class Meter:
    """Means over the steps since the last reading, leaving out losses that are not finite.

    Only reading waits for the device.

    Args:
        share: this rank's samples in mean shares, which its loss counts for.
    """

    def __init__(self, world: World, images_per_step: int, share: float = 1.0) -> None:
        self.world = world
        self.images_per_step = images_per_step
        self.share = share
        self.restart()

    def restart(self) -> None:
        """Starts again, after something that is not training."""
        self.steps = 0
        self.finite = self._zero()
        self.loss = self._zero()
        self.parts: dict[str, Tensor] = defaultdict(self._zero)
        self.grad_norm = self._zero()
        self.waits: list[_Wait] = []
        self.since = time.perf_counter()

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.world.device)

    def add(self, loss: Tensor, grad_norm: Tensor, parts: Mapping[str, Tensor] | None = None) -> None:
        """One step. ``parts``: of the loss, by the names that they are logged as; the same names in every step."""
        self.steps += 1
        finite = torch.isfinite(loss)
        self.finite += finite * self.share
        self.loss += torch.where(finite, loss, 0)
        for name, part in (parts or {}).items():
            self.parts[name] += torch.where(finite, part, 0)
        self.grad_norm = grad_norm

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """In this block the next batch is waited for."""
        wait = _Wait(self.world.device)
        yield
        wait.end()
        self.waits.append(wait)

    def read(self) -> dict[str, float]:
        count = self.world.sum(self.finite).item() or 1.0
        losses = {
            name: self.world.sum(total).item() / count for name, total in {"loss": self.loss, **self.parts}.items()
        }
        grad_norm = self.grad_norm.item()
        seconds = time.perf_counter() - self.since
        images_per_second = self.steps * self.images_per_step / seconds
        waited = torch.tensor(sum(wait.seconds() for wait in self.waits) / seconds)
        data_wait = self.world.max(waited).item()
        self.restart()
        return {
            **losses,
            "grad_norm": grad_norm,
            "images_per_second": images_per_second,
            "data_wait": data_wait,
            "memory_gib": memory.peak(self.world.device) / 2**30,
        }


class _Wait:
    """How long the device had nothing to do because the host waited for data.

    A host that is ahead of its GPU waits without loss. So on a GPU events mark the beginning and the end of the wait
    among the kernels; if these ran in the meantime, the events lie next to each other. Recording them takes a few
    microseconds and waits for nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        if self.events:
            self.events[0].record()
        self.began = time.perf_counter()

    def end(self) -> None:
        """The data are there."""
        self.waited = time.perf_counter() - self.began
        if self.events:
            self.events[1].record()

    def seconds(self) -> float:
        """Call it once the device is through with what followed."""
        if not self.events:
            return self.waited
        first, last = self.events
        return min(self.waited, first.elapsed_time(last) / 1000)
