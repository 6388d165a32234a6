"""``data.normalize=image``: each image by the mean and standard deviation of its own pixels."""

import copy
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcmae.data.pixels.nodata import NoData

PART = 2**22
"""Pixels that are summed at a time."""
FLAT = 1e-7
"""Smaller deviations, as a share of the mean, are rounding errors of a constant channel: of float32, 1.2e-7."""


class OwnScale(NamedTuple):
    """Mean and standard deviation of the channels of one image, float32 ``[C, 1, 1]``, in the units of its pixels."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, pixels: Tensor, no_data: NoData | None = None) -> "OwnScale":
        """Of the pixels of ``[C, H, W]`` that have a value. A constant channel has a deviation of 1.

        Sums of integers are exact, and those of floating-point numbers have one order, whatever the number of threads.
        """
        valid = None if no_data is None else no_data.valid(pixels).numpy()
        found = []
        for channel, values in enumerate(pixels.numpy()):
            chosen = values.ravel() if valid is None else values[valid[channel]]
            mean, std = _moments(chosen) if chosen.size else (0.0, 1.0)
            found.append((mean, std if std > FLAT * abs(mean) else 1.0))
        mean, std = torch.tensor(found, dtype=torch.float32).T[..., None, None]
        return cls(mean, std)

    def filling(self, no_data: NoData | None) -> NoData | None:
        """``no_data`` with this mean for pixels without a value."""
        if no_data is None:
            return None
        filling = copy.copy(no_data)
        filling.fill, filling.float_fill = self.mean.round().to(torch.int32), self.mean
        return filling

    def apply(self, pixels: Tensor, valid: Tensor | None = None) -> Tensor:
        """Raw ``[C, H, W]`` to normalised float32; 0 where a pixel is not ``valid``."""
        normal = (pixels.to(torch.float32, memory_format=torch.contiguous_format) - self.mean) / self.std
        return normal if valid is None else torch.where(valid, normal, 0.0)


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and deviation of uint8, uint16 or float32 ``[N]``."""
    parts = [values[first : first + PART] for first in range(0, values.size, PART)]
    if values.dtype.kind == "u":
        levels = np.iinfo(values.dtype).max + 1
        counts = sum(np.bincount(part, minlength=levels) for part in parts)
        total, squares = (int((counts * np.arange(levels) ** power).sum()) for power in (1, 2))
        count = values.size
        return total / count, math.sqrt(count * squares - total**2) / count
    mean = sum(float(part.sum(dtype=np.float64)) for part in parts) / values.size
    deviation = sum(float(np.square(part - mean, dtype=np.float64).sum()) for part in parts)
    return mean, math.sqrt(deviation / values.size)
