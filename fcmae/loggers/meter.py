"""Means of the training metrics, read without making every step wait for the device."""

import time

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
        """Starts anew, after something that is not training."""
        self.steps = 0
        self.finite = torch.zeros((), device=self.world.device)
        self.loss = torch.zeros((), device=self.world.device)
        self.grad_norm = torch.zeros((), device=self.world.device)
        self.since = time.perf_counter()

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        self.steps += 1
        finite = torch.isfinite(loss)
        self.finite += finite * self.share
        self.loss += torch.where(finite, loss, 0)
        self.grad_norm = grad_norm

    def read(self) -> dict[str, float]:
        loss = self.world.sum(self.loss).item() / (self.world.sum(self.finite).item() or 1.0)
        grad_norm = self.grad_norm.item()
        images_per_second = self.steps * self.images_per_step / (time.perf_counter() - self.since)
        self.restart()
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "images_per_second": images_per_second,
            "memory_gib": memory.peak(self.world.device) / 2**30,
        }
