"""Crops that are augmented on the device, in batches (``augment.on=gpu``).

Workers cut the crops and draw what to do, from the same numbers as for ``augment.on=cpu``: the operations of timm's
policy and the rectangle that is erased. The pixels change when the batch is moved to the device.
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from fcmae.config import AugmentConfig, DataConfig
from fcmae.data.pixels.fused import fused
from fcmae.data.pixels.operations import CHUNK, Operation, apply_operations
from fcmae.data.pixels.policies import create_policy, fill_of, recorded
from fcmae.data.shared_memory import Placed, stack
from fcmae.data.to_device import copied
from fcmae.errors import ConfigError
from fcmae.randomness import uniform

QUANTILES = 2**16
"""Values that the noise of erased rectangles has."""


class Erased(NamedTuple):
    """A rectangle of an image that becomes noise."""

    top: int
    left: int
    height: int
    width: int
    key: int
    """Of the noise."""


class Drawn(NamedTuple):
    """A crop, and what the device does with it."""

    crop: Tensor
    operations: tuple[Operation, ...]
    erased: Erased | None
    finish: "Finish"


class Finish(NamedTuple):
    """What the pixels of a batch become on the device."""

    fill: tuple[int, ...]
    """The colour of what operations take from outside of an image."""
    normalize: Callable[[Tensor], Tensor]
    """From raw to normalised pixels."""


class Draw:
    """Draws what is done with each crop, from Python's and NumPy's global generators as timm does.

    Args:
        normalize: from raw to normalised pixels, of a batch.
    """

    def __init__(self, cfg: DataConfig, augment: AugmentConfig, normalize: Callable[[Tensor], Tensor]) -> None:
        name = augment.auto_augment
        self.policy: Callable[[tuple], Any] = tuple if name is None else recorded(create_policy(cfg, name), name)
        self.photos = name is not None
        # The mode does not change the rectangles; timm's noise would come from a generator for each image.
        self.erase = RandomErasing(augment.random_erasing, mode="const", device="cpu")
        self.finish = Finish(fill_of(cfg), normalize)

    def __call__(self, crop: Tensor) -> Drawn:
        if self.photos and (crop.dtype != torch.uint8 or len(crop) != 3):
            got = f"{str(crop.dtype).removeprefix('torch.')} of {len(crop)} channel(s)"
            raise ConfigError(f"augment.auto_augment must be null unless images are uint8 of 3 channels; got {got}")
        operations = self.policy(())
        rectangle = _Rectangle(crop)
        if self.erase.probability > 0:
            self.erase(rectangle)
        return Drawn(crop, operations, rectangle.erased, self.finish)


class _Rectangle:
    """Stands for an image that timm erases a rectangle of, and keeps where that is."""

    def __init__(self, crop: Tensor) -> None:
        self.dtype, self.size = crop.dtype, crop.size
        self.erased: Erased | None = None

    def __setitem__(self, place: tuple[slice, slice, slice], noise: Tensor) -> None:
        _, rows, cols = place
        sides = rows.stop - rows.start, cols.stop - cols.start
        self.erased = Erased(rows.start, cols.start, *sides, key=random.getrandbits(63))


@dataclass(frozen=True)
class Augmented:
    """The images of a batch, which :meth:`to` augments on the device."""

    crops: Tensor | Placed
    """Raw ``[N, C, H, W]``."""
    operations: list[tuple[Operation, ...]]
    erased: list[tuple[int, Erased]]
    """With the numbers of their images."""
    finish: Finish

    def opened(self) -> "Augmented":
        """With the crops instead of their place in shared memory."""
        return replace(self, crops=self.crops.tensor()) if isinstance(self.crops, Placed) else self

    def pin_memory(self) -> "Augmented":
        """With the crops in pinned memory; torch's loader calls this method."""
        return replace(self, crops=self.crops.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = False) -> Tensor:
        """Normalised float32 ``[N, C, H, W]`` on the device."""
        assert isinstance(self.crops, Tensor)
        crops = copied(self.crops, device).contiguous()
        crops = crops.clone() if crops is self.crops else crops  # which operations change
        return erase(self.finish.normalize(apply_operations(crops, self.operations, self.finish.fill)), self.erased)


def pack_drawn(drawn: Sequence[Drawn]) -> Augmented:
    """A batch of samples, at least one."""
    erased = [(number, one.erased) for number, one in enumerate(drawn) if one.erased is not None]
    return Augmented(stack([one.crop for one in drawn]), [one.operations for one in drawn], erased, drawn[0].finish)


def erase(imgs: Tensor, erased: Sequence[tuple[int, Erased]]) -> Tensor:
    """Replaces rectangles of float32 ``[N, C, H, W]`` by normal noise, a function of their keys, in place."""
    if erased and (kernels := fused(imgs)) is not None:
        kernels.erase(imgs, torch.tensor([[number, *rectangle] for number, rectangle in erased]), _normal(imgs.device))
        return imgs
    step = max(1, CHUNK // (4 * imgs[0].numel()))
    for start in range(0, len(erased), step):
        _erase(imgs, torch.tensor([[number, *rectangle] for number, rectangle in erased[start : start + step]]))
    return imgs


def _erase(imgs: Tensor, table: Tensor) -> None:
    """Some rectangles: int64 ``[n, 6]`` on the CPU, so that the host need not wait for their sizes."""
    channels, width = imgs.shape[1], imgs.shape[3]
    pixels, total = table[:, 3] * table[:, 4], int((table[:, 3] * table[:, 4]).sum())
    columns = torch.cat([table, pixels[:, None], (pixels.cumsum(0) - pixels)[:, None]], dim=1)
    columns = columns.to(imgs.device, non_blocking=True)
    whose = torch.arange(len(table), device=imgs.device).repeat_interleave(columns[:, 6], output_size=total)
    image, top, left, _, cols, key, _, first = columns[whose, :, None].unbind(1)  # [total, 1] each
    within = torch.arange(total, device=imgs.device)[:, None] - first
    place = (top + within // cols) * width + left + within % cols
    channel = torch.arange(channels, device=imgs.device)
    number = (uniform(key, place * channels + channel) * QUANTILES).long()
    imgs.view(len(imgs), channels, -1)[image, channel, place] = _normal(imgs.device)[number]


@functools.lru_cache(maxsize=8)
def _normal(device: torch.device) -> Tensor:
    """Quantiles of the normal distribution, the same on every device, whose logarithms and roots differ."""
    with torch.inference_mode(False):
        shares = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
        return torch.special.ndtri(shares).float().to(device)
