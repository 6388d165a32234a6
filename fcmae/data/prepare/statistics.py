"""Mean and standard deviation of images, per channel."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from fcmae.data.pixels.decode import PixelFormat, decode
from fcmae.data.pixels.nodata import NoData
from fcmae.data.sources.base import Source
from fcmae.errors import ImageError

PART = 2**22
"""Pixels that are converted to float64 at a time."""


@dataclass
class Sums:
    """The numbers, sums and sums of squares ``[C]`` of pixels in 0..1, and errors of unreadable images."""

    pixels: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    unreadable: list[ImageError]

    def __add__(self, other: "Sums") -> "Sums":
        pixels, total, squares = self.pixels + other.pixels, self.total + other.total, self.squares + other.squares
        return Sums(pixels, total, squares, self.unreadable + other.unreadable)

    def mean(self) -> list[float]:
        return (self.total / self.pixels).tolist()

    def std(self) -> list[float]:
        """The deviation of the population, in float64."""
        variance = self.squares / self.pixels - (self.total / self.pixels) ** 2
        return np.sqrt(variance.clip(min=0)).tolist()  # rounding may make it negative


def sum_images(source: Source, indices: Iterable[int], to: PixelFormat, no_data: NoData | None = None) -> Sums:
    """Sums over all pixels of some images but those without a value. Unreadable images are left out and recorded."""
    sums = Sums(np.zeros(to.in_chans, dtype=np.int64), np.zeros(to.in_chans), np.zeros(to.in_chans), [])
    for index in indices:
        try:
            pixels = decode(source[index].image, *to)
        except ImageError as error:
            sums.unreadable.append(error)
            continue
        white = 1.0 if pixels.dtype.is_floating_point else float(torch.iinfo(pixels.dtype).max)
        for part in pixels.flatten(1).split(PART, dim=1):
            values, count = part.double() / white, np.full(len(part), part.shape[1])
            if no_data is not None:
                valid = no_data.valid(part[..., None])[..., 0]
                values, count = torch.where(valid, values, 0.0), valid.sum(1).numpy()
            sums += Sums(count, values.sum(1).numpy(), values.square().sum(1).numpy(), [])
    return sums


def left_out(errors: Iterable[ImageError]) -> list[str]:
    """A line per reason, apart from numbers in it, for images that were left out."""
    kinds: dict[str, list[ImageError]] = {}
    for error in errors:
        kinds.setdefault(re.sub(r"\d+", "", error.reason), []).append(error)
    lines = []
    for alike in kinds.values():
        others = f" and {len(alike) - 1} more images" if len(alike) > 1 else ""
        lines.append(f"left out {alike[0].name}{others}: {alike[0].reason}")
    return lines
